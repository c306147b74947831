"""Bits from tolerances, and the uniform quantizer that they are counted for.

A uniform quantizer of step s moves a weight by at most s / 2, so a weight with tolerance τ stands a step of
2 τ, and where its site spans R it needs `ceil(log2(R / 2τ + 1))` bits: `2**b` levels, `2**b - 1` steps. A
group has the longest symbol that any of its members needs (source: TOCO, section 3.2.4).
"""

import numpy as np

from tvm_compress.errors import SettingError
from tvm_compress.passes.weight_groups import reduce_tiles, spread_tiles

MAX_BITS = 16


def bits_from_tolerances(
    tolerances: np.ndarray, span: float, group: str = "layer", percentile: float = 0.0
) -> np.ndarray:
    """Return the bits of each weight, int64 of the tolerances' shape, 1 to `MAX_BITS`.

    Parameters
    ----------
    tolerances
        τ >= 0 of one site's weights.
    span
        R, the site's largest weight less its smallest.
    group
        Which weights have symbols of the same length: "layer", "filter", or another shape of
        `passes.weight_groups`.
    percentile
        Which percentile of a group's tolerances decides: 0 is the least, as in the paper, where one member
        decides for all. Others for "layer" and "filter" only.

    Raises
    ------
    SettingError
        On a percentile outside [0, 100), or one that goes with no such group.
    """
    if not 0 <= percentile < 100:
        raise SettingError(f"A percentile must be in [0, 100), not {percentile}.")
    if percentile and group not in ("layer", "filter"):
        raise SettingError(
            f"A percentile of tolerances goes with groups 'layer' and 'filter', not {group!r}."
        )
    rows = tolerances.reshape(1 if group == "layer" else len(tolerances), -1)
    if group in ("layer", "filter"):
        deciding = np.percentile(rows, percentile, axis=1) if percentile else rows.min(axis=1)
        deciding = np.broadcast_to(deciding[:, None], rows.shape).reshape(tolerances.shape)
    else:
        deciding = spread_tiles(reduce_tiles(tolerances, group, np.minimum), group, tolerances.shape)
    with np.errstate(divide="ignore"):
        needed = np.ceil(np.log2(span / (2 * deciding.astype(np.float64)) + 1) - 1e-9)
    return np.clip(needed, 1, MAX_BITS).astype(np.int64)


def quantize_uniform(weights: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Round each weight to the nearest of `2**bits` even levels over the site's span; `MAX_BITS` leave it.

    Weights that are equal to the site's least or largest value stay as they are, at any number of bits.
    """
    low, high = float(weights.min()), float(weights.max())
    if high == low:
        return weights.copy()
    steps = np.exp2(bits.astype(np.float64)) - 1
    levels = np.rint((weights.astype(np.float64) - low) / (high - low) * steps)
    rounded = (low + levels * ((high - low) / steps)).astype(weights.dtype)
    return np.where(bits < MAX_BITS, rounded, weights)
