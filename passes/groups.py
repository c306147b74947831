"""Channel dependency analysis: which channels must be removed together, and from which parameters."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tvm import IRModule, relax

from tvm_compress.passes.graph import bindings, definitions, operator, tensors, weight_parameter
from tvm_compress.passes.params import parameter_vars
from tvm_compress.passes.sites import Site, make_site
from tvm_compress.schedules.ops import static_shape


@dataclass(frozen=True)
class Cut:
    """One axis of a parameter that holds a coupled set's channels.

    Channel c stands at positions `offset + c * repeat` to `offset + (c + 1) * repeat - 1`: `repeat` is more
    than 1 after a flatten, which gives each channel a block, and `offset` more than 0 after a concatenation.
    """

    parameter: str
    axis: int
    repeat: int = 1
    offset: int = 0


@dataclass(frozen=True)
class CoupledSet:
    """Channels that must be removed together.

    Parameters
    ----------
    name
        The first producing site.
    channels
        How many channels the set has; each producer has as many output channels.
    producers
        The sites whose output channels these are, in order of execution.
    cuts
        Every parameter axis that loses something with a channel.
    prunable, reason
        Whether channels can be removed and, where not, why.
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    cuts: tuple[Cut, ...]
    prunable: bool
    reason: str = ""


def round_channels(wanted: float, total: int, multiple: int = 1) -> int:
    """Round a wanted channel count up to a multiple, never above the total and never to 0.

    Raises
    ------
    ValueError
        Where total or multiple is below 1, or wanted is not finite.
    """
    if total < 1 or multiple < 1 or not math.isfinite(wanted):
        raise ValueError(f"cannot round {wanted} of {total} channels to a multiple of {multiple}")
    return min(total, max(1, math.ceil(wanted / multiple)) * multiple)


def find_coupled_sets(module: IRModule) -> list[CoupledSet]:
    """Give the coupled sets of a float module in order of execution; each site produces exactly one of them.

    The identity of channels is followed forward from the site that makes them: operators that work channel by
    channel pass it on, additions unite it, a flatten gives each channel a block, a concatenation sets
    channels side by side. Where that cannot be followed, the set is frozen, with the reason.
    """
    function = module["main"]
    analysis = _Analysis(function)
    for var, value in bindings(function):
        analysis.visit(var, value)
    for expr in tensors(function.body.body):
        analysis.freeze(analysis.channels_of(expr), "these are the network's outputs")
    return analysis.result()


@dataclass(frozen=True)
class _Channels:
    """Which channels stand along one axis of a tensor: (set, repeat) after (set, repeat)."""

    axis: int
    parts: tuple[tuple[int, int], ...]


@dataclass
class _Set:
    channels: int
    reason: str = ""
    producers: list[str] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)


_PASSED_ON = frozenset(
    "relax." + name
    for name in ("nn.relu", "clip", "sigmoid", "tanh", "nn.silu", "nn.max_pool2d", "nn.avg_pool2d")
)
_BINARY = frozenset(
    "relax." + name for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum")
)


