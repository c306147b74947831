"""The float operators of the canonical form, computed by torch.

Each entry of `FLOAT_OPERATORS` takes a node and gives the function of its tensors. Activations are NHWC: a
convolution sees them through `permute(0, 3, 1, 2)`, which torch knows as the channels_last memory format, so
nothing is copied.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from tvm_compress.errors import UnsupportedOperatorError
from tvm_compress.twin.program import TUPLE, TUPLE_GET_ITEM, Node

TensorFunction = Callable[..., Any]
Build = Callable[[Node, "BatchNormMode"], TensorFunction]


@dataclass
class BatchNormMode:
    """How the batch norms of a twin behave; one object shared by all of them.

    Attributes
    ----------
    batch_statistics
        Normalise by the batch's own mean and variance and move the running ones towards them.
    momentum
        Weight of this batch in the running statistics; None: the operator's own.
    """

    batch_statistics: bool = False
    momentum: float | None = None


def unsupported(node: Node, what: str) -> UnsupportedOperatorError:
    """Make the error of an operator that is known, with an attribute that is not."""
    return UnsupportedOperatorError(f"{node.op} ({node.layer}): the twin cannot compute {what}.")


def expect(node: Node, name: str, *allowed: Any) -> None:
    """Raise UnsupportedOperatorError unless an attribute has one of the allowed values (or is missing)."""
    value = node.attr(name)
    if value is not None and value not in allowed:
        raise unsupported(node, f"{name} = {value!r}")


def to_nchw(x: torch.Tensor) -> torch.Tensor:
    """View NHWC as NCHW."""
    return x.permute(0, 3, 1, 2)


def to_nhwc(x: torch.Tensor) -> torch.Tensor:
    """View NCHW as NHWC."""
    return x.permute(0, 2, 3, 1)


def split_padding(padding: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int, int, int] | None]:
    """Split (top, left, bottom, right) into what torch's operators take and what `F.pad` must do before."""
    top, left, bottom, right = padding
    if top == bottom and left == right:
        return (top, left), None
    return (0, 0), (left, right, top, bottom)


