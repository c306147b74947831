"""What an integer convolution or dense call computes, and its constants packed with numpy for the kernels."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from tvm_compress.errors import KernelError
from tvm_compress.schedules.intrin.dot import Dot
from tvm_compress.schedules.kernel import constant_array
from tvm_compress.schedules.ops import static_shape

INT32_MAX = 2**31 - 1

# What activations of a type may be.
DATA_RANGES = {"int8": (-128, 127), "uint8": (0, 255)}


@dataclass(frozen=True)
class IntegerLayer:
    """A call of tvm_compress.conv2d or tvm_compress.dense with its constants.

    A dense layer is seen as a 1 x 1 convolution of one image whose row is the batch: data_shape (1, 1, N, I).

    Attributes
    ----------
    operator, scheme
        "conv2d" or "dense"; "int8" or "bitserial".
    data_shape, data_dtype
        (N, H, W, IC); "int8" or "uint8".
    weight, bias
        int8 [O, I / groups, KH, KW] and int32 [O].
    strides, padding, dilation
        (height, width), (top, left, bottom, right), (height, width).
    zero_point
        The stored value that counts as 0.
    """

    operator: str
    scheme: str
    data_shape: tuple[int, int, int, int]
    data_dtype: str
    weight: np.ndarray
    bias: np.ndarray
    strides: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    zero_point: int
    activation_bits: int
    weight_bits: int

    @property
    def in_channels(self) -> int:
        """Number of channels of the data."""
        return self.data_shape[3]

    @property
    def out_channels(self) -> int:
        """Number of output channels."""
        return int(self.weight.shape[0])

    @property
    def data_range(self) -> tuple[int, int]:
        """Least and largest stored value: any byte, but with scheme "bitserial"."""
        if self.scheme == "bitserial":
            return 0, 2**self.activation_bits - 1
        return DATA_RANGES[self.data_dtype]

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the kernel."""
        return int(self.weight.shape[2]), int(self.weight.shape[3])

    @property
    def padded_size(self) -> tuple[int, int]:
        """Height and width of the padded data."""
        top, left, bottom, right = self.padding
        return self.data_shape[1] + top + bottom, self.data_shape[2] + left + right

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        height, width = (
            (size - dilation * (kernel - 1) - 1) // stride + 1
            for size, dilation, kernel, stride in zip(
                self.padded_size, self.dilation, self.kernel, self.strides, strict=True
            )
        )
        return height, width

    @property
    def is_padded(self) -> bool:
        """Whether anything is added around the image."""
        return any(self.padding)

    @cached_property
    def weight_sums(self) -> np.ndarray:
        """Sum of each output channel's weights, int64 [O]."""
        return self.weight.astype(np.int64).sum(axis=(1, 2, 3))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call."""
        out_height, out_width = self.out_size
        return self.data_shape[0] * out_height * out_width * self.weight.size

    def te_facts(self) -> tuple[Any, ...]:
        """See `te_cache.TeFacts`: weights and biases are arguments of a kernel, no part of its code."""
        arrays = ("weight", "bias")
        values = [getattr(self, field.name) for field in fields(self) if field.name not in arrays]
        return (*values, self.weight.shape)

    def info(self) -> dict[str, Any]:
        """Return the facts that every kernel states in its annotation (kernel_attrs)."""
        n, h, w, ic = self.data_shape
        out_height, out_width = self.out_size
        if self.operator == "dense":
            n, w, out_width = w, 1, 1
        return {
            "operator": self.operator,
            "scheme": self.scheme,
            **{"N": n, "H": h, "W": w, "IC": ic, "OC": self.out_channels, "OH": out_height, "OW": out_width},
            **{"KH": self.kernel[0], "KW": self.kernel[1], "stride": self.strides[0], "groups": self.groups},
            **{"strides": list(self.strides), "padding": list(self.padding), "dilation": list(self.dilation)},
            "activation_bits": self.activation_bits,
            "weight_bits": self.weight_bits,
        }


def read_layer(call: relax.Call) -> IntegerLayer:
    """Read a call of tvm_compress.conv2d or tvm_compress.dense.

    Raises
    ------
    KernelError
        Where weights or bias are no constants, or weights lie outside of their bits' range.
    """
    data, weight_expr, bias_expr = call.args
    attrs = call.attrs
    operator = str(call.op.name).rpartition(".")[2]
    weight = constant_array(weight_expr, "weight")
    bias = constant_array(bias_expr, "bias")
    shape = static_shape(data)
    if operator == "dense":
        weight = weight[:, :, None, None]
        data_shape = (1, 1, shape[0], shape[1])
        strides, padding, dilation, groups = (1, 1), (0, 0, 0, 0), (1, 1), 1
    else:
        data_shape = (shape[0], shape[1], shape[2], shape[3])
        strides, dilation = _pair(attrs["strides"]), _pair(attrs["dilation"])
        top, left, bottom, right = (int(p) for p in attrs["padding"])
        padding, groups = (top, left, bottom, right), int(attrs["groups"])
    layer = IntegerLayer(
        operator=operator,
        scheme=str(attrs["scheme"]),
        data_shape=data_shape,
        data_dtype=str(data.ty.dtype.dtype),
        weight=weight,
        bias=bias,
        strides=strides,
        padding=padding,
        dilation=dilation,
        groups=groups,
        zero_point=int(attrs["zero_point"]),
        activation_bits=int(attrs["activation_bits"]),
        weight_bits=int(attrs["weight_bits"]),
    )
    _check_weights(layer)
    return layer


def _pair(values: Sequence[Any]) -> tuple[int, int]:
    first, second = (int(v) for v in values)
    return first, second


def _check_weights(layer: IntegerLayer) -> None:
    if not layer.weight.size:
        return
    low, high = int(layer.weight.min()), int(layer.weight.max())
    if layer.weight_bits == 1:
        if np.any(np.abs(layer.weight) != 1):
            raise KernelError(f"1-bit weights must be -1 and +1, and some in [{low}, {high}] are not.")
        return
    limit = 2 ** (min(layer.weight_bits, 8) - 1) - 1
    if low < -limit or high > limit:
        raise KernelError(
            f"{layer.weight_bits}-bit weights must lie in [{-limit}, {limit}], not in [{low}, {high}].",
            "Quantize them symmetrically.",
        )


def check_accumulator(layer: IntegerLayer, low: int, high: int) -> None:
    """Raise KernelError if stored data in [low, high] could overflow the int32 accumulators."""
    largest = max(abs(low), abs(high), abs(low - layer.zero_point), abs(high - layer.zero_point))
    sums = np.abs(layer.weight.astype(np.int64)).sum(axis=(1, 2, 3)) * largest
    bound = int((sums + np.abs(layer.bias.astype(np.int64))).max(initial=0))
    # Raw sums, folded bias and result each stay below twice the bound.
    if 2 * bound > INT32_MAX:
        raise KernelError(
            f"The sums of a {layer.operator} with {layer.in_channels} input channels may reach {bound}, "
            f"which its int32 accumulators cannot hold (at most {INT32_MAX // 2}).",
            "Use fewer bits or a smaller layer.",
        )


def fold_bias(layer: IntegerLayer, offset: int = 0) -> np.ndarray:
    """Return the int32 bias for a kernel that multiplies the stored values x + offset by the weights."""
    return (layer.bias.astype(np.int64) - (layer.zero_point + offset) * layer.weight_sums).astype(np.int32)


def wrapping_sum(a: Any, b: Any) -> Any:
    """Return a + b, int32, for code that LLVM shall not widen.

    Of a signed sum LLVM knows that it cannot overflow, and would rather add 64-bit numbers than widen it:
    then a multiplication that follows is no longer one of 32-bit numbers.
    """
    # Reinterpreted and not cast: TVM takes what was cast from unsigned for positive.
    return tirx.reinterpret("int32", tirx.reinterpret("uint32", a) + tirx.reinterpret("uint32", b))


def add_bias(layer: IntegerLayer, sums: te.Tensor, bias: te.Tensor) -> te.Tensor:
    """Return sums + bias for the true channels, in the shape of the layer's output."""
    n = layer.data_shape[0]
    height, width = layer.out_size
    channels = layer.out_channels
    if layer.operator == "dense":
        return te.compute(
            (width, channels), lambda x, c: wrapping_sum(sums[0, 0, x, c], bias[c]), name="biased"
        )
    return te.compute(
        (n, height, width, channels),
        lambda image, y, x, c: wrapping_sum(sums[image, y, x, c], bias[c]),
        name="biased",
    )


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple that is not below value."""
    return -(-value // multiple) * multiple


def pad_axes(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Return the array with zeros behind, up to `shape`."""
    return np.pad(array, [(0, new - old) for old, new in zip(array.shape, shape, strict=True)])


