"""Batch norm and bias folded into the integers of a layer, with the proof that 32 bits hold every sum."""

from dataclasses import dataclass

import numpy as np

from tvm_compress.errors import KernelError
from tvm_compress.passes.quantization import DEAD_SCALE, INT32_MAX, weight_limit

# A bias may be this many times the largest sum of products before the channel gets a coarser scale. What is
# left of 1-bit weights there, which cannot be rounded to 0, is then below an eighth of an 8-bit step.
_BIAS_TO_SUM = 2**11

# ... but biases up to here are always fine: their requantization error is far below one step.
_SMALL_BIAS = 2**24

# What kernels take: they multiply the stored integers, whose sums may be twice those less the zero point, and
# add the rest with the bias.
_KERNEL_MAX = INT32_MAX // 2

# Floats are taken to need so many steps up to the largest sum, which real sums stay far below.
_FLOAT_STEPS = 2**14

# A bias is rounded to at most this part of an output step, where 32 bits allow it.
_BIAS_STEP = 1 / 16


@dataclass(frozen=True)
class IntegerLayer:
    """What an integer layer computes: `real[c] = scale[c] * (2**fraction_bits * sum(x w) + bias[c])`.

    Attributes
    ----------
    weight
        int8, in the layout of the source.
    bias
        int32 [O].
    scale
        float64 [O].
    bound
        int64 [O]; `|2**fraction_bits * sum(x w) + bias|` is never larger, and fits int32.
    fraction_bits
        More than 0 only where the sums are so small that a bias of their scale would be too coarse.
    """

    weight: np.ndarray
    bias: np.ndarray
    scale: np.ndarray
    bound: np.ndarray
    fraction_bits: int


def fold_integer_layer(
    weight: np.ndarray,
    scale: np.ndarray,
    factor: np.ndarray,
    shift: np.ndarray,
    bits: int,
    reach: int,
    output_scale: float | None,
    site: str,
) -> IntegerLayer:
    """Fold `real = factor * (scale * sum(x w)) + shift` into integers.

    Parameters
    ----------
    weight
        int8 [O, ...].
    scale, factor, shift
        float64 [O]: the scale of the sum of products, and the affine map (batch norm, bias) that follows.
    bits
        Bits of the weights; with one they stay -1 and +1.
    reach
        The largest |x - zero_point|.
    output_scale
        One step of what the result is quantized to; None for float: then 2**-14 of the largest sum.
    site
        For messages.

    A negative factor negates the channel's weights, whose range is symmetric. Where the shift is so large in
    units of the scale that it would not fit (a dead batch norm channel has scale 0), the channel gets a
    coarser scale and its weights are rounded to it, down to 0: what they add is then far less than a step of
    any 8-bit output.

    Raises
    ------
    KernelError
        If a sum may leave 32 bits: states the bound and the site.
    """
    axes = tuple(range(1, weight.ndim))
    column = (-1, *[1] * (weight.ndim - 1))
    weight = np.where(factor.reshape(column) < 0, -weight, weight)
    scale = scale * np.abs(factor)
    sums = np.abs(weight.astype(np.int64)).sum(axis=axes) * reach
    largest = int(sums.max(initial=0))
    if largest >= INT32_MAX - 1:
        raise KernelError(
            f"Site {site!r}: sum|w| * max|x| reaches {largest}, which int32 cannot accumulate (2**31 - 1).",
            "Give the site fewer bits, or leave it at fp32.",
        )
    fraction_bits = 0
    if shift.any():
        fraction_bits = _fraction_bits(float(scale.max()), largest, output_scale)
    sums = sums << fraction_bits
    scale = scale / 2**fraction_bits
    room = np.maximum(_KERNEL_MAX - 2 * sums, _SMALL_BIAS)
    largest_bias = np.minimum(np.maximum(sums * _BIAS_TO_SUM, _SMALL_BIAS), room)
    largest_bias = np.minimum(largest_bias, INT32_MAX - 1 - sums)
    coarser = np.maximum(np.abs(shift) / largest_bias, DEAD_SCALE * DEAD_SCALE)
    ratio = np.minimum(scale / coarser, 1.0)
    if bits > 1:
        weight = np.rint(weight * ratio.reshape(column))
    scale = np.maximum(scale, coarser)
    weight = weight.astype(np.int8)
    assert np.abs(weight.astype(np.int16)).max(initial=0) <= weight_limit(bits)
    bias = np.rint(shift / scale).astype(np.int64)
    bound = (np.abs(weight.astype(np.int64)).sum(axis=axes) * reach << fraction_bits) + np.abs(bias)
    assert bound.max(initial=0) <= INT32_MAX  # by the choice of the scale
    return IntegerLayer(weight, bias.astype(np.int32), scale, bound, fraction_bits)


def _fraction_bits(scale: float, largest: int, output_scale: float | None) -> int:
    """How many bits the sums, up to `largest`, get behind the point so that a bias can be rounded to them."""
    # Rounding the bias errs by half a unit of the sums.
    half = scale / 2
    step = largest * scale / _FLOAT_STEPS if output_scale is None else output_scale
    wanted = 0
    while half / 2**wanted > step * _BIAS_STEP and wanted < 16:
        wanted += 1
    # Twice the bits of the sums leave room for the bias, which is of their size unless the channel is dead.
    room = max(0, 30 - _BIAS_TO_SUM.bit_length() - largest.bit_length())
    return min(wanted, room)
