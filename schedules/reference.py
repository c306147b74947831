"""What the integer dialect and the float sites compute, in plain numpy: the yardstick of all kernels."""

from collections.abc import Sequence

import numpy as np

from tvm_compress.errors import KernelError


def quantize(
    x: np.ndarray, scale: float, zero_point: int, qmin: int, qmax: int, dtype: str = "int8"
) -> np.ndarray:
    """Return clamp(round_half_to_even(x / scale) + zero_point, qmin, qmax), divided in float32."""
    steps = np.rint(np.asarray(x, np.float32) / np.float32(scale))
    return np.clip(steps + np.float32(zero_point), qmin, qmax).astype(dtype)


def dequantize(x: np.ndarray, scale: np.ndarray | float, zero_point: int = 0) -> np.ndarray:
    """Return float32(x - zero_point) * scale; `scale` is of shape [C] (the last axis) or []."""
    return (x.astype(np.int32) - np.int32(zero_point)).astype(np.float32) * np.asarray(scale, np.float32)


def requantize(
    x: np.ndarray,
    multiplier: np.ndarray,
    shift: int,
    zero_point: int,
    qmin: int,
    qmax: int,
    dtype: str = "int8",
) -> np.ndarray:
    """Return clamp(round_half_away_from_zero(x * multiplier / 2**shift) + zero_point, qmin, qmax).

    Parameters
    ----------
    x
        int32, the last axis being C.
    multiplier
        int32 [C] or [1].

    Raises
    ------
    KernelError
        Where the shift lies outside of 0 to 62.
    """
    if not 0 <= shift <= 62:
        raise KernelError(f"A requantization's shift must lie within 0 and 62, not at {shift}.")
    product = x.astype(np.int64) * np.asarray(multiplier).astype(np.int64)
    half = np.int64((1 << shift) >> 1)
    magnitude = (np.abs(product) + half) >> np.int64(shift)
    return np.clip(np.sign(product) * magnitude + zero_point, qmin, qmax).astype(dtype)


def table(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return `values` [256] at x, int8 or uint8, counted from the smallest number of its type."""
    return values[x.astype(np.int64) - np.iinfo(x.dtype).min]


def binarize(w: np.ndarray) -> np.ndarray:
    """Return +1 where w >= 0, else -1, as int8."""
    return np.where(w >= 0, 1, -1).astype(np.int8)


def _patches(
    x: np.ndarray, kernel: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> np.ndarray:
    """Return the windows of a padded NHWC tensor as [N, OH, OW, KH, KW, C]."""
    (kh, kw), (sh, sw), (dh, dw) = kernel, strides, dilation
    rows = (x.shape[1] - dh * (kh - 1) - 1) // sh + 1
    columns = (x.shape[2] - dw * (kw - 1) - 1) // sw + 1
    at_row = np.arange(rows)[:, None] * sh + np.arange(kh)[None, :] * dh
    at_column = np.arange(columns)[:, None] * sw + np.arange(kw)[None, :] * dw
    return x[:, at_row[:, None, :, None], at_column[None, :, None, :]]


def convolution(
    x: np.ndarray,
    w: np.ndarray,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> np.ndarray:
    """Return the convolution of NHWC data with OIHW weights, zeros outside; in the arguments' common type."""
    top, left, bottom, right = padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    windows = _patches(padded, w.shape[2:], strides, dilation)
    parts = zip(np.split(windows, groups, axis=5), np.split(w, groups, axis=0), strict=True)
    return np.concatenate([np.einsum("nhwklc,ockl->nhwo", part, weight) for part, weight in parts], axis=3)


def conv2d(
    x: np.ndarray,
    w: np.ndarray,
    b: np.ndarray,
    zero_point: int = 0,
    strides: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> np.ndarray:
    """Return the int32 sums of the dialect's conv2d: sum((x - zero_point) * w) + b."""
    centred = x.astype(np.int64) - zero_point
    sums = convolution(centred, w.astype(np.int64), strides, padding, dilation, groups)
    return (sums + b.astype(np.int64)).astype(np.int32)


def dense(x: np.ndarray, w: np.ndarray, b: np.ndarray, zero_point: int = 0) -> np.ndarray:
    """Return the int32 sums of the dialect's dense layer, weights [O, I]."""
    return ((x.astype(np.int64) - zero_point) @ w.astype(np.int64).T + b.astype(np.int64)).astype(np.int32)
