"""How each imported operator becomes canonical ones: the table that Canonicalize reads."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import relax

from tvm_compress.passes.canonical_values import Array, Builder, Tensor, Value, channels_last
from tvm_compress.passes.sites import site_name


class Unsupported(Exception):
    """Why an operator cannot be taken as it stands; Canonicalize adds the operator's name and place."""


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise Unsupported("it is computed from parameters alone")
    return value


def _array(value: Any, what: str) -> Array:
    if not isinstance(value, Array):
        raise Unsupported(f"its {what} must be parameters, but are computed from the input")
    return value


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]


def _axes(values: Any, rank: int) -> list[int]:
    return [int(value) % rank for value in values]


def _spatial(value: Value, layout: str) -> tuple[Tensor, tuple[int, ...]]:
    """Give a 4-D tensor with the order of its axes that is NHWC."""
    value = _tensor(value)
    if len(value.shape) != 4 or sorted(layout) != sorted("NCHW"):
        raise Unsupported(f"layout {layout}, {len(value.shape)} axes; images with 4 axes are needed")
    return value, tuple(layout.index(axis) for axis in "NHWC")


def _conv2d(build: Builder, call: relax.Call, data: Value, weight: Value) -> Tensor:
    attrs = call.attrs
    value, order = _spatial(data, attrs.data_layout)
    if attrs.out_layout not in ("", attrs.data_layout):
        raise Unsupported(f"output layout {attrs.out_layout}")
    array = _array(weight, "weights")
    if attrs.kernel_layout != "OIHW":
        array = Array(array.value.transpose([attrs.kernel_layout.index(a) for a in "OIHW"]), array.name)
    parameter = build.parameter(array, f"conv2d_{build.number('conv2d')}.weight")
    made = build.tensor(
        relax.op.nn.conv2d(
            build.ordered(value, order),
            parameter,
            strides=_ints(attrs.strides),
            padding=_ints(attrs.padding),
            dilation=_ints(attrs.dilation),
            groups=int(attrs.groups),
            data_layout="NHWC",
            kernel_layout="OIHW",
        ),
        order,
    )
    return _site(build, made, parameter)


def _site(build: Builder, made: Tensor, parameter: relax.Var) -> Tensor:
    build.last_site = build.note(made.expr).site = site_name(parameter.name)
    return made


def _matmul(build: Builder, call: relax.Call, data: Value, weight: Value) -> Tensor:
    del call
    value, array = _tensor(data), _array(weight, "second argument")
    if len(value.shape) != 2 or len(array.shape) != 2:
        raise Unsupported(f"it multiplies shapes {value.shape} and {array.shape}; 2 axes each are needed")
    transposed = Array(array.value.T, array.name)
    parameter = build.parameter(transposed, f"dense_{build.number('dense')}.weight")
    weights = build.emit(relax.op.permute_dims(parameter))
    return _site(
        build, build.tensor(relax.op.matmul(build.ordered(value, (0, 1)), weights), (0, 1)), parameter
    )


def _batch_norm(
    build: Builder, call: relax.Call, data: Value, *statistics: Value
) -> tuple[Tensor, None, None]:
    value, attrs = _tensor(data), call.attrs
    if attrs.training:
        raise Unsupported("it is in training mode; export the model after .eval()")
    axis = int(attrs.axis) % len(value.shape)
    gamma, beta, mean, variance = (_array(one, "statistics") for one in statistics)
    ones = np.ones_like(gamma.value)
    gamma = gamma if attrs.scale else Array(ones)
    beta = beta if attrs.center else Array(np.zeros_like(ones))
    base = mean.name.removesuffix("running_mean").rstrip("._") if mean.name.endswith("running_mean") else ""
    base = base or f"batch_norm_{build.number('batch_norm')}"
    scale = build.parameter(gamma, f"{base}.weight")
    base = site_name(scale.name)
    rest = [
        build.parameter(array, f"{base}.{role}")
        for array, role in ((beta, "bias"), (mean, "running_mean"), (variance, "running_var"))
    ]
    order = channels_last(len(value.shape), axis)
    if axis in value.axes:
        order = tuple(a for a in order if a in value.axes)
    made = build.emit(
        relax.op.nn.batch_norm(
            build.ordered(value, order),
            scale,
            *rest,
            axis=len(order) - 1,
            # ONNX stores it as float32: the same network has the same number by either way.
            epsilon=float(str(np.float32(attrs.epsilon))),
            momentum=0.1,
            training=False,
        )
    )
    return Tensor(build.emit(relax.TupleGetItem(made, 0)), order, value.shape), None, None


