"""Quantizers in numpy: parameters, integer weights, fixed-point multipliers, and the folding of a layer.

Notation: an integer q stands for the real number `scale * (q - zero_point)`. The formulas are those of
`docs/architecture.md` (QDQ form) and of the docstring of `tvm_compress.schedules.ops`.
"""

import math
from dataclasses import dataclass

import numpy as np

from tvm_compress.errors import DataError, KernelError, ModelError

INT32_MAX = 2**31 - 1

# The scale of a channel whose weights are all zero: any positive number would do.
DEAD_SCALE = 1e-12

# What a multiplier may need at most, see `fixed_point`.
MAX_SHIFT = 62


# Integers of at most this magnitude, such as 8-bit activations, are requantized in 32 bits.
_SMALL = 2**10 - 1


@dataclass(frozen=True)
class QuantizationParameters:
    """How a tensor is held as integers: `real = scale * (q - zero_point)`, `qmin <= q <= qmax`."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int
    dtype: str

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ModelError(f"A quantization scale must be finite and positive, not {self.scale}.")
        if not self.qmin <= self.zero_point <= self.qmax:
            raise ModelError(f"Zero point {self.zero_point} lies outside of [{self.qmin}, {self.qmax}].")

    def to_dict(self) -> dict[str, float | int | str]:
        """Return the fields, for JSON."""
        return dict(vars(self))

    def quantize(self, x: np.ndarray) -> np.ndarray:
        """Return `clamp(round_half_to_even(x / scale) + zero_point, qmin, qmax)` as `dtype`."""
        steps = np.rint(x.astype(np.float32) / np.float32(self.scale)) + self.zero_point
        return np.clip(steps, self.qmin, self.qmax).astype(self.dtype)


def activation_grid(bits: int, unsigned: bool) -> tuple[int, int, str]:
    """Return (qmin, qmax, dtype) of `bits`-bit activations: int8 of two's complement, or uint8."""
    if not 1 <= bits <= 8:
        raise ModelError(f"Activations have 1 to 8 bits, not {bits}.")
    if unsigned or bits < 8:
        return 0, 2**bits - 1, "uint8"
    return -128, 127, "int8"


def activation_parameters(
    low: float, high: float, bits: int, unsigned: bool | None = None, site: str = ""
) -> QuantizationParameters:
    """Return the parameters that cover [low, high] with `bits` bits (`math.md` section 4).

    8 bits are int8 in [-128, 127] unless `unsigned`, fewer are uint8 in [0, 2**bits - 1]. The range is
    widened to hold 0, which is always represented exactly, since padding and ReLU need it: at `low >= 0` the
    unsigned zero point is 0.

    Raises
    ------
    DataError
        If a bound is not a number, low > high, or low == high; names `site`.
    """
    where = f"the input of site {site!r}" if site else "a tensor"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DataError(
            f"The calibrated range of {where} is [{low}, {high}], which is not finite.",
            "Check the calibration data and the model's parameters for NaN.",
        )
    if low >= high:
        raise DataError(
            f"The calibrated range of {where} is [{low}, {high}]: the activation is constant.",
            "Calibrate with more samples, prune less, or leave the site at fp32.",
        )
    qmin, qmax, dtype = activation_grid(bits, bool(unsigned))
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    # float32, as the parameter in the module will be: what is computed later uses the same number.
    scale = float(np.float32((high - low) / (qmax - qmin)))
    if scale == 0.0:
        raise DataError(f"The calibrated range of {where}, [{low}, {high}], is too narrow for float32.")
    zero_point = min(max(round(qmin - low / scale), qmin), qmax)
    return QuantizationParameters(scale, zero_point, qmin, qmax, dtype)


def weight_limit(bits: int) -> int:
    """Return the largest magnitude of a `bits`-bit weight: 2**(bits - 1) - 1, and 1 for one bit."""
    if not 1 <= bits <= 8:
        raise ModelError(f"Weights have 1 to 8 bits, not {bits}.")
    return 1 if bits == 1 else 2 ** (bits - 1) - 1


def weight_scale(weight: np.ndarray, bits: int) -> np.ndarray:
    """Return the scale of each output channel, float32 [O], of weights whose first axis is O.

    One bit: the mean of |w|, which is the least-squares scale of sign(w). 2 to 7 bits: the scale of the least
    squared error, from a search over clipped ranges and one least-squares step. 8 bits: the largest |w| is
    127 steps. A channel of zeros gets a tiny scale.

    Raises
    ------
    ModelError
        If a weight is not finite.
    """
    limit = weight_limit(bits)
    flat = np.ascontiguousarray(weight, dtype=np.float32).reshape(weight.shape[0], -1)
    if not np.isfinite(flat).all():
        raise ModelError("Weights hold NaN or infinity and cannot be quantized.")
    magnitudes = np.abs(flat)
    if bits == 1:
        scale = magnitudes.mean(axis=1)
    elif bits == 8:
        scale = magnitudes.max(axis=1) / limit
    else:
        scale = _least_squares_scale(magnitudes, limit)
    return np.maximum(scale, DEAD_SCALE).astype(np.float32)


