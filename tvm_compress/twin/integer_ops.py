"""The integer dialect of `schedules.ops`, computed by torch exactly as its docstring says.

torch has no fast integer convolution. A float32 one is exact while every sum of products stays below 2**24 in
magnitude: then all partial sums are integers that float32 holds, in whatever order they are added. Layers
beyond that bound are split over their input channels, and only as a last resort computed in float64.
"""

import torch
import torch.nn.functional as F

from tvm_compress.twin.float_ops import (
    BatchNormMode,
    Build,
    TensorFunction,
    split_padding,
    to_nchw,
    to_nhwc,
    unsupported,
)
from tvm_compress.twin.program import Node
from tvm_compress.twin.quantized_ops import INTEGER_RANGES, along

PREFIX = "tvm_compress."
EXACT_FLOAT32 = 2**24


def _torch_dtype(node: Node) -> torch.dtype:
    name = str(node.attr("dtype"))
    if name not in INTEGER_RANGES:
        raise unsupported(node, f"results of type {name}")
    return getattr(torch, name)


def _quantize(node: Node, _: BatchNormMode) -> TensorFunction:
    # The division is one of float32 values, as in the kernel.
    scale = torch.tensor(float(node.attr("scale")), dtype=torch.float32)
    zero_point, low, high = int(node.attr("zero_point", 0)), int(node.attr("qmin")), int(node.attr("qmax"))
    dtype = _torch_dtype(node)

    def quantize(x: torch.Tensor) -> torch.Tensor:
        return torch.round(x / scale).add_(zero_point).clamp_(low, high).to(dtype)

    return quantize


def _dequantize(node: Node, _: BatchNormMode) -> TensorFunction:
    zero_point = int(node.attr("zero_point", 0))

    def dequantize(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (q.to(torch.int32) - zero_point).to(torch.float32) * along(scale, -1, q.dim())

    return dequantize


def _requantize(node: Node, _: BatchNormMode) -> TensorFunction:
    shift, zero_point = int(node.attr("shift")), int(node.attr("zero_point", 0))
    low, high, dtype = int(node.attr("qmin")), int(node.attr("qmax")), _torch_dtype(node)
    half = (1 << shift) >> 1

    def requantize(x: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
        product = x.to(torch.int64).mul_(multiplier)
        if shift > 0:
            # A shift rounds down, so that with a half added it rounds halves up. Negative values get a half
            # less 1 (their sign bits, shifted down, are -1): their halves then go down, away from zero.
            product.add_(product >> 63).add_(half).bitwise_right_shift_(shift)
        return product.clamp_(low - zero_point, high - zero_point).add_(zero_point).to(dtype)

    return requantize


def _table(node: Node, _: BatchNormMode) -> TensorFunction:
    info = node.info[0]
    dtype = info.dtype if info is not None else "int32"
    if dtype not in ("int8", "uint8"):
        raise unsupported(node, f"tables for inputs of type {dtype}")
    lowest = INTEGER_RANGES[dtype][0]

    def table(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values[x.to(torch.int64) - lowest]

    return table


def _largest_input(node: Node) -> int:
    """Largest |x - zero_point| that the first input can hold."""
    info = node.info[0]
    dtype = info.dtype if info is not None else "int32"
    if dtype not in ("int8", "uint8"):
        raise unsupported(node, f"inputs of type {dtype}")
    low, high = INTEGER_RANGES[dtype]
    if node.attr("scheme") == "bitserial" and dtype == "uint8":
        high = 2 ** int(node.attr("activation_bits", 8)) - 1
    zero_point = int(node.attr("zero_point", 0))
    return max(abs(low - zero_point), abs(high - zero_point))


def exact_pieces(w: torch.Tensor, largest_input: int, groups: int = 1) -> int:
    """Into how many runs of input channels a layer must be cut for exact float32 sums; 0: float64.

    `w` is int8 [O, I, ...]; the runs are of its axis 1.
    """
    magnitudes = w.to(torch.float64).abs().reshape(w.shape[0], w.shape[1], -1).sum(2)
    for pieces in (1, 2, 3, 4):
        if pieces > 1 and (groups > 1 or w.shape[1] < pieces):
            break
        sums = torch.stack([part.sum(1).amax() for part in magnitudes.tensor_split(pieces, dim=1)])
        if float(sums.max()) * largest_input < EXACT_FLOAT32:
            return pieces
    return 0


def _accumulate(
    x: torch.Tensor, w: torch.Tensor, axis: int, largest_input: int, groups: int, product: TensorFunction
) -> torch.Tensor:
    """Sum `product` over exact pieces; x float32 (whole numbers) with its channels at `axis`; int32."""
    pieces = exact_pieces(w, largest_input, groups)
    if pieces == 0:
        return product(x.to(torch.float64), w.to(torch.float64)).to(torch.int32)
    floats = zip(
        x.tensor_split(pieces, dim=axis),
        w.to(torch.float32).tensor_split(pieces, dim=1),
        strict=True,
    )
    total = None
    for part_x, part_w in floats:
        part = product(part_x, part_w).to(torch.int32)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _conv2d(node: Node, _: BatchNormMode) -> TensorFunction:
    strides, dilation, groups = node.ints("strides"), node.ints("dilation"), int(node.attr("groups", 1))
    padding, before = split_padding(node.ints("padding"))
    zero_point, largest = int(node.attr("zero_point", 0)), _largest_input(node)

    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        # NNPACK computes 3 x 3 convolutions through transforms, which are not exact.
        with torch.backends.nnpack.flags(enabled=False):
            return F.conv2d(x, w, None, strides, padding, dilation, groups)

    def convolve(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        centred = to_nchw(x.to(torch.float32).sub_(zero_point))
        centred = centred if before is None else F.pad(centred, before)
        return to_nhwc(_accumulate(centred, w, 1, largest, groups, product)) + b

    return convolve


def _dense(node: Node, _: BatchNormMode) -> TensorFunction:
    zero_point, largest = int(node.attr("zero_point", 0)), _largest_input(node)

    def dense(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return _accumulate(x.to(torch.float32).sub_(zero_point), w, 1, largest, 1, F.linear) + b

    return dense


def _window_sum(node: Node, _: BatchNormMode) -> TensorFunction:
    top, left, bottom, right = node.ints("padding")
    window, strides = node.ints("pool_size"), node.ints("strides")

    def add(x: torch.Tensor) -> torch.Tensor:
        # float64 holds every sum of int32 that a window can have.
        padded = F.pad(to_nchw(x).to(torch.float64), (left, right, top, bottom))
        return to_nhwc(F.avg_pool2d(padded, window, strides, divisor_override=1)).to(torch.int32)

    return add


# `binarize` stands in QDQ modules: it is among the quantized operators.
INTEGER_OPERATORS: dict[str, Build] = {
    PREFIX + "quantize": _quantize,
    PREFIX + "dequantize": _dequantize,
    PREFIX + "requantize": _requantize,
    PREFIX + "table": _table,
    PREFIX + "window_sum": _window_sum,
    PREFIX + "conv2d": _conv2d,
    PREFIX + "dense": _dense,
}
