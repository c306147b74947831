"""Effective signal norm: how much signal a network's quantized weights carry.

Source: "Prune or quantize? Strategy for Pareto-optimally low-cost and accurate CNN", section 2, appendices A
and E, in the notation of its mid-rise quantizer: `W_int = floor(W / Δ) + 0.5`, and 0 for a filter all of
whose weights are below Δ / 2 in magnitude.

ESN_a grows with the square of the weights (analog multipliers), ESN_d with their bits (digital ones), ESN'_d
counts each filter at the bits of its largest weight: MAC * bits of a machine that gives each filter its own
width.
"""

from collections.abc import Mapping

import numpy as np


def filter_steps(weight: np.ndarray, bits: int) -> np.ndarray:
    """Return Δ of each filter, float64 [O], of a `bits`-bit mid-rise quantizer that reaches its largest |w|.

    With one bit the two levels are +-Δ / 2 = +-mean|w|, as in the deployed kernels. A filter of zeros has Δ
    1.
    """
    magnitudes = np.abs(weight.astype(np.float64)).reshape(weight.shape[0], -1)
    steps = 2.0 * magnitudes.mean(axis=1) if bits == 1 else magnitudes.max(axis=1) / 2 ** (bits - 1)
    return np.where(steps > 0, steps, 1.0)


def mid_rise(weight: np.ndarray, steps: np.ndarray, bits: int | None = None) -> np.ndarray:
    """Quantize weights [O, ...] with steps [O]: halves; pruned filters: 0 (the paper's appendix A).

    `bits` clips to the levels of so many bits, +-(2**(bits - 1) - 0.5); the paper does not clip.
    """
    column = (-1, *[1] * (weight.ndim - 1))
    steps = steps.reshape(column)
    levels = np.floor(weight / steps) + 0.5
    if bits is not None:
        limit = 2 ** (bits - 1) - 0.5
        levels = np.clip(levels, -limit, limit)
    pruned = (np.abs(weight) < steps / 2).reshape(weight.shape[0], -1).all(axis=1)
    return np.where(pruned.reshape(column), 0.0, levels)


def signal_levels(weight: np.ndarray, bits: int) -> np.ndarray:
    """W_int of weights [O, ...] with `bits` bits; weights pruned alone (exactly 0) have no signal."""
    return np.where(weight == 0, 0.0, mid_rise(weight, filter_steps(weight, bits), bits))


def esn_a(levels: np.ndarray) -> float:
    """Analog norm of one layer, `||W_int||²`."""
    return float(np.sum(np.square(levels)))


def esn_d(levels: np.ndarray, squared: bool = False) -> float:
    """Digital norm of one layer: the sum of `ceil(log2|W_int| + 1)` bits; zeros cost nothing.

    Erratum: the paper's equation 3 squares the bit counts, while its equations 6, 7 and figures (in bits) do
    not. The default is the plain sum; `squared` gives the literal equation 3.
    """
    bits = np.ceil(np.log2(np.abs(levels[levels != 0])) + 1)
    return float(np.sum(np.square(bits) if squared else bits))


def filter_bits(levels: np.ndarray) -> np.ndarray:
    """Bits of each filter, [O]: those of its largest |W_int|, `ceil(log2 max|W_int| + 1)`; pruned filters: 0.

    Erratum: for levels of +-0.5 alone the paper's equation 7 gives 0 bits, so that binary networks would cost
    nothing. Here a filter that is not pruned has 1 bit at least, its signs.
    """
    largest = np.abs(levels).reshape(levels.shape[0], -1).max(axis=1)
    bits = np.ceil(np.log2(np.where(largest > 0, largest, 1.0)) + 1)
    return np.where(largest > 0, np.maximum(bits, 1.0), 0.0)


def esn_d_filters(levels: np.ndarray, macs: float) -> float:
    """ESN'_d of one layer (equation 7): MACs of each filter times its bits; `macs` are the whole layer's."""
    return float(np.sum(filter_bits(levels)) * macs / levels.shape[0])


def esn_a_from_noise(signal: float, noise: float, nonzero: int) -> float:
    """ESN_a of one layer by equation 4, `S / N * ||W||_0 / 12`; infinite without noise.

    Equal to `esn_a` of the quantized layer where `signal` and `noise` are the sums of squares of its weights
    and of its quantization errors, and the errors are uniform.
    """
    return float(signal / noise * nonzero / 12) if noise > 0 else float("inf")


def esn(
    weights: Mapping[str, np.ndarray], bits: Mapping[str, int], uses: Mapping[str, float] | None = None
) -> tuple[float, float]:
    """Return (ESN_a, ESN_d) of a network: sums over its layers.

    Parameters
    ----------
    weights
        Float weights [O, ...] by site.
    bits
        Weight bits by site, at most 16.
    uses
        The factors c_l: 1 for each layer (memory) by default; the uses of each parameter, for computation.
    """
    analog = digital = 0.0
    for site, weight in weights.items():
        levels = signal_levels(weight, bits[site])
        factor = 1.0 if uses is None else uses[site]
        analog += factor * esn_a(levels)
        digital += factor * esn_d(levels)
    return analog, digital
