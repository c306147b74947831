"""From Relax operators to scheduled kernels, for a target."""

import json
import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.target import Target

from tvm_compress.errors import KernelError
from tvm_compress.schedules import (
    bitserial,
    codebook,
    depthwise,
    elementwise,
    fp32,
    int8,
    integer_sites,
    kernel,
    lookup,
    narrow,
    ops,
    table,
    winograd,
)
from tvm_compress.schedules.choices import NO_CHOICES, Choices
from tvm_compress.schedules.counts import executed
from tvm_compress.schedules.kernel import INFO, KERNEL, FusedKernel, KernelFamily
from tvm_compress.schedules.kernel_key import kernel_key, target_digest
from tvm_compress.schedules.target_rules import TargetRules, rules_for
from tvm_compress.schedules.te_cache import ReusingBuilder

FAMILIES: dict[str, KernelFamily] = {
    family.name: family
    for family in (
        fp32.FAMILY,
        winograd.FP32,
        winograd.INT8,
        int8.FAMILY,
        bitserial.FAMILY,
        narrow.FAMILY,
        lookup.FAMILY,
        depthwise.FP32,
        depthwise.INT8,
    )
}

# What sites' schemes are called; a family of the same name serves each (and may leave a site to another).
SCHEMES = ("fp32", "int8", "bitserial")

# Families that do the work of another one, whose kernels are all of one kind to a model.
_KINDS = {"narrow": "int8", "lookup": "bitserial"} | {
    f"{family}_{scheme}": scheme for family in ("winograd", "depthwise") for scheme in ("fp32", "int8")
}

_ELEMENTWISE: dict[str, Callable[[relax.BlockBuilder, relax.Call, TargetRules], relax.Expr]] = {
    "quantize": elementwise.legalize_quantize,
    "dequantize": elementwise.legalize_dequantize,
    "requantize": elementwise.legalize_requantize,
    "table": table.legalize,
    "window_sum": elementwise.legalize_window_sum,
}
_FP32_SITES = ("relax.nn.conv2d", "relax.matmul")
_INTEGER_SITES = ("tvm_compress.conv2d", "tvm_compress.dense")


@dataclass(frozen=True)
class KernelInfo:
    """What one kernel of a lowered module computes, for latency models and measurements.

    Attributes
    ----------
    name
        Its symbol in the module and the library.
    kind
        "conv2d_fp32", "dense_int8", ... for sites, by what computes them: "_bitserial" where bits are
        counted or look sums up, "_int8" where bytes are multiplied, whatever the site's scheme (which is a
        feature); else "elementwise".
    count
        Calls in main.
    key
        Identifies the kernel across models, see `kernel_key`.
    features
        Shapes, bits, macs, bops, bytes, intensity (macs per byte), one-hot operators, schemes and backends,
        and what `counts.executed` counts.
    func
        The scheduled PrimFunc.
    info
        What its main block states (kernel.kernel_attrs), with "backend", the family that computes it; other
        kernels have an "operator" only.
    """

    name: str
    kind: str
    count: int
    key: str
    features: dict[str, float]
    func: tirx.PrimFunc
    info: Mapping[str, Any] = field(default_factory=dict, compare=False)


def lower_to_kernels(
    module: tvm.IRModule, target: Target, compact: bool = False, choices: Choices = NO_CHOICES
) -> tvm.IRModule:
    """Lower a Relax module with bound parameters to scheduled TIR; `relax.build` takes the result as it is.

    Parameters
    ----------
    compact
        Take no kernel that keeps its weights in a larger form, though it may be faster.
    choices
        What to take for single layers, in place of what the rules say.

    Raises
    ------
    KernelError
        Where a convolution or dense layer has no kernel: no fallback, as it would be 100 times slower.
        Where a choice is none of those that there are.
    """
    ops.register()
    elementwise.allow_vector_rounding()
    plain = replace(rules_for(target), compact=compact)
    rules = replace(plain, choices=choices)
    module = fold_transposed_weights(module)
    _check_sites(module)
    with target:
        # Lookups of weights are done by the kernels that expand them: the calls themselves are dead.
        module = relax.transform.DeadCodeElimination()(_legalize(module, rules))
        module = tvm.ir.transform.Sequential(
            [
                relax.transform.AnnotateTIROpPattern(),
                relax.transform.FuseOps(),
                relax.transform.FuseTIR(),
                relax.transform.DeadCodeElimination(),
            ]
        )(module)
    functions = {
        gv: _schedule_once(func, plain, gv.name_hint) if isinstance(func, tirx.PrimFunc) else func
        for gv, func in module.functions.items()
    }
    return tvm.IRModule(functions, attrs=module.attrs)


