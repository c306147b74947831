"""Which kernels can compute the layers of a module, and how each can be cut: what a tuner tries."""

from collections.abc import Iterable, Mapping
from typing import Any

import tvm
from tvm import relax

from tvm_compress.errors import TuningError
from tvm_compress.schedules import (
    bitserial,
    depthwise,
    depthwise_plan,
    fp32,
    int8,
    kernel,
    lookup,
    narrow,
    packing,
    sparse,
    winograd,
    winograd_choice,
    winograd_plan,
)
from tvm_compress.schedules.choices import Choice, Choices, layer_key
from tvm_compress.schedules.intrin.narrow import narrow_dot_for
from tvm_compress.schedules.packing import IntegerLayer
from tvm_compress.schedules.target_rules import TargetRules
from tvm_compress.schedules.winograd_algorithm import ALGORITHMS, INTEGER_ALGORITHMS

# Ways to cut a layer by kernel, the best by the kernel's own estimate first.
Ways = dict[str, Iterable[tuple[int, ...]]]


_KERNELS = {"direct", "depthwise", "narrow", "lookup", "popcount", *ALGORITHMS, *INTEGER_ALGORITHMS}


def check_kernels(choices: Choices) -> None:
    """Raise TuningError where a choice names no kernel."""
    for layer, choice in choices.by_layer:
        if choice.kernel not in _KERNELS:
            raise TuningError(
                f"The tuning chooses the kernel {choice.kernel!r} for the layer {layer!r}; there are "
                f"{', '.join(sorted(_KERNELS))}.",
                "Tune it again.",
            )


def layer_candidates(module: tvm.IRModule, rules: TargetRules) -> dict[str, list[list[Choice]]]:
    """Return the choices there are for the layers of a module, by layer (choices.layer_key).

    Parameters
    ----------
    module
        With bound parameters and folded weights (apply.fold_transposed_weights), before its kernels.

    Returns
    -------
    A list for each kernel that can compute the layer, the best by its own estimate first. Of layers that
    differ in their weights only, what all of them can take.
    """
    found: dict[str, list[list[Choice]]] = {}
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            info, ways = _ways(binding.value, rules)
            if not ways:
                continue
            key = layer_key(info)
            lists = [[Choice(name, cut) for cut in cuts] for name, cuts in ways.items()]
            found[key] = [each for each in lists if each in found[key]] if key in found else lists
    return found


def _ways(value: relax.Expr, rules: TargetRules) -> tuple[Mapping[str, Any], Ways]:
    name = str(getattr(value.op, "name", "")) if isinstance(value, relax.Call) else ""
    if name in ("tvm_compress.conv2d", "tvm_compress.dense"):
        layer = packing.read_layer(value)
        return layer.info(), _integer_ways(layer, rules)
    # Weights in a codebook leave a layer its default.
    if name == "relax.nn.conv2d" and isinstance(value.args[1], tvm.ir.GenericConst):
        info = kernel.conv_geometry(value, value.args[1].ty.shape)
        info |= {"scheme": "fp32", "activation_bits": 32, "weight_bits": 32}
        return info, _float_ways(info, rules)
    if name == "relax.matmul" and isinstance(value.args[1], tvm.ir.GenericConst):
        weight = value.args[1].value.numpy()
        if weight.ndim == 2:
            info = fp32.dense_info(int(value.args[0].ty.shape[0]), *weight.shape)
            dense = info["N"] > 1 or sparse.find_rows(weight.T, rules) is None
            return info, {"direct": fp32.cuts(info, rules)} if dense else {}
    return {}, {}


def _float_ways(info: dict[str, Any], rules: TargetRules) -> Ways:
    if depthwise.is_depthwise(info["groups"], info["IC"]):
        form = depthwise_plan.form_for(rules, False, info["OC"])
        return {"depthwise": depthwise_plan.cuts(rules, form, info)}
    if packing.merged_groups(info["groups"], info["OC"] // info["groups"], rules.fp32_lanes) > 1:
        return {}
    ways: Ways = {"direct": fp32.cuts(info, rules)}
    if winograd_choice.applies(info):
        for name, algorithm in winograd_choice.of_stride(ALGORITHMS, info).items():
            ways[name] = winograd_plan.cuts(rules, info, algorithm, winograd_plan.FLOATS)
    return ways


def _integer_ways(layer: IntegerLayer, rules: TargetRules) -> Ways:
    info = layer.info()
    if depthwise.is_depthwise(layer.groups, layer.in_channels):
        form = depthwise_plan.form_for(rules, True, layer.out_channels)
        return {"depthwise": depthwise_plan.cuts(rules, form, info)}
    ways: Ways = {"direct": int8.cuts(layer, rules)}
    dot = narrow_dot_for(rules.isa, layer.out_channels)
    if dot is not None and narrow.find_chunks(layer, rules) is not None:
        ways["narrow"] = narrow.cuts(layer, dot)
    if rules.is_arm and lookup.applies(layer):
        ways["lookup"] = lookup.cuts(layer)
    if layer.scheme == "bitserial":
        ways["popcount"] = bitserial.cuts(layer, rules)
    if layer.operator == "conv2d" and winograd_choice.applies(info):
        for name, algorithm in winograd.fitting_algorithms(layer, info).items():
            ways[name] = winograd_plan.cuts(rules, info, algorithm, winograd_plan.integers(rules, algorithm))
    return ways