def _clip(build: Builder, call: relax.Call, data: Value, low: Any, high: Any) -> Tensor:
    del call
    return _clipped(build, _tensor(data), _number(low), _number(high))


def _number(value: Any) -> float:
    if isinstance(value, Array):
        if value.value.size != 1:
            raise Unsupported("its bounds are not numbers")
        return float(value.value.reshape(()))
    return float(getattr(value, "value", value))


def _clipped(build: Builder, value: Tensor, low: float, high: float) -> Tensor:
    """Emit the simplest operator that clips to a range, in one with what the tensor was clipped to before."""
    before = build.note(value.expr).clipped
    if before is not None and max(low, before[1]) <= min(high, before[2]):
        source, low, high = before[0], max(low, before[1]), min(high, before[2])
        # The tensor may have been given another shape since.
        value = Tensor(source.expr, value.axes, value.shape)
    if (low, high) == (-math.inf, math.inf):
        return value
    expr = relax.op.nn.relu(value.expr) if (low, high) == (0.0, math.inf) else None
    made = build.like(expr if expr is not None else relax.op.clip(value.expr, low, high), value)
    build.note(made.expr).clipped = (value, low, high)
    return made


def _relu(build: Builder, call: relax.Call, data: Value) -> Tensor:
    del call
    return _clipped(build, _tensor(data), 0.0, math.inf)


def _relu6(build: Builder, call: relax.Call, data: Value) -> Tensor:
    del call
    return _clipped(build, _tensor(data), 0.0, 6.0)


def _unary(make: Callable[[relax.Expr], relax.Expr]) -> Callable[[Builder, relax.Call, Value], Tensor]:
    def handle(build: Builder, call: relax.Call, data: Value) -> Tensor:
        del call
        value = _tensor(data)
        return build.like(make(value.expr), value)

    return handle


def _along_axis(make: Callable[..., relax.Expr]) -> Callable[[Builder, relax.Call, Value], Tensor]:
    def handle(build: Builder, call: relax.Call, data: Value) -> Tensor:
        value = _tensor(data)
        axis = int(call.attrs.axis) % len(value.shape)
        order = value.axes if axis in value.axes else tuple(range(len(value.shape)))
        return Tensor(
            build.emit(make(build.ordered(value, order), axis=order.index(axis))), order, value.shape
        )

    return handle


def _binary(make: Callable[[relax.Expr, relax.Expr], relax.Expr], commutes: bool) -> Callable[..., Tensor]:
    name = make.__name__

    def handle(build: Builder, call: relax.Call, left: Value, right: Value) -> Tensor:
        del call
        if isinstance(left, Tensor) and isinstance(right, Tensor):
            return _binary_of_tensors(build, make, left, right)
        value, array = (left, right) if isinstance(left, Tensor) else (right, left)
        assert isinstance(value, Tensor)
        array = _array(array, "second argument")
        order, operand = _operand(build, name, value, array)
        expr = build.ordered(value, order)
        if commutes or value is left:
            return Tensor(build.emit(make(expr, operand)), order, value.shape)
        return Tensor(build.emit(make(operand, expr)), order, value.shape)

    return handle


def _binary_of_tensors(
    build: Builder, make: Callable[[relax.Expr, relax.Expr], relax.Expr], left: Tensor, right: Tensor
) -> Tensor:
    if len(left.shape) != len(right.shape):
        raise Unsupported(f"it joins shapes {left.shape} and {right.shape}")
    # The layout of the input is the source's, that of everything else is ours: ours is kept.
    leader = right if left.expr in build.inputs or len(right.axes) > len(left.axes) else left
    order = leader.axes
    if not set(left.axes) | set(right.axes) <= set(order):
        order = tuple(range(len(left.shape)))
    made = build.emit(make(build.ordered(left, order), build.ordered(right, order)))
    shape = tuple(max(a, b) for a, b in zip(left.shape, right.shape, strict=True))
    return Tensor(made, order, shape)


