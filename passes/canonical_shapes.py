"""How imported operators that change a tensor's shape become canonical ones, most of them as bookkeeping."""

from collections.abc import Sequence
from typing import Any

from tvm import relax

from tvm_compress.passes.canonical_values import (
    Builder,
    Tensor,
    UnsupportedFormError,
    Value,
    as_tensor,
    channels_last,
    ints,
    spatial,
)


def _axes(values: Any, rank: int) -> list[int]:
    return [int(value) % rank for value in values]


def adaptive_avg_pool2d(build: Builder, call: relax.Call, data: Value) -> Tensor:
    """Emit an average pooling with the window that gives this output."""
    value, order = spatial(data, call.attrs.layout)
    size = [value.shape[axis] for axis in order[1:3]]
    wanted = size if call.attrs.output_size is None else ints(call.attrs.output_size)
    wanted = wanted * 2 if len(wanted) == 1 else wanted
    if wanted == [1, 1]:
        return _average(build, value, order, keepdims=True)
    if wanted == size:
        return value
    if any(a % b for a, b in zip(size, wanted, strict=True)):
        raise UnsupportedFormError(f"an image of {size} does not divide into {wanted}")
    window = [a // b for a, b in zip(size, wanted, strict=True)]
    pooled = relax.op.nn.avg_pool2d(build.ordered(value, order), window, window, layout="NHWC")
    return build.tensor(pooled, order)


def mean(build: Builder, call: relax.Call, data: Value) -> Tensor:
    """Emit global average pooling."""
    value = as_tensor(data)
    rank = len(value.shape)
    axes = list(range(rank)) if call.attrs.axis is None else _axes(call.attrs.axis, rank)
    if rank != 4 or len(axes) != 2 or 0 in axes:
        raise UnsupportedFormError(
            f"it averages axes {axes} of {rank}; height and width of an image are needed"
        )
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
        raise UnsupportedFormError(f"it takes {value.shape} to {shape}; the first axis, the batch, must stay")
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
    """Give the tensor the new shape where that only adds or removes extents of 1 that `expr` has not."""
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


def reshape(build: Builder, call: relax.Call, data: Value, shape: Any) -> Tensor:
    """Read R.reshape."""
    del shape
    return _reshaped(build, as_tensor(data), tuple(ints(call.ty.shape)))


def change_shape(build: Builder, call: relax.Call, data: Value) -> Tensor:
    """Read R.squeeze, R.expand_dims, R.flatten and R.nn.batch_flatten."""
    return _reshaped(build, as_tensor(data), tuple(ints(call.ty.shape)))


def permute_dims(build: Builder, call: relax.Call, data: Value) -> Tensor:
    """Read a transposition: bookkeeping only."""
    del build
    value = as_tensor(data)
    rank = len(value.shape)
    axes = list(range(rank))[::-1] if call.attrs.axes is None else _axes(call.attrs.axes, rank)
    shape = tuple(value.shape[axis] for axis in axes)
    return Tensor(value.expr, tuple(axes.index(axis) for axis in value.axes), shape)


def concat(build: Builder, call: relax.Call, parts: tuple[Value, ...]) -> Tensor:
    """Emit a concatenation in the layout of its parts."""
    values = [as_tensor(part) for part in parts]
    rank = len(values[0].shape)
    axis = int(call.attrs.axis) % rank
    leader = next((v for v in values if v.expr not in build.inputs), values[0])
    order = leader.axes if axis in leader.axes and len(leader.axes) == rank else tuple(range(rank))
    joined = relax.op.concat([build.ordered(value, order) for value in values], axis=order.index(axis))
    return build.tensor(joined, order)
