"""EqualizeChannels: share the ranges of weights between layers that follow each other."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import tvm
from tvm import IRModule, relax

from tvm_compress.passes.annotate_quantization import SiteCall, count_uses, site_calls
from tvm_compress.passes.graph import bindings, operator, tensors
from tvm_compress.passes.module_pass import ModulePass
from tvm_compress.passes.params import get_params, require_stage, set_params

# A chain of n layers converges as slowly as heat spreads along it; real ones are there long before.
MAX_SWEEPS = 200
# Factors that are this near to 1 end the sweeps.
_SETTLED = 1e-4

# What may stand between two layers: f(s x) = s f(x) for s > 0, channel by channel.
_HOMOGENEOUS = ("relax.nn.relu",)
_POOLING = ("relax.nn.max_pool2d", "relax.nn.avg_pool2d", "relax.mean")

# The bindings that read a tensor.
_Readers: TypeAlias = dict[relax.Expr, list[tuple[relax.Var, relax.Expr]]]


@tvm.transform.module_pass(opt_level=0, name="tvm_compress.EqualizeChannels")
class EqualizeChannels(ModulePass):
    """Scale channels between pairs of layers, so that both have equal weight ranges: the stage stays float.

    Where one layer's output goes to one other layer only, through operators that commute with positive
    factors (ReLU, pooling, global average, flatten), output channel i of the first may be divided by any
    s_i > 0 if the second's weights for channel i are multiplied by it. With r1, r2 the largest |w| of
    channel i in the first (its batch norm folded) and the second, s_i = sqrt(r1 / r2) makes both
    sqrt(r1 r2) (Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction",
    section 4.1). Pairs are swept until nothing moves. The function stays the same. ReLU6 and other
    activations that are not homogeneous end a chain, so do branches; a channel without weights on one side
    stays as it is.

    Differences from the paper: batch norm stays unfolded (its weight and bias are divided), a depthwise
    layer between two others is the second of one pair and the first of the next, not a special case.
    """

    def transform_module(self, module: IRModule, _: tvm.transform.PassContext) -> IRModule:
        """Return the module with other parameter values."""
        require_stage(module, "float", what="EqualizeChannels")
        params = get_params(module)
        pairs, ranges = find_pairs(module, params)
        return set_params(module, _equalized(pairs, ranges, params)) if pairs else module


@dataclass(frozen=True)
class Pair:
    """Two layers of which the second alone reads what the first gives.

    Attributes
    ----------
    first, second
        Names of the weight parameters.
    divided
        Parameters to divide by s, by output channel of the first on axis 0: weight and bias, or those of the
        batch norm.
    channels
        int [I]: the first's output channel that each input feature of the second belongs to.
    groups
        Of the second.
    """

    first: str
    second: str
    divided: tuple[str, ...]
    channels: np.ndarray
    groups: int


def find_pairs(
    module: IRModule, params: Mapping[str, np.ndarray]
) -> tuple[list[Pair], dict[str, np.ndarray]]:
    """Find the pairs of a float module, in order of the first's execution, and the layers' ranges.

    Ranges are the largest |w| [O, I per group] of each weight parameter, the batch norm after it folded.
    """
    function = module["main"]
    readers: _Readers = defaultdict(list)
    for var, value in bindings(function):
        for arg in tensors(value):
            readers[arg].append((var, value))
    calls = site_calls(function)
    shared = Counter(call.weight for call in calls)
    layers = {call.output: call for call in calls if shared[call.weight] == 1}
    uses = count_uses(function)
    pairs, ranges = [], {}
    for call in layers.values():
        walk = _Walk(call, params)
        pair = walk.run(readers, uses, layers)
        weight = np.abs(params[call.weight.name].astype(np.float64))
        ranges[call.weight.name] = walk.norm[:, None] * weight.reshape(*weight.shape[:2], -1).max(axis=2)
        if pair is not None:
            pairs.append(pair)
    return pairs, ranges


class _Walk:
    """Follows a layer's output to the layer that reads it.

    `norm` is what the batch norm after the layer multiplies each channel by, in magnitude, [O].
    """

    def __init__(self, first: SiteCall, params: Mapping[str, np.ndarray]) -> None:
        self.first, self.params = first, params
        self.divided: tuple[str, ...] = (first.weight.name,)
        self.size = params[first.weight.name].shape[0]
        self.norm = np.ones(self.size)
        shape = [int(extent) for extent in first.output.ty.shape][1:]
        # Which channel each element of the tensor belongs to.
        self.channels = np.broadcast_to(np.arange(self.size), shape)
        self.activated = False

    def run(
        self, readers: _Readers, uses: Counter[relax.Expr], layers: Mapping[relax.Var, SiteCall]
    ) -> Pair | None:
        """Give the pair that the layer is the first of, if there is one."""
        var = self.first.output
        while uses[var] == 1 and len(readers[var]) == 1:
            after, value = readers[var][0]
            if after in layers:
                groups = int(value.attrs.groups) if operator(value) == "relax.nn.conv2d" else 1
                # Images have their channels last, the same at every place.
                features = self.channels.reshape(-1, self.channels.shape[-1])[0]
                second = layers[after].weight.name
                return Pair(self.first.weight.name, second, self.divided, features, groups)
            if not self._pass(var, value):
                return None
            var = after
        return None

    def _pass(self, var: relax.Var, value: relax.Expr) -> bool:
        """Whether the channels can be followed through what reads them."""
        if isinstance(value, relax.TupleGetItem):
            return value.index == 0
        name = operator(value)
        if name == "relax.add":
            return self._bias(var, value)
        if name == "relax.nn.batch_norm":
            return self._batch_norm(value)
        shape = [int(extent) for extent in value.ty.shape][1:] if hasattr(value.ty, "shape") else []
        if name in _HOMOGENEOUS:
            self.activated = True
        elif name in _POOLING and self._is_image():
            if name == "relax.mean" and [int(axis) for axis in value.attrs.axis or []] != [1, 2]:
                return False
            self.channels = np.broadcast_to(self.channels[0, 0], shape)
            self.activated = True
        elif name == "relax.permute_dims":
            axes = [int(axis) for axis in value.attrs.axes or reversed(range(self.channels.ndim + 1))]
            if axes[0] != 0:
                return False
            self.channels = self.channels.transpose([axis - 1 for axis in axes[1:]])
        elif name in ("relax.nn.batch_flatten", "relax.reshape"):
            self.channels = self.channels.reshape(shape)
        else:
            return False
        return True

    def _is_image(self) -> bool:
        return self.channels.ndim == 3 and np.array_equal(self.channels[0, 0], np.arange(self.size))

    def _bias(self, var: relax.Var, value: relax.Call) -> bool:
        other = value.args[1] if value.args[0] == var else value.args[0]
        name = getattr(other, "name", "")
        # A bias behind an activation could be divided too, but nothing exports so.
        if self.activated or name not in self.params or self.params[name].shape != (self.size,):
            return False
        self.divided = (*self.divided, name)
        return True

    def _batch_norm(self, value: relax.Call) -> bool:
        names = [getattr(arg, "name", "") for arg in value.args[1:]]
        last = len(value.args[0].ty.shape) - 1
        scaled = value.attrs.scale and value.attrs.center and int(value.attrs.axis) == last
        if self.activated or not scaled or any(name not in self.params for name in names):
            return False
        gamma, beta, _, variance = names
        deviation = np.sqrt(self.params[variance].astype(np.float64) + float(value.attrs.epsilon))
        self.norm = self.norm * np.abs(self.params[gamma]) / deviation
        self.divided = (gamma, beta)
        return True


def _equalized(
    pairs: Sequence[Pair], ranges: Mapping[str, np.ndarray], params: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Give the changed parameters."""
    ranges = dict(ranges)
    factors = {pair.first: np.ones(params[pair.first].shape[0]) for pair in pairs}
    for _ in range(MAX_SWEEPS):
        moved = 0.0
        for pair in pairs:
            step = _step(pair, ranges)
            factors[pair.first] *= step
            ranges[pair.first] = ranges[pair.first] / step[:, None]
            ranges[pair.second] = ranges[pair.second] * _by_input(step, pair, ranges[pair.second])
            moved = max(moved, float(np.abs(np.log(step)).max()))
        if moved < _SETTLED:
            break
    names = {name for pair in pairs for name in (pair.second, *pair.divided)}
    changed = {name: params[name].astype(np.float64) for name in names}
    for pair in pairs:
        factor = factors[pair.first]
        for name in pair.divided:
            changed[name] /= factor.reshape(-1, *[1] * (changed[name].ndim - 1))
        changed[pair.second] *= _by_input(factor, pair, changed[pair.second])
    return {name: value.astype(np.float32) for name, value in changed.items()}


def _step(pair: Pair, ranges: Mapping[str, np.ndarray]) -> np.ndarray:
    """Give the factor [O] that makes the pair's ranges equal."""
    first = ranges[pair.first].max(axis=1)
    second = ranges[pair.second]
    by_feature = second.reshape(pair.groups, -1, second.shape[1]).max(axis=1).reshape(-1)
    other = np.zeros(first.shape)
    np.maximum.at(other, pair.channels, by_feature)
    alive = (first > 0) & (other > 0)
    return np.where(alive, np.sqrt(first / np.where(alive, other, 1)), 1.0)


def _by_input(factor: np.ndarray, pair: Pair, weight: np.ndarray) -> np.ndarray:
    """View a factor for each channel [O of the first] as one for each weight of the second."""
    of_feature = factor[pair.channels].reshape(pair.groups, -1)
    rows = np.repeat(of_feature, weight.shape[0] // pair.groups, axis=0)
    return rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))