def _operand(build: Builder, name: str, value: Tensor, array: Array) -> tuple[tuple[int, ...], relax.Expr]:
    """Give the order of axes to compute in, and a parameter (or a scalar constant) that fits it.

    A vector over channels becomes 1-D, with the channels last.
    """
    rank = len(value.shape)
    if array.value.size == 1 and not array.name:
        return value.axes, relax.const(array.value.reshape(()), str(array.value.dtype))
    if len(array.shape) > rank:
        raise Unsupported(f"it joins shapes {value.shape} and {array.shape}")
    aligned = array.value.reshape((1,) * (rank - len(array.shape)) + array.shape)
    if any(a not in (1, b) for a, b in zip(aligned.shape, value.shape, strict=True)):
        raise Unsupported(f"it joins shapes {value.shape} and {array.shape}")
    wide = [axis for axis in range(rank) if aligned.shape[axis] > 1]
    if 0 in wide:
        raise Unsupported(f"a parameter of shape {array.shape} holds the batch")
    order = value.axes
    if len(wide) == 1 and (wide[0] != order[-1]):
        order = channels_last(rank, wide[0])
    elif not set(wide) <= set(order):
        order = tuple(range(rank))
    value_array = aligned.transpose([*order, *(a for a in range(rank) if a not in order)])
    value_array = value_array.reshape([aligned.shape[axis] for axis in order])
    if len(wide) <= 1:
        value_array = value_array.reshape([aligned.shape[axis] for axis in wide])
    site = build.note(value.expr).site
    derived = f"{site}.bias" if site and name == "add" else f"{name}_{build.number(name)}.value"
    return order, build.parameter(Array(value_array, array.name), derived)


def _pool(make: Callable[..., relax.Expr]) -> Callable[[Builder, relax.Call, Value], Tensor]:
    def handle(build: Builder, call: relax.Call, data: Value) -> Tensor:
        attrs = call.attrs
        value, order = _spatial(data, attrs.layout)
        if attrs.out_layout not in ("", attrs.layout):
            raise Unsupported(f"output layout {attrs.out_layout}")
        pooled = make(
            build.ordered(value, order),
            pool_size=_ints(attrs.pool_size),
            strides=_ints(attrs.strides),
            padding=_ints(attrs.padding),
            dilation=_ints(attrs.dilation),
            ceil_mode=bool(attrs.ceil_mode),
            count_include_pad=bool(attrs.count_include_pad),
            layout="NHWC",
        )
        return build.tensor(pooled, order)

    return handle


