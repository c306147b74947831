"""How each imported operator becomes canonical ones: the table that Canonicalize reads."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from tvm_compress.passes import canonical_shapes
from tvm_compress.passes.canonical_values import (
    Array,
    Builder,
    Padded,
    Quantizer,
    Tensor,
    UnsupportedFormError,
    Value,
    as_array,
    as_tensor,
    channels_last,
    ints,
    spatial,
    without_padding,
)
from tvm_compress.passes.sites import site_name


def _conv2d(build: Builder, call: relax.Call, data: Value, weight: Value) -> Tensor:
    attrs = call.attrs
    data, around = without_padding(data, attrs.data_layout)
    value, order = spatial(data, attrs.data_layout)
    if attrs.out_layout not in ("", attrs.data_layout):
        raise UnsupportedFormError(f"output layout {attrs.out_layout}")
    array = as_array(weight, "weights")
    if attrs.kernel_layout != "OIHW":
        array = Array(array.value.transpose([attrs.kernel_layout.index(a) for a in "OIHW"]), array.name)
    parameter = build.parameter(array, f"conv2d_{build.number('conv2d')}.weight")
    made = build.tensor(
        relax.op.nn.conv2d(
            build.ordered(value, order),
            parameter,
            strides=ints(attrs.strides),
            padding=[own + zeros for own, zeros in zip(ints(attrs.padding), around, strict=True)],
            dilation=ints(attrs.dilation),
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
    value, array = as_tensor(data), as_array(weight, "second argument")
    if len(value.shape) != 2 or len(array.shape) != 2:
        shapes = f"{value.shape} and {array.shape}"
        raise UnsupportedFormError(f"it multiplies shapes {shapes}; 2 axes each are needed")
    transposed = Array(array.value.T, array.name)
    parameter = build.parameter(transposed, f"dense_{build.number('dense')}.weight")
    weights = build.emit(relax.op.permute_dims(parameter))
    return _site(
        build, build.tensor(relax.op.matmul(build.ordered(value, (0, 1)), weights), (0, 1)), parameter
    )


def _batch_norm(
    build: Builder, call: relax.Call, data: Value, *statistics: Value
) -> tuple[Tensor, None, None]:
    value, attrs = as_tensor(data), call.attrs
    if attrs.training:
        raise UnsupportedFormError("it is in training mode; export the model after .eval()")
    axis = int(attrs.axis) % len(value.shape)
    gamma, beta, mean, variance = (as_array(one, "statistics") for one in statistics)
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
    return _clipped(build, as_tensor(data), _number(low), _number(high))


def _number(value: Any) -> float:
    if isinstance(value, Array):
        if value.value.size != 1:
            raise UnsupportedFormError("its bounds are not numbers")
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
    return _clipped(build, as_tensor(data), 0.0, math.inf)


def _relu6(build: Builder, call: relax.Call, data: Value) -> Tensor:
    del call
    return _clipped(build, as_tensor(data), 0.0, 6.0)


def _unary(make: Callable[[relax.Expr], relax.Expr]) -> Callable[[Builder, relax.Call, Value], Tensor]:
    def handle(build: Builder, call: relax.Call, data: Value) -> Tensor:
        del call
        value = as_tensor(data)
        return build.like(make(value.expr), value)

    return handle


def _along_axis(make: Callable[..., relax.Expr]) -> Callable[[Builder, relax.Call, Value], Tensor]:
    def handle(build: Builder, call: relax.Call, data: Value) -> Tensor:
        value = as_tensor(data)
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
        array = as_array(array, "second argument")
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
        raise UnsupportedFormError(f"it joins shapes {left.shape} and {right.shape}")
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
        raise UnsupportedFormError(f"it joins shapes {value.shape} and {array.shape}")
    aligned = array.value.reshape((1,) * (rank - len(array.shape)) + array.shape)
    if any(a not in (1, b) for a, b in zip(aligned.shape, value.shape, strict=True)):
        raise UnsupportedFormError(f"it joins shapes {value.shape} and {array.shape}")
    wide = [axis for axis in range(rank) if aligned.shape[axis] > 1]
    if 0 in wide:
        raise UnsupportedFormError(f"a parameter of shape {array.shape} holds the batch")
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
        value, order = spatial(data, attrs.layout)
        if attrs.out_layout not in ("", attrs.layout):
            raise UnsupportedFormError(f"output layout {attrs.out_layout}")
        pooled = make(
            build.ordered(value, order),
            pool_size=ints(attrs.pool_size),
            strides=ints(attrs.strides),
            padding=ints(attrs.padding),
            dilation=ints(attrs.dilation),
            ceil_mode=bool(attrs.ceil_mode),
            count_include_pad=bool(attrs.count_include_pad),
            layout="NHWC",
        )
        return build.tensor(pooled, order)

    return handle


def _pad(build: Builder, call: relax.Call, data: Value) -> Padded:
    """Keep the zeros of TensorFlow's "same", which asks for more of them behind than before."""
    del build
    value, attrs = as_tensor(data), call.attrs
    if attrs.pad_mode != "constant" or float(attrs.pad_value) != 0:
        raise UnsupportedFormError(f"it pads with {attrs.pad_value} ({attrs.pad_mode}), not with zeros")
    width = ints(attrs.pad_width)
    if min(width) < 0:
        raise UnsupportedFormError(f"it cuts off ({width})")
    return Padded(value, tuple(zip(width[::2], width[1::2], strict=True)))