class _Analysis:
    """Follows channels through one function; sets are united as in union-find."""

    def __init__(self, function: relax.Function) -> None:
        self._function = function
        self._defined = definitions(function)
        self._parameters = set(parameter_vars(function))
        self._tensors: dict[relax.Var, _Channels] = {}
        self._sets: list[_Set] = []
        self._parent: list[int] = []
        self._rules: dict[str, Callable[[relax.Call], _Channels | None]] = {
            "relax.nn.conv2d": self._conv2d,
            "relax.matmul": self._matmul,
            "relax.nn.batch_norm": self._batch_norm,
            "relax.permute_dims": self._permute_dims,
            "relax.mean": self._mean,
            "relax.nn.batch_flatten": self._batch_flatten,
            "relax.expand_dims": self._expand_dims,
            "relax.concat": self._concat,
            **dict.fromkeys(_PASSED_ON, lambda call: self.channels_of(call.args[0])),
            **dict.fromkeys(_BINARY, self._binary),
        }
        for var in function.params:
            if var not in self._parameters:
                self._tensors[var] = self._inputs(var)

    def _inputs(self, var: relax.Var) -> _Channels:
        shape = static_shape(var)
        axis = min(1, len(shape) - 1)
        return _Channels(axis, ((self._new(shape[axis], "these are the network's inputs"), 1),))

    # Sets.

    def _new(self, channels: int, reason: str = "") -> int:
        self._sets.append(_Set(channels, reason))
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def _find(self, index: int) -> int:
        while self._parent[index] != index:
            index = self._parent[index]
        return index

    def _unite(self, a: int, b: int) -> None:
        first, second = sorted((self._find(a), self._find(b)))
        if first == second:
            return
        kept, gone = self._sets[first], self._sets[second]
        assert kept.channels == gone.channels
        kept.producers += gone.producers
        kept.cuts += gone.cuts
        kept.reason = kept.reason or gone.reason
        self._parent[second] = first

    def freeze(self, channels: _Channels | None, reason: str) -> None:
        """Forbid pruning of every set that these channels belong to; the first reason stays."""
        for index, _ in channels.parts if channels else ():
            one = self._sets[self._find(index)]
            one.reason = one.reason or reason

    def _cut(self, parameter: relax.Var, axis: int, channels: _Channels) -> None:
        offset = 0
        for index, repeat in channels.parts:
            one = self._sets[self._find(index)]
            one.cuts.append(Cut(parameter.name, axis, repeat, offset))
            offset += one.channels * repeat
        assert offset == static_shape(parameter)[axis], (
            f"{parameter.name}: {offset} channels along axis {axis}"
        )

    def result(self) -> list[CoupledSet]:
        """Give the sets that a site produces; sets stand in order of their first site."""
        found = []
        for index, one in enumerate(self._sets):
            if self._find(index) != index or not one.producers:
                continue
            reason = one.reason or ("it has a single channel" if one.channels == 1 else "")
            cuts = tuple(dict.fromkeys(one.cuts))
            producers = tuple(one.producers)
            found.append(CoupledSet(producers[0], one.channels, producers, cuts, not reason, reason))
        return found

    # Operators.

    def channels_of(self, expr: relax.Expr) -> _Channels | None:
        """Give what is known of a tensor's channels; None for parameters and constants."""
        return self._tensors.get(expr) if isinstance(expr, relax.Var) else None

    def visit(self, var: relax.Var, value: relax.Expr) -> None:
        """Follow one binding."""
        if isinstance(value, relax.TupleGetItem):
            value = value.tuple_value
        if isinstance(value, relax.Var):
            channels = self.channels_of(value)
        elif operator(value) in self._rules:
            channels = self._rules[operator(value)](value)
        else:
            channels = None
            for argument in tensors(value):
                self.freeze(
                    self.channels_of(argument), f"{operator(value) or 'an expression'} cannot be followed"
                )
        if channels is not None:
            self._tensors[var] = channels

    def _freeze_call(self, call: relax.Call) -> _Channels | None:
        """Freeze all that a call reads; its result is unknown."""
        for argument in tensors(call):
            self.freeze(self.channels_of(argument), f"{operator(call)} mixes these channels")
        return None

    def _site(self, call: relax.Call) -> tuple[Site, relax.Var] | None:
        weight = weight_parameter(call.args[1], self._defined, self._function)
        return None if weight is None else (make_site(call, weight), weight)

    def _produce(self, site: Site, weight: relax.Var, axis: int, reason: str = "") -> _Channels:
        channels = _Channels(axis, ((self._new(site.out_channels, reason), 1),))
        self._cut(weight, 0, channels)
        self._sets[-1].producers.append(site.name)
        return channels

    def _conv2d(self, call: relax.Call) -> _Channels | None:
        found = self._site(call)
        if found is None:
            return self._freeze_call(call)
        site, weight = found
        data = self._read(call, 3)
        if site.groups == 1:
            if data is not None:
                self._cut(weight, 1, data)
            return self._produce(site, weight, 3)
        if site.groups == site.in_channels == site.out_channels and data is not None:
            made = self._produce(site, weight, 3)
            return self._align(made, data, f"the depthwise convolution {site.name} joins them out of line")
        reason = f"{site.name} is a grouped convolution"
        self.freeze(data, reason)
        return self._produce(site, weight, 3, reason)

    def _matmul(self, call: relax.Call) -> _Channels | None:
        found = self._site(call)
        if found is None:
            return self._freeze_call(call)
        last = len(call.ty.shape) - 1
        data = self._read(call, last)
        if data is not None:
            self._cut(found[1], 1, data)
        return self._produce(*found, last)

    def _read(self, call: relax.Call, axis: int) -> _Channels | None:
        """Give the channels that a site reads along an axis; frozen and None where they stand elsewhere."""
        data = self.channels_of(call.args[0])
        if data is None or data.axis == axis:
            return data
        return self._freeze_call(call)

    def _align(self, a: _Channels, b: _Channels, reason: str) -> _Channels:
        """Unite two tensors' channels one by one, or freeze both where they do not stand in line."""
        sizes = [[(self._sets[self._find(i)].channels, repeat) for i, repeat in one.parts] for one in (a, b)]
        if a.axis == b.axis and sizes[0] == sizes[1]:
            for (left, _), (right, _) in zip(a.parts, b.parts, strict=True):
                self._unite(left, right)
        else:
            self.freeze(a, reason)
            self.freeze(b, reason)
        return a

    def _binary(self, call: relax.Call) -> _Channels | None:
        known = [(arg, self.channels_of(arg)) for arg in call.args]
        data = [(arg, channels) for arg, channels in known if channels is not None]
        if len(data) == 2:
            return self._binary_of_tensors(call, data)
        if not data:
            return None
        other = next(arg for arg, channels in known if channels is None)
        shape, channels = static_shape(other), data[0][1]
        axis = channels.axis - len(call.ty.shape) + len(shape)
        if axis >= 0 and shape[axis] > 1:
            if other not in self._parameters:
                self.freeze(channels, "a constant is bound to these channels")
            else:
                self._cut(other, axis, channels)
        return channels

    def _binary_of_tensors(
        self, call: relax.Call, data: Sequence[tuple[relax.Expr, _Channels]]
    ) -> _Channels | None:
        (a, left), (b, right) = data
        if len(a.ty.shape) != len(b.ty.shape) or left.axis != right.axis:
            return self._freeze_call(call)
        extents = [int(arg.ty.shape[left.axis]) for arg in (a, b)]
        if extents[0] != extents[1]:
            # One value for all channels, such as a spatial attention map.
            wide, narrow = (left, right) if extents[0] > extents[1] else (right, left)
            self.freeze(narrow, f"{operator(call)} spreads it over other channels")
            return wide
        return self._align(left, right, f"{operator(call)} joins channels that do not stand in line")

    def _batch_norm(self, call: relax.Call) -> _Channels | None:
        channels = self.channels_of(call.args[0])
        if channels is None or channels.axis != int(call.attrs.axis):
            return self._freeze_call(call)
        for argument in call.args[1:]:
            if argument in self._parameters:
                self._cut(argument, 0, channels)
            else:
                self.freeze(channels, "batch norm has constants instead of parameters")
        return channels

    def _permute_dims(self, call: relax.Call) -> _Channels | None:
        channels = self.channels_of(call.args[0])
        if channels is None:
            return None
        rank = len(call.ty.shape)
        axes = (
            list(range(rank))[::-1] if call.attrs.axes is None else [int(a) % rank for a in call.attrs.axes]
        )
        return _Channels(axes.index(channels.axis), channels.parts)

    def _mean(self, call: relax.Call) -> _Channels | None:
        channels = self.channels_of(call.args[0])
        rank = len(call.args[0].ty.shape)
        axes = range(rank) if call.attrs.axis is None else [int(axis) % rank for axis in call.attrs.axis]
        if channels is None or channels.axis in axes:
            return self._freeze_call(call)
        gone = 0 if call.attrs.keepdims else sum(axis < channels.axis for axis in axes)
        return _Channels(channels.axis - gone, channels.parts)

    def _batch_flatten(self, call: relax.Call) -> _Channels | None:
        channels = self.channels_of(call.args[0])
        shape = static_shape(call.args[0])
        if channels is None or math.prod(shape[1 : channels.axis]) != 1:
            return self._freeze_call(call)
        block = math.prod(shape[channels.axis + 1 :])
        return _Channels(1, tuple((index, repeat * block) for index, repeat in channels.parts))

    def _expand_dims(self, call: relax.Call) -> _Channels | None:
        channels = self.channels_of(call.args[0])
        if channels is None:
            return None
        rank = len(call.ty.shape)
        added = {int(axis) % rank for axis in call.attrs.axis}
        return _Channels([axis for axis in range(rank) if axis not in added][channels.axis], channels.parts)

    def _concat(self, call: relax.Call) -> _Channels | None:
        tracked = [self.channels_of(argument) for argument in tensors(call)]
        known = [one for one in tracked if one is not None]
        axis = int(call.attrs.axis) % len(call.ty.shape)
        if len(known) != len(tracked) or len({one.axis for one in known}) != 1:
            return self._freeze_call(call)
        if known[0].axis == axis:
            return _Channels(axis, tuple(part for one in known for part in one.parts))
        for other in known[1:]:
            self._align(known[0], other, "a concatenation joins channels that do not stand in line")
        return known[0]