def _adaptive_avg_pool2d(build: Builder, call: relax.Call, data: Value) -> Tensor:
    value, order = _spatial(data, call.attrs.layout)
    size = [value.shape[axis] for axis in order[1:3]]
    wanted = size if call.attrs.output_size is None else _ints(call.attrs.output_size)
    wanted = wanted * 2 if len(wanted) == 1 else wanted
    if wanted == [1, 1]:
        return _average(build, value, order, keepdims=True)
    if wanted == size:
        return value
    if any(a % b for a, b in zip(size, wanted, strict=True)):
        raise Unsupported(f"an image of {size} does not divide into {wanted}")
    window = [a // b for a, b in zip(size, wanted, strict=True)]
    pooled = relax.op.nn.avg_pool2d(build.ordered(value, order), window, window, layout="NHWC")
    return build.tensor(pooled, order)


def _mean(build: Builder, call: relax.Call, data: Value) -> Tensor:
    value = _tensor(data)
    rank = len(value.shape)
    axes = list(range(rank)) if call.attrs.axis is None else _axes(call.attrs.axis, rank)
    if rank != 4 or len(axes) != 2 or 0 in axes:
        raise Unsupported(f"it averages axes {axes} of {rank}; height and width of an image are needed")
    kept = next(axis for axis in range(1, 4) if axis not in axes)
    return _average(build, value, channels_last(4, kept), bool(call.attrs.keepdims))


def _average(build: Builder, value: Tensor, order: Sequence[int], keepdims: bool) -> Tensor:
    """Emit R.mean over height and width; kept axes of extent 1 are bookkeeping only."""
    source = build.ordered(value, order)
    made = build.emit(relax.op.mean(source, axis=[1, 2], keepdims=False))
    build.note(made).averaged = source
    channels, batch = value.shape[order[-1]], value.shape[0]
    if not keepdims:
        return Tensor(made, (0, 1), (batch, channels))
    return Tensor(made, (0, order[-1]), tuple(1 if a in order[1:3] else e for a, e in enumerate(value.shape)))


def _reshaped(build: Builder, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Give the tensor another shape: as bookkeeping if only extents of 1 come and go, else by an operator."""
    if shape == value.shape:
        return value
    if not shape or shape[0] != value.shape[0]:
        raise Unsupported(f"it takes {value.shape} to {shape}; the first axis, the batch, must stay")
    renamed = _rename_axes(value, shape)
    if renamed is not None:
        return renamed
    rank = len(value.shape)
    if len(shape) == 2:
        # Where the extents other than 1 stand in the source's order anyway, there is nothing to transpose.
        wide = [axis for axis in value.axes if axis == 0 or value.shape[axis] > 1]
        expr = (
            value.expr if wide == sorted(wide) and len(value.axes) > 1 else build.ordered(value, range(rank))
        )
        return build.tensor(relax.op.nn.batch_flatten(expr), (0, 1))
    return build.tensor(relax.op.reshape(build.ordered(value, range(rank)), shape), range(len(shape)))


def _rename_axes(value: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """Give the tensor the new shape where that only inserts or removes extents of 1 that `expr` does not hold."""
    old = [axis for axis, extent in enumerate(value.shape) if axis == 0 or extent > 1]
    new = [axis for axis, extent in enumerate(shape) if axis == 0 or extent > 1]
    if [value.shape[axis] for axis in old] != [shape[axis] for axis in new]:
        return None
    names = dict(zip(old, new, strict=True))
    for axis in value.axes:
        if axis not in names:
            if axis >= len(shape) or shape[axis] != 1 or axis in names.values():
                return None
            names[axis] = axis
    return Tensor(value.expr, tuple(names[axis] for axis in value.axes), shape)


def _reshape(build: Builder, call: relax.Call, data: Value, shape: Any) -> Tensor:
    del shape
    return _reshaped(build, _tensor(data), tuple(_ints(call.ty.shape)))


def _batch_flatten(build: Builder, call: relax.Call, data: Value) -> Tensor:
    return _reshaped(build, _tensor(data), tuple(_ints(call.ty.shape)))


def _permute_dims(build: Builder, call: relax.Call, data: Value) -> Tensor:
    del build
    value = _tensor(data)
    rank = len(value.shape)
    axes = list(range(rank))[::-1] if call.attrs.axes is None else _axes(call.attrs.axes, rank)
    shape = tuple(value.shape[axis] for axis in axes)
    return Tensor(value.expr, tuple(axes.index(axis) for axis in value.axes), shape)


def _concat(build: Builder, call: relax.Call, parts: tuple[Value, ...]) -> Tensor:
    values = [_tensor(part) for part in parts]
    rank = len(values[0].shape)
    axis = int(call.attrs.axis) % rank
    leader = next((v for v in values if v.expr not in build.inputs), values[0])
    order = leader.axes if axis in leader.axes and len(leader.axes) == rank else tuple(range(rank))
    joined = relax.op.concat([build.ordered(value, order) for value in values], axis=order.index(axis))
    return build.tensor(joined, order)


def _dropout(build: Builder, call: relax.Call, data: Value) -> tuple[Value, None]:
    del build, call
    return data, None


def _astype(build: Builder, call: relax.Call, data: Value) -> Tensor:
    del build
    value = _tensor(data)
    if str(call.ty.dtype) != str(value.expr.ty.dtype):
        raise Unsupported(f"it casts {value.expr.ty.dtype} to {call.ty.dtype}")
    return value


def _bound(upper: bool) -> Callable[..., Tensor]:
    """Give the handler of maximum or minimum: clipping, where one side is a number."""
    general = _binary(relax.op.minimum if upper else relax.op.maximum, commutes=True)

    def handle(build: Builder, call: relax.Call, left: Value, right: Value) -> Tensor:
        value, other = (left, right) if isinstance(left, Tensor) else (right, left)
        if (
            isinstance(value, Tensor)
            and isinstance(other, Array)
            and other.value.size == 1
            and not other.name
        ):
            number = _number(other)
            return _clipped(build, value, *((-math.inf, number) if upper else (number, math.inf)))
        return general(build, call, left, right)

    return handle


def _view(change: Callable[[relax.Call, np.ndarray], np.ndarray]) -> Callable[..., Array]:
    """Fold an operator that only shows a parameter in another shape: its name stays."""

    def fold(call: relax.Call, array: Array, *_: Any) -> Array:
        return Array(change(call, array.value), array.name)

    return fold


def _to_shape(call: relax.Call, value: np.ndarray) -> np.ndarray:
    return value.reshape(_ints(call.ty.shape))


def _transpose(call: relax.Call, value: np.ndarray) -> np.ndarray:
    return value.transpose(None if call.attrs.axes is None else _ints(call.attrs.axes))


def _cast(call: relax.Call, value: np.ndarray) -> np.ndarray:
    return value.astype(str(call.ty.dtype))


def _computed(function: Callable[..., np.ndarray]) -> Callable[..., Array]:
    """Fold an operator on constants: what it gives has no name."""

    def fold(call: relax.Call, *arrays: Array) -> Array:
        return Array(np.asarray(function(*(array.value for array in arrays)), dtype=str(call.ty.dtype)))

    return fold


# Operators on parameters and constants alone, computed while reading.
FOLDED: dict[str, Callable[..., Array]] = {
    "relax.reshape": _view(_to_shape),
    "relax.squeeze": _view(_to_shape),
    "relax.expand_dims": _view(_to_shape),
    "relax.flatten": _view(_to_shape),
    "relax.permute_dims": _view(_transpose),
    "relax.astype": _view(_cast),
    "relax.add": _computed(np.add),
    "relax.subtract": _computed(np.subtract),
    "relax.multiply": _computed(np.multiply),
    "relax.divide": _computed(np.divide),
    "relax.maximum": _computed(np.maximum),
    "relax.minimum": _computed(np.minimum),
    "relax.sqrt": _computed(np.sqrt),
    "relax.isnan": _computed(np.isnan),
    "relax.where": _computed(np.where),
}

HANDLERS: dict[str, Callable[..., Any]] = {
    "relax.nn.conv2d": _conv2d,
    "relax.matmul": _matmul,
    "relax.nn.batch_norm": _batch_norm,
    "relax.clip": _clip,
    "relax.nn.relu": _relu,
    "relax.nn.relu6": _relu6,
    "relax.sigmoid": _unary(relax.op.sigmoid),
    "relax.tanh": _unary(relax.op.tanh),
    "relax.nn.silu": _unary(relax.op.nn.silu),
    "relax.nn.softmax": _along_axis(relax.op.nn.softmax),
    "relax.nn.log_softmax": _along_axis(relax.op.nn.log_softmax),
    "relax.add": _binary(relax.op.add, commutes=True),
    "relax.subtract": _binary(relax.op.subtract, commutes=False),
    "relax.multiply": _binary(relax.op.multiply, commutes=True),
    "relax.divide": _binary(relax.op.divide, commutes=False),
    "relax.maximum": _bound(upper=False),
    "relax.minimum": _bound(upper=True),
    "relax.nn.max_pool2d": _pool(relax.op.nn.max_pool2d),
    "relax.nn.avg_pool2d": _pool(relax.op.nn.avg_pool2d),
    "relax.nn.adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "relax.mean": _mean,
    "relax.reshape": _reshape,
    "relax.squeeze": _batch_flatten,
    "relax.expand_dims": _batch_flatten,
    "relax.flatten": _batch_flatten,
    "relax.nn.batch_flatten": _batch_flatten,
    "relax.permute_dims": _permute_dims,
    "relax.concat": _concat,
    "relax.nn.dropout": _dropout,
    "relax.astype": _astype,
}
