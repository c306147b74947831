"""Remove the channels that a policy does not keep: float -> float, with smaller parameters."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import tvm
from tvm import IRModule, relax

from tvm_compress.errors import PolicyError
from tvm_compress.passes.graph import bindings, operator, substitute
from tvm_compress.passes.groups import CoupledSet, find_coupled_sets, round_channels
from tvm_compress.passes.module_pass import ModulePass
from tvm_compress.passes.params import get_params, parameter_vars, require_stage, with_main, with_values
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.passes.sites import find_sites
from tvm_compress.schedules.ops import static_shape

Scores = Mapping[str, np.ndarray]


@tvm.transform.module_pass(opt_level=0, name="tvm_compress.PruneChannels")
class PruneChannels(ModulePass):
    """Cut the channels that a policy removes out of every parameter that holds them: float -> float.

    Parameters
    ----------
    policy
        Says how many (`channels`) or which (`kept`) output channels of a site are kept. All producers of a
        coupled set lose the same channels; it is enough that one of them is named, several must agree.
    scores
        By coupled set's name, one number per channel: the highest are kept, the lower index first among
        equals. Needed for criterion "tolerance" where `kept` is not given; without scores "l1" and "l2" sum
        |w| or w**2 over the weights of all producers.

    Raises
    ------
    PolicyError
        Where the policy does not fit the module; names the site.
    """

    def __init__(self, policy: CompressionPolicy, scores: Scores | None = None) -> None:
        self._policy = policy
        self._scores = scores

    def transform_module(self, module: IRModule, context: tvm.transform.PassContext) -> IRModule:
        """Apply the pass."""
        del context
        require_stage(module, "float", what="PruneChannels")
        sets = find_coupled_sets(module)
        kept = _kept_channels(module, sets, self._policy, self._scores)
        return _cut(module, sets, kept) if kept else module


def resolve_kept(
    module: IRModule, policy: CompressionPolicy, scores: Scores | None = None
) -> CompressionPolicy:
    """Give the policy with `channels` and `kept` written out at every producer of every pruned set.

    Applying that policy needs no scores and gives the same module each time. `channels` is rounded up to the
    policy's `rounding`; sets that lose nothing have neither `channels` nor `kept`.
    """
    require_stage(module, "float", what="resolve_kept")
    sets = find_coupled_sets(module)
    kept = _kept_channels(module, sets, policy, scores)
    sites = dict(policy.sites)
    for coupled in sets:
        chosen = kept.get(coupled.name)
        for name in coupled.producers:
            if chosen is not None:
                sites[name] = replace(policy[name], channels=len(chosen), kept=chosen)
            elif name in sites:
                sites[name] = replace(policy[name], channels=None, kept=None)
    return replace(policy, sites=sites)


def _kept_channels(
    module: IRModule, sets: list[CoupledSet], policy: CompressionPolicy, scores: Scores | None
) -> dict[str, tuple[int, ...]]:
    """Give the kept channels of each set that loses some, by the set's name."""
    sites = find_sites(module)
    policy.check(sites)
    result = {}
    params = get_params(module)
    weights = {site.name: params[site.weight] for site in sites}
    for coupled in sets:
        channels, kept = _wanted(coupled, policy)
        if channels is None or channels == coupled.channels:
            continue
        if not coupled.prunable:
            raise PolicyError(
                f"Site {coupled.name!r} cannot lose channels ({channels} of {coupled.channels} wanted): "
                f"{coupled.reason}."
            )
        if kept is None:
            channels = round_channels(channels, coupled.channels, policy.rounding)
            if channels == coupled.channels:
                continue
            order = np.argsort(-_score(coupled, policy, scores, weights), kind="stable")
            kept = tuple(int(index) for index in np.sort(order[:channels]))
        result[coupled.name] = kept
    return result