def _dropout(build: Builder, call: relax.Call, data: Value) -> tuple[Value, None]:
    del build, call
    return data, None


def _astype(build: Builder, call: relax.Call, data: Value) -> Tensor:
    del build
    value = as_tensor(data)
    if str(call.ty.dtype) != str(value.expr.ty.dtype):
        raise UnsupportedFormError(f"it casts {value.expr.ty.dtype} to {call.ty.dtype}")
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


def _quantize(build: Builder, call: relax.Call, data: Value, scale: Value, zero_point: Value) -> Tensor:
    value, step = as_tensor(data), as_array(scale, "scale")
    point = as_array(zero_point, "zero point")
    if step.value.size != 1 or point.value.size != 1 or str(call.ty.dtype) != "int8":
        raise UnsupportedFormError("activations have one scale and one zero point, and become int8")
    single = Array(step.value.reshape(()).astype(np.float32))
    parameter = build.parameter(single, f"quantize_{build.number('quantize')}.scale")
    chosen = Quantizer(parameter, float(single.value), int(point.value.reshape(())))
    zero = relax.const(chosen.zero_point, "int8")
    made = build.like(relax.op.quantize(value.expr, parameter, zero, axis=-1, out_dtype="int8"), value)
    build.note(made.expr).quantized = chosen
    return made


def _dequantize(build: Builder, call: relax.Call, data: Value, scale: Value, zero_point: Value) -> Tensor:
    del call
    value = as_tensor(data)
    made_by = build.note(value.expr).quantized
    if made_by is None:
        raise UnsupportedFormError("only integers that come straight from quantize are dequantized")
    numbers = _number(scale), int(_number(zero_point))
    if numbers != (made_by.value, made_by.zero_point):
        raise UnsupportedFormError(f"it has scale and zero point {numbers}, its quantization others")
    zero = relax.const(made_by.zero_point, "int8")
    return build.like(relax.op.dequantize(value.expr, made_by.scale, zero, axis=-1), value)


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
    "relax.nn.adaptive_avg_pool2d": canonical_shapes.adaptive_avg_pool2d,
    "relax.mean": canonical_shapes.mean,
    "relax.reshape": canonical_shapes.reshape,
    "relax.squeeze": canonical_shapes.change_shape,
    "relax.expand_dims": canonical_shapes.change_shape,
    "relax.flatten": canonical_shapes.change_shape,
    "relax.nn.batch_flatten": canonical_shapes.change_shape,
    "relax.permute_dims": canonical_shapes.permute_dims,
    "relax.concat": canonical_shapes.concat,
    "relax.nn.pad": _pad,
    "relax.nn.dropout": _dropout,
    "relax.astype": _astype,
    "relax.quantize": _quantize,
    "relax.dequantize": _dequantize,
}