def pack_dot_weight(weight: np.ndarray, dot: Dot, block: int) -> np.ndarray:
    """Pack int8 weights for a dot product.

    Parameters
    ----------
    weight
        [O, I, KH, KW]; O and I are filled with zeros up to whole blocks and whole steps.
    block
        Output channels of one tile, a multiple of dot.lanes.

    Returns
    -------
    numpy.ndarray
        [O / block, KH, KW, I / depth, block / lanes, *dot.inner_shape] of dot.weight_dtype.
    """
    o, i, kh, kw = weight.shape
    o, i = round_up(o, block), round_up(i, dot.depth)
    full = pad_axes(weight, (o, i, kh, kw))
    split = full.reshape(o // block, block, i // dot.depth, dot.depth, kh, kw)
    return dot.pack(split.transpose(0, 4, 5, 2, 1, 3))


def pack_rows_weight(weight: np.ndarray) -> np.ndarray:
    """Turn [O, I, KH, KW] into [O, KW * I, KH, 1]: a kernel's row is one run of NHWC values."""
    o, i, kh, kw = weight.shape
    return np.ascontiguousarray(weight.transpose(0, 3, 1, 2).reshape(o, kw * i, kh, 1))


def merged_groups(groups: int, channels: int, lanes: int) -> int:
    """Return how many groups are left if as many are merged as fill whole vectors of output channels.

    Parameters
    ----------
    groups, channels
        Groups, and output channels of each.
    lanes
        Output channels of a vector.
    """
    for merged in range(1, groups):
        if groups % merged == 0 and merged * channels % lanes == 0:
            return groups // merged
    return 1


def merge_groups(weight: np.ndarray, groups: int, left: int) -> np.ndarray:
    """Turn the weights [O, I / groups, KH, KW] of `groups` groups into [O, I / left, KH, KW] of `left`.

    The weights between groups that were apart are zeros.
    """
    o, i, kh, kw = weight.shape
    merged = groups // left
    full = np.zeros((left, merged, o // groups, merged, i, kh, kw), weight.dtype)
    split = weight.reshape(left, merged, o // groups, i, kh, kw)
    for group in range(merged):
        full[:, group, :, group] = split[:, group]
    return full.reshape(o, merged * i, kh, kw)


def pack_weight_bits(weight: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Pack weights as bit planes in bytes, 8 input channels a byte, channel 0 in bit 0.

    Parameters
    ----------
    weight
        [O, I, KH, KW] int8, I a multiple of 32 and O of `block`; with bits = 1 only -1 (stored 0) and +1
        (stored 1), else two's complement.

    Returns
    -------
    numpy.ndarray
        uint8 [O / block, bits, KH, KW, I / 32, block, 4].
    """
    o, i, kh, kw = weight.shape
    codes = (weight > 0).astype(np.uint8) if bits == 1 else weight.view(np.uint8)
    planes = (codes[None] >> np.arange(bits, dtype=np.uint8)[:, None, None, None, None]) & 1
    packed = np.packbits(planes.reshape(bits, o, i // 8, 8, kh, kw), axis=3, bitorder="little")
    split = packed.reshape(bits, o // block, block, i // 32, 4, kh, kw)
    return np.ascontiguousarray(split.transpose(1, 0, 5, 6, 3, 2, 4))


def pack_activation_bits(data: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 [N, H, W, C] as uint8 [N, H, W, bits, C / 32, 4]: what the packing kernels compute."""
    n, h, w, c = data.shape
    planes = (data[:, :, :, None, :] >> np.arange(bits, dtype=np.uint8)[:, None]) & 1
    return np.packbits(planes.reshape(n, h, w, bits, c // 32, 4, 8), axis=-1, bitorder="little")[..., 0]