def _wanted(coupled: CoupledSet, policy: CompressionPolicy) -> tuple[int | None, tuple[int, ...] | None]:
    """Give what the producers of a set agree on: how many channels, and which where that is said."""
    asked = {name: policy[name] for name in coupled.producers if policy[name].channels is not None}
    counts = {name: site.channels for name, site in asked.items()}
    chosen = {name: site.kept for name, site in asked.items() if site.kept is not None}
    for values in (counts, chosen):
        first = next(iter(values), None)
        for name, value in values.items():
            if first is not None and value != values[first]:
                raise PolicyError(
                    f"Sites {first!r} and {name!r} share their channels but want different ones: "
                    f"{values[first]} and {value}.",
                    f"Give the same for all of: {', '.join(coupled.producers)}.",
                )
    return next(iter(counts.values()), None), next(iter(chosen.values()), None)


def _score(
    coupled: CoupledSet, policy: CompressionPolicy, scores: Scores | None, weights: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Give one number per channel; the channels with the highest are kept."""
    if scores is not None and coupled.name in scores:
        found = np.asarray(scores[coupled.name], np.float64)
        if found.shape != (coupled.channels,) or not np.isfinite(found).all():
            raise PolicyError(
                f"Site {coupled.name!r} needs {coupled.channels} finite scores, "
                f"not an array of shape {found.shape}."
            )
        return found
    if policy.criterion == "tolerance":
        raise PolicyError(
            f"Site {coupled.name!r} says how many channels to keep, not which, and criterion 'tolerance' "
            "needs scores from data.",
            "Give scores (tvm_compress.tolerance.channel_scores), or use criterion l1 or l2.",
        )
    power = 1 if policy.criterion == "l1" else 2
    total = np.zeros(coupled.channels)
    for name in coupled.producers:
        total += (np.abs(weights[name].astype(np.float64)) ** power).reshape(coupled.channels, -1).sum(axis=1)
    return total


def _cut(module: IRModule, sets: list[CoupledSet], kept: Mapping[str, tuple[int, ...]]) -> IRModule:
    params = get_params(module)
    masks: dict[tuple[str, int], np.ndarray] = {}
    for coupled in sets:
        if coupled.name not in kept:
            continue
        gone = np.setdiff1d(np.arange(coupled.channels), kept[coupled.name])
        for cut in coupled.cuts:
            key = cut.parameter, cut.axis
            mask = masks.setdefault(key, np.ones(params[cut.parameter].shape[cut.axis], bool))
            block = np.arange(cut.repeat)
            mask[(cut.offset + gone[:, None] * cut.repeat + block).reshape(-1)] = False
    for (name, axis), mask in masks.items():
        params[name] = np.compress(mask, params[name], axis=axis)
    return with_main(module, with_values(_retype(module["main"], params), list(params.values())))


def _retype(function: relax.Function, params: Mapping[str, np.ndarray]) -> relax.Function:
    """Build the function again on parameters of these shapes; every type is inferred anew."""
    replaced: dict[relax.Var, relax.Expr] = {var: var for var in function.params}
    for var in parameter_vars(function):
        replaced[var] = relax.Var(var.name, relax.TensorType(params[var.name].shape, var.ty.dtype))
    builder = relax.BlockBuilder()
    with builder.function("main", [replaced[var] for var in function.params]):
        with builder.dataflow():
            for var, value in bindings(function):
                expr = _with_groups(substitute(value, replaced))
                replaced[var] = builder.emit(expr, name_hint=var.name)
            output = builder.emit_output(substitute(function.body.body, replaced))
        builder.emit_func_output(output)
    pruned = relax.transform.CanonicalizeBindings()(builder.finalize())["main"]
    return pruned.with_attrs(dict(function.attrs))


def _with_groups(expr: relax.Expr) -> relax.Expr:
    """Give a depthwise convolution as many groups as it has channels now; anything else stays."""
    if operator(expr) != "relax.nn.conv2d" or expr.attrs.groups == 1:
        return expr
    channels, per_group = static_shape(expr.args[1])[:2]
    if per_group != 1 or static_shape(expr.args[0])[3] != channels:
        return expr
    attrs = expr.attrs
    return relax.op.nn.conv2d(
        *expr.args,
        strides=list(attrs.strides),
        padding=list(attrs.padding),
        dilation=list(attrs.dilation),
        groups=channels,
        data_layout=attrs.data_layout,
        kernel_layout=attrs.kernel_layout,
        out_layout=attrs.out_layout,
        out_dtype=attrs.out_dtype,
    )