def _legalize(module: tvm.IRModule, rules: TargetRules) -> tvm.IRModule:
    """Legalise all calls; what a legaliser refuses is raised as the KernelError that it is."""
    refusals: list[KernelError] = []

    def recorded(legalize: Callable) -> Callable[[relax.BlockBuilder, relax.Call], relax.Expr]:
        def attempt(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
            try:
                return legalize(cast("relax.BlockBuilder", ReusingBuilder(bb)), call)
            except KernelError as error:
                refusals.append(error)
                raise

        return attempt

    legalizers = {name: recorded(legalize) for name, legalize in _legalize_map(rules).items()}
    try:
        return relax.transform.LegalizeOps(customize_legalize_map=legalizers)(module)
    except RuntimeError:
        # TVM's call from C++ back to Python turns exceptions that it does not know into RuntimeError.
        if refusals:
            raise refusals[0] from None
        raise


def _legalize_map(rules: TargetRules) -> dict[str, Callable[[relax.BlockBuilder, relax.Call], relax.Expr]]:
    """Return what LegalizeOps shall call for the sites and for the dialect's operators."""

    def bound(legalize: Callable) -> Callable[[relax.BlockBuilder, relax.Call], relax.Expr]:
        return lambda bb, call: legalize(bb, call, rules)

    return (
        {"relax.nn.conv2d": bound(winograd.legalize), "relax.matmul": bound(fp32.legalize)}
        | dict.fromkeys(_INTEGER_SITES, bound(integer_sites.legalize))
        | {ops.PREFIX + name: bound(legalize) for name, legalize in _ELEMENTWISE.items()}
    )


@mutator
class _FoldTransposedWeights(PyExprMutator):
    """Replaces the permute_dims of a constant by the permuted constant; of a matrix from a codebook too."""

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = super().visit_call_(call)
        if getattr(call.op, "name", "") != "relax.permute_dims":
            return call
        value = call.args[0]
        looked_up = self.lookup_binding(value) if isinstance(value, relax.Var) else value
        if codebook.is_lookup(looked_up) and len(value.ty.shape) == 2 and call.attrs.axes is None:
            indices = np.ascontiguousarray(kernel.constant_array(looked_up.args[0], "indices").T)
            axis = 1 - int(looked_up.attrs["axis"])
            return ops.call("lookup", [relax.const(indices), looked_up.args[1]], axis=axis)
        if not isinstance(value, tvm.ir.GenericConst):
            return call
        axes = None if call.attrs.axes is None else [int(axis) for axis in call.attrs.axes]
        return relax.const(np.ascontiguousarray(value.value.numpy().transpose(axes)))


def fold_transposed_weights(module: tvm.IRModule) -> tvm.IRModule:
    """Transpose constants now, with numpy (FoldConstant would compile a kernel for each)."""
    folder = _FoldTransposedWeights(module)
    for gv, func in module.functions.items():
        if isinstance(func, relax.Function):
            folder.builder_.update_func(gv, folder.visit_expr(func))
    module = relax.transform.CanonicalizeBindings()(folder.builder_.get())
    return relax.transform.DeadCodeElimination()(module)


def _check_sites(module: tvm.IRModule) -> None:
    """Raise KernelError for every call that would need a kernel that does not exist."""
    for func in module.functions.values():
        if not isinstance(func, relax.Function):
            continue
        looked_up: set[relax.Var] = set()
        for block in func.body.blocks:
            for binding in block.bindings:
                if isinstance(binding.value, relax.Call):
                    _check_call(binding.value, looked_up)
                    if codebook.is_lookup(binding.value):
                        looked_up.add(binding.var)


def _check_call(call: relax.Call, looked_up: Set[relax.Var]) -> None:
    name = str(getattr(call.op, "name", ""))
    if name in _FP32_SITES and call.args[1] in looked_up:
        return
    if name in _FP32_SITES or name in _INTEGER_SITES:
        kernel.constant_array(call.args[1], f"weights of {name}")
        if name in _INTEGER_SITES and str(call.attrs["scheme"]) not in SCHEMES[1:]:
            raise KernelError(
                f"There is no integer scheme {call.attrs['scheme']!r}; there are {', '.join(SCHEMES[1:])}."
            )
    elif name.startswith("relax.nn.conv") or name == "tvm_compress.binarize":
        raise KernelError(
            f"There is no kernel for {name}.", "Convolutions must be 2-D; realise QDQ modules first."
        )


# Scheduled functions by what they were made of: a search lowers hundreds of networks with mostly the same.
_SCHEDULED: dict[tuple[int, TargetRules], tirx.PrimFunc] = {}
_MOST_SCHEDULED = 4096


def _schedule_once(func: tirx.PrimFunc, rules: TargetRules, name: str) -> tirx.PrimFunc:
    """Schedule a function, unless the same was scheduled for the same target in this process."""
    key = (tvm_ffi.structural_hash(func), rules)
    if key not in _SCHEDULED:
        if len(_SCHEDULED) >= _MOST_SCHEDULED:
            _SCHEDULED.clear()
        _SCHEDULED[key] = schedule_function(func, rules, name)
    return _SCHEDULED[key]


def schedule_function(func: tirx.PrimFunc, rules: TargetRules, name: str) -> tirx.PrimFunc:
    """Schedule one PrimFunc by the family of its annotated block, or as element-wise where there is none.

    Raises
    ------
    KernelError
        Where the schedule does not apply to what was fused.
    """
    if func.attrs and "tirx.is_scheduled" in func.attrs:
        # Made with its schedule, such as the packing in front of a bit-serial kernel.
        return func
    if relax.analysis.has_reshape_pattern(func):
        # Becomes a view of the same memory; a schedule would hide that.
        return func
    sch = s_tir.Schedule(func)
    blocks = kernel.child_blocks(sch)
    family = next((str(f) for f in (kernel.annotation(sch, b, KERNEL) for b in blocks) if f), None)
    names = ", ".join(kernel.block_name(sch, b) for b in blocks)
    info: dict[str, Any] = {"operator": "elementwise"}
    try:
        if family is None:
            elementwise.schedule_plain(sch, rules)
        else:
            fused = FusedKernel(sch)
            info = fused.info | {"epilogue": len(fused.epilogue), "backend": family}
            FAMILIES[family].schedule(sch, fused, rules)
    except s_tir.ScheduleError as error:
        reason = str(error).strip().splitlines()[-1]
        raise KernelError(
            f"The kernel {name} ({names}) cannot be scheduled for {rules.name}: {reason}"
        ) from error
    result = sch.mod["main"].without_attr("global_symbol")
    for key, value in (func.attrs or {}).items():
        result = result.with_attr(key, value)
    return result.with_attr("tirx.is_scheduled", True).with_attr(INFO, json.dumps(info, sort_keys=True))


# Key and `counts.executed` of scheduled functions, by the target's digest and the object, which `_SCHEDULED`
# gives to all networks.
_DESCRIBED: dict[tuple[tirx.PrimFunc, str], tuple[str, dict[str, float]]] = {}


def kernel_infos(module: tvm.IRModule, target: Target) -> list[KernelInfo]:
    """Describe the kernels of a lowered module, in the order of their first call."""
    calls: dict[tvm.ir.GlobalVar, list[relax.Call]] = {}
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call) and getattr(value.op, "name", "") == "relax.call_tir":
                calls.setdefault(value.args[0], []).append(value)
    rules = rules_for(target)
    digest = target_digest(target)
    if len(_DESCRIBED) >= _MOST_SCHEDULED:
        _DESCRIBED.clear()
    infos = []
    for gv, sites in calls.items():
        func = module[gv]
        info = json.loads(str(func.attrs[INFO])) if INFO in func.attrs else {"operator": "elementwise"}
        kind = info["operator"]
        if "backend" in info:
            kind += f"_{_KINDS.get(info['backend'], info['backend'])}"
        if (func, digest) not in _DESCRIBED:
            _DESCRIBED[func, digest] = kernel_key(func, target), executed(func, rules.vector_bits)
        key, counts = _DESCRIBED[func, digest]
        features = _features(info, sites[0], rules) | counts
        infos.append(KernelInfo(gv.name_hint, kind, len(sites), key, features, func, info))
    return infos


