"""Batch norm and bias folded into the integers of a layer, with the proof that 32 bits hold every sum."""

from dataclasses import dataclass

import numpy as np

from tvm_compress.errors import KernelError
from tvm_compress.passes.quantization import DEAD_SCALE, INT32_MAX, weight_limit

# A bias may be this many times the largest sum of products before the channel gets a coarser scale.
_BIAS_TO_SUM = 2**10

# ... but biases up to here are always fine: their requantization error is far below one step.
_SMALL_BIAS = 2**24


@dataclass(frozen=True)
class IntegerLayer:
    """What an integer convolution or dense layer computes: `real[c] = scale[c] * (sum(x w) + bias[c])`."""

    weight: np.ndarray  # int8, the layout of the source
    bias: np.ndarray  # int32 [O]
    scale: np.ndarray  # float64 [O]
    bound: np.ndarray  # int64 [O]: |sum(x w) + bias| is never larger


def fold_integer_layer(
    weight: np.ndarray,
    scale: np.ndarray,
    factor: np.ndarray,
    shift: np.ndarray,
    bits: int,
    reach: int,
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
    site
        For messages.

    A negative factor negates the channel's weights, whose range is symmetric. Where the shift is so large in units of
    the scale that it would not fit (a dead batch norm channel has scale 0), the channel gets a coarser scale and
    its weights are rounded to it, down to 0: what they add is then far less than a step of any 8-bit output.

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
    if int(sums.max(initial=0)) >= INT32_MAX - 1:
        raise KernelError(
            f"Site {site!r}: sum|w| * max|x| reaches {int(sums.max())}, which int32 cannot accumulate (2**31 - 1).",
            "Give the site fewer bits, or leave it at fp32.",
        )
    largest_bias = np.minimum(np.maximum(sums * _BIAS_TO_SUM, _SMALL_BIAS), INT32_MAX - 1 - sums)
    coarser = np.maximum(np.abs(shift) / largest_bias, DEAD_SCALE * DEAD_SCALE)
    ratio = np.minimum(scale / coarser, 1.0)
    if bits > 1:
        weight = np.rint(weight * ratio.reshape(column))
    scale = np.maximum(scale, coarser)
    weight = weight.astype(np.int8)
    assert np.abs(weight.astype(np.int16)).max(initial=0) <= weight_limit(bits)
    bias = np.rint(shift / scale).astype(np.int64)
    bound = np.abs(weight.astype(np.int64)).sum(axis=axes) * reach + np.abs(bias)
    assert bound.max(initial=0) <= INT32_MAX  # by the choice of the scale
    return IntegerLayer(weight, bias.astype(np.int32), scale, bound)