def _conv2d(node: Node, _: BatchNormMode) -> TensorFunction:
    expect(node, "data_layout", "NHWC", "NCHW")
    expect(node, "kernel_layout", "OIHW")
    strides, dilation, groups = node.ints("strides"), node.ints("dilation"), int(node.attr("groups", 1))
    padding, before = split_padding(node.ints("padding"))
    nhwc = node.attr("data_layout", "NHWC") == "NHWC"

    def convolve(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = to_nchw(x) if nhwc else x
        x = x if before is None else F.pad(x, before)
        y = F.conv2d(x, w, None, strides, padding, dilation, groups)
        return to_nhwc(y) if nhwc else y

    return convolve


def _batch_norm(node: Node, mode: BatchNormMode) -> TensorFunction:
    axis = int(node.attr("axis", 1))
    epsilon, own_momentum = float(node.attr("epsilon")), float(node.attr("momentum", 0.1))
    center, scale = bool(node.attr("center", True)), bool(node.attr("scale", True))

    def normalize(
        x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, mean: torch.Tensor, var: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        momentum = own_momentum if mode.momentum is None else mode.momentum
        y = F.batch_norm(
            x.movedim(axis, 1),
            mean,
            var,
            gamma if scale else None,
            beta if center else None,
            mode.batch_statistics,
            momentum,
            epsilon,
        )
        return y.movedim(1, axis), mean, var

    return normalize


def _pool(node: Node) -> tuple[bool, dict[str, Any], tuple[int, int, int, int] | None]:
    expect(node, "layout", "NHWC", "NCHW")
    padding, before = split_padding(node.ints("padding"))
    settings = {
        "kernel_size": node.ints("pool_size"),
        "stride": node.ints("strides"),
        "padding": padding,
        "ceil_mode": bool(node.attr("ceil_mode", False)),
    }
    return node.attr("layout") == "NHWC", settings, before


def _max_pool2d(node: Node, _: BatchNormMode) -> TensorFunction:
    nhwc, settings, before = _pool(node)
    dilation = node.ints("dilation")

    def pool(x: torch.Tensor) -> torch.Tensor:
        # torch pools floats only; int8 and uint8 fit into float32.
        y = (to_nchw(x) if nhwc else x).to(torch.float32)
        if before is not None:
            y = F.pad(y, before, value=-torch.inf)
        y = F.max_pool2d(y, dilation=dilation, **settings).to(x.dtype)
        return to_nhwc(y) if nhwc else y

    return pool


def _avg_pool2d(node: Node, _: BatchNormMode) -> TensorFunction:
    if set(node.ints("dilation")) != {1}:
        raise unsupported(node, f"dilation = {node.ints('dilation')}")
    nhwc, settings, before = _pool(node)
    count_padding = bool(node.attr("count_include_pad", False))

    def pool(x: torch.Tensor) -> torch.Tensor:
        y = to_nchw(x) if nhwc else x
        if before is None:
            y = F.avg_pool2d(y, count_include_pad=count_padding, **settings)
        else:
            inside = F.pad(torch.ones_like(y[:1, :1]), before)
            y = F.avg_pool2d(F.pad(y, before), **settings)
            if not count_padding:
                y = y / F.avg_pool2d(inside, **settings)
        return to_nhwc(y) if nhwc else y

    return pool


def _reshape(node: Node, _: BatchNormMode) -> TensorFunction:
    shape = tuple(node.immediates[0])
    source = node.info[0]
    # The IR says batch 1; what varies with the input keeps whatever batch it has.
    keeps_batch = node.varying and source is not None and shape[:1] == source.shape[:1]

    def reshape(x: torch.Tensor) -> torch.Tensor:
        return x.reshape((x.shape[0], *shape[1:]) if keeps_batch else shape)

    return reshape


def _permute_dims(node: Node, _: BatchNormMode) -> TensorFunction:
    axes = node.attr("axes")
    order = None if axes is None else tuple(int(axis) for axis in axes)
    return lambda x: x.permute(order if order is not None else tuple(reversed(range(x.dim()))))


def _expand_dims(node: Node, _: BatchNormMode) -> TensorFunction:
    rank = len(node.output_info.shape) if node.output_info is not None else 0
    axes = sorted(axis % rank for axis in node.ints("axis"))

    def expand(x: torch.Tensor) -> torch.Tensor:
        for axis in axes:
            x = x.unsqueeze(axis)
        return x

    return expand


def _reduce(function: TensorFunction) -> Build:
    def build(node: Node, _: BatchNormMode) -> TensorFunction:
        axes, keepdims = node.attr("axis"), bool(node.attr("keepdims"))
        dims = None if axes is None else tuple(int(axis) for axis in axes)

        def reduce(x: torch.Tensor) -> torch.Tensor:
            every = dims if dims is not None else tuple(range(x.dim()))
            return function(x, every, keepdims)

        return reduce

    return build


def _sum(x: torch.Tensor, dims: tuple[int, ...], keepdims: bool) -> torch.Tensor:
    # torch would widen integers to int64; Relax keeps the type.
    return torch.sum(x, dims, keepdim=keepdims, dtype=x.dtype)


def _clip(node: Node, _: BatchNormMode) -> TensorFunction:
    low, high = node.immediates
    return lambda x: torch.clamp(x, low, high)


def _concat(node: Node, _: BatchNormMode) -> TensorFunction:
    axis = int(node.attr("axis", 0))
    return lambda *items: torch.cat(items, axis)


def _along_axis(function: TensorFunction) -> Build:
    def build(node: Node, _: BatchNormMode) -> TensorFunction:
        axis = int(node.attr("axis", -1))
        return lambda x: function(x, axis)

    return build


def _astype(node: Node, _: BatchNormMode) -> TensorFunction:
    dtype = getattr(torch, str(node.attr("dtype")))
    return lambda x: x.to(dtype)


def _tuple_item(node: Node, _: BatchNormMode) -> TensorFunction:
    index = node.immediates[0]
    return lambda items: items[index]


def _lookup(node: Node, _: BatchNormMode) -> TensorFunction:
    axis = int(node.attr("axis", 0))

    def lookup(indices: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        if len(codebook) == 1:
            return codebook[0][indices.long()]
        rows = indices.movedim(axis, 0)
        return codebook.gather(1, rows.flatten(1).long()).reshape(rows.shape).movedim(0, axis)

    return lookup


def _plain(function: TensorFunction) -> Build:
    return lambda node, mode: function


# Relax's name -> how to compute it.
FLOAT_OPERATORS: dict[str, Build] = {
    "relax.nn.conv2d": _conv2d,
    "relax.matmul": _plain(torch.matmul),
    "relax.permute_dims": _permute_dims,
    "relax.add": _plain(torch.add),
    "relax.subtract": _plain(torch.sub),
    "relax.multiply": _plain(torch.mul),
    "relax.divide": _plain(torch.div),
    "relax.maximum": _plain(torch.maximum),
    "relax.minimum": _plain(torch.minimum),
    "relax.nn.batch_norm": _batch_norm,
    "relax.nn.relu": _plain(F.relu),
    "relax.clip": _clip,
    "relax.sigmoid": _plain(torch.sigmoid),
    "relax.tanh": _plain(torch.tanh),
    "relax.nn.silu": _plain(F.silu),
    "relax.nn.softmax": _along_axis(torch.softmax),
    "relax.nn.log_softmax": _along_axis(torch.log_softmax),
    "relax.nn.max_pool2d": _max_pool2d,
    "relax.nn.avg_pool2d": _avg_pool2d,
    "relax.mean": _reduce(torch.mean),
    "relax.sum": _reduce(_sum),
    "relax.concat": _concat,
    "relax.reshape": _reshape,
    "relax.expand_dims": _expand_dims,
    "relax.nn.batch_flatten": _plain(lambda x: x.flatten(1)),
    "relax.astype": _astype,
    "tvm_compress.lookup": _lookup,
    TUPLE: _plain(lambda *items: items),
    TUPLE_GET_ITEM: _tuple_item,
}