_BACKENDS = {"popcount": "bitserial", "dot": "int8", "narrow": "narrow", "lookup": "lookup"}
_SHAPE_FEATURES = ("N", "H", "W", "IC", "OC", "OH", "OW", "KH", "KW", "stride", "groups")


def _features(info: Mapping[str, Any], call: relax.Call, rules: TargetRules) -> dict[str, float]:
    """Return a kernel's numeric features; all kernels have the same names."""
    site = "scheme" in info
    features = {name: float(info.get(name, 0)) for name in _SHAPE_FEATURES}
    for operator in ("conv2d", "dense", "elementwise"):
        features[f"is_{operator}"] = float(info["operator"] == operator)
    for scheme in SCHEMES:
        features[f"is_{scheme}"] = float(info.get("scheme") == scheme)
    for name, family in _BACKENDS.items():
        features[f"backend_{name}"] = float(info.get("backend") == family)
    for name in ("winograd", "depthwise"):
        features[f"backend_{name}"] = float(str(info.get("backend")).startswith(name))
    features["activation_bits"] = float(info.get("activation_bits", 32))
    features["weight_bits"] = float(info.get("weight_bits", 32))
    macs = 0.0
    if site:
        outputs = math.prod(int(info[name]) for name in ("N", "OH", "OW", "OC"))
        macs = outputs * int(info["KH"]) * int(info["KW"]) * int(info["IC"]) / int(info["groups"])
    weights = inputs = 0
    for argument in call.args[1].fields:
        if isinstance(argument, tvm.ir.GenericConst):
            weights += _bytes(argument)
        else:
            inputs += _bytes(argument)
    output = _bytes(call)
    features |= {
        "macs": macs,
        "bops": macs * features["activation_bits"] * features["weight_bits"],
        "input_bytes": float(inputs),
        "weight_bytes": float(weights),
        "output_bytes": float(output),
        "intensity": macs / (inputs + weights + output),
        "epilogue_ops": float(info.get("epilogue", 0)),
        "threads": float(rules.threads),
    }
    return features


def _bytes(expr: relax.Expr) -> int:
    shape = [int(extent) for extent in expr.ty.shape]
    return math.prod(shape) * np.dtype(str(expr.ty.dtype)).itemsize