def _least_squares_scale(magnitudes: np.ndarray, limit: int) -> np.ndarray:
    """Scale [O] with the least squared error of |w| [O, K] on the grid 0 .. limit."""
    top = np.maximum(magnitudes.max(axis=1), DEAD_SCALE) / limit
    best_scale, best_error = top.copy(), np.full(top.shape, np.inf)
    # The error is piecewise smooth in the clipping fraction with many shallow minima: a fine grid finds the
    # deepest one's basin, and given the integers the scale of least squares is known in closed form.
    for fraction in np.linspace(0.2, 1.0, 33):
        scale = (top * fraction).astype(np.float32)
        steps = np.minimum(np.rint(magnitudes / scale[:, None]), limit)
        power = np.einsum("ok,ok->o", steps, steps)
        fitted = np.einsum("ok,ok->o", magnitudes, steps) / np.maximum(power, 1e-30)
        scale = np.where(power > 0, fitted, scale).astype(np.float32)
        steps *= scale[:, None]
        steps -= magnitudes
        error = np.einsum("ok,ok->o", steps, steps)
        better = error < best_error
        best_scale[better], best_error[better] = scale[better], error[better]
    return best_scale


def quantize_weights(weight: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    """Return int8 weights of `weight`'s shape: symmetric within `weight_limit`, or -1 and +1 for one bit.

    `scale` is [O], O being the first axis. One bit: +1 where w >= 0, whatever the scale.
    """
    if bits == 1:
        return np.where(weight >= 0, 1, -1).astype(np.int8)
    limit = weight_limit(bits)
    scale = scale.astype(np.float32).reshape(-1, *[1] * (weight.ndim - 1))
    return np.clip(np.rint(weight.astype(np.float32) / scale), -limit, limit).astype(np.int8)


def fixed_point(
    multipliers: np.ndarray, bits: int = 31, max_shift: int = MAX_SHIFT
) -> tuple[np.ndarray, int]:
    """Return (m, shift), m int32 of `multipliers`'s shape, so that `m / 2**shift` stands for the multipliers.

    One shift serves the tensor: the largest for which every m fits `bits` bits, at most max_shift. So each
    multiplier is off by at most 2**-(shift + 1), which is at most max(multipliers) * 2**-bits while shift <
    max_shift, and

        |x * multiplier - x * m / 2**shift| <= |x| * 2**-(shift + 1)

    Raises
    ------
    KernelError
        If a multiplier is negative, not finite, or 2**bits or more.
    """
    values = np.asarray(multipliers, dtype=np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise KernelError(
            f"Requantization needs finite, positive multipliers, not {values.min()}..{values.max()}."
        )
    largest = float(values.max(initial=0.0))
    if largest == 0.0:
        return np.zeros(values.shape, np.int32), 0
    # largest = fraction * 2**exponent with fraction in [0.5, 1): so largest * 2**(bits - exponent) < 2**bits.
    shift = bits - math.frexp(largest)[1]
    if np.rint(np.ldexp(largest, shift)) >= 2**bits:
        shift -= 1
    if shift < 0:
        raise KernelError(
            f"A requantization multiplier of {largest} does not fit {bits} bits.",
            "The output's scale is far too small for its input: check the calibrated ranges.",
        )
    shift = min(shift, max_shift)
    return np.rint(np.ldexp(values, shift)).astype(np.int32), shift


def fixed_point_within(multipliers: np.ndarray, bound: int) -> tuple[np.ndarray, int]:
    """Return what `fixed_point` does, for |x| <= bound: with fewer bits if 32 then hold every product.

    That is so for small integers, up to _SMALL: m has at least 20 bits then, so that x * multiplier is off by
    at most max(|x| * multipliers) * 2**-20, or 2**-21 where max_shift limits the shift.
    """
    multipliers = np.atleast_1d(multipliers)
    # |x| * m < 2**30 and the rounding term is at most 2**29: their sum stays within 32 bits.
    bits = 30 - bound.bit_length()
    if bound <= _SMALL and np.all(multipliers < 2.0 ** (bits - 1)):
        return fixed_point(multipliers, bits, max_shift=30)
    return fixed_point(multipliers)


def requantize(
    x: np.ndarray, multiplier: np.ndarray, shift: int, zero_point: int, qmin: int, qmax: int
) -> np.ndarray:
    """Return `clamp(round_half_away_from_zero(x * multiplier / 2**shift) + zero_point, qmin, qmax)` as int64.

    x is int32 [..., C], `multiplier` int32 [C] or [1]. Products stay below 2**62 and the rounding term at
    most 2**61, so that 64 bits never overflow.
    """
    product = x.astype(np.int64) * multiplier.astype(np.int64)
    half = (1 << shift) >> 1
    rounded = np.sign(product) * ((np.abs(product) + half) >> shift)
    return np.clip(rounded + zero_point, qmin, qmax)
