"""Ranges of the sites' inputs, from data, for the quantizers."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import tvm

from tvm_compress.errors import DataError, ModelError, SettingError
from tvm_compress.files import write_text
from tvm_compress.passes.integer_points import find_integer_points
from tvm_compress.twin import Twin

METHODS = ("mse", "kl", "minmax", "percentile", "moving_average")
VERSION = 2
BINS = 2048
# The share of the values that "percentile" leaves out at each end.
TAIL = 1e-4
# Weight of the past in "moving_average".
MEMORY = 0.9
# Candidate ranges of a search per pass, as shares of the observed bound.
_SHARES = np.linspace(1.0, 0.02, 99)
# Of the values that are not 0, the least share within a range that "kl" chooses.
LEAST_INSIDE = 0.75
# Probability that stands for none where a divergence is taken.
_NO_MASS = 1e-9


@dataclass(frozen=True)
class Observation:
    """What one tensor was seen to be.

    Attributes
    ----------
    low, high
        Smallest and largest value (with "moving_average": their moving averages over the batches).
    counts
        int64 [BINS]: how many values fell into each of equal bins between low and high; empty where the
        method needs none ("minmax").
    values
        How many values there were, also outside of low and high.
    """

    low: float
    high: float
    counts: np.ndarray
    values: int = 0

    @property
    def centers(self) -> np.ndarray:
        """Middles of the bins; the outermost bins stand for the bounds, where ReLU puts most values."""
        width = (self.high - self.low) / len(self.counts)
        centers = self.low + width * (np.arange(len(self.counts)) + 0.5)
        centers[0], centers[-1] = self.low, self.high
        return centers

    def clipped(self, low: float, high: float, bits: int) -> float:
        """Share of the values beyond what `bits` bits for [low, high] round to; 0.0 if nothing was counted.

        What lies outside of moving averages counts as beyond.
        """
        if not len(self.counts) or not self.values or self.low == self.high:
            return 0.0
        # Half a step beyond the last integer is still rounded to it; a bound may stand anywhere in a bin.
        slack = max((high - low) / (2**bits - 1), (self.high - self.low) / len(self.counts)) / 2
        inside = (self.centers >= low - slack) & (self.centers <= high + slack)
        return float(1 - self.counts[inside].sum() / self.values)


@dataclass(frozen=True)
class RangeReport:
    """What calibration made of one tensor, for people.

    Attributes
    ----------
    sites
        The sites that read it.
    bits
        Of the quantizer.
    seen_low, seen_high
        What was observed.
    low, high
        What the quantizer covers.
    clipped
        Share of the observed values that the first or last integer stands for though they lie beyond it.
    """

    sites: tuple[str, ...]
    bits: int
    seen_low: float
    seen_high: float
    low: float
    high: float
    clipped: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return vars(self) | {"sites": list(self.sites)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RangeReport":
        """Make the report that `to_dict` gave."""
        return cls(**{**values, "sites": tuple(values["sites"])})


class Calibration:
    """What the inputs of a module's sites were seen to be.

    Parameters
    ----------
    method
        How ranges follow from the observations. "mse": least squared error of the quantized values. "kl":
        least divergence of their distribution. "percentile": all values but a ten-thousandth at each end.
        "minmax", "moving_average": the bounds themselves.
    tensors
        Observations, each with the names of the sites that take this very tensor.
    """

    def __init__(self, method: str, tensors: Sequence[tuple[tuple[str, ...], Observation]]) -> None:
        if method not in METHODS:
            raise SettingError(
                f"Calibration method {method!r} is unknown.", f"Known are: {', '.join(METHODS)}."
            )
        self.method = method
        self.tensors = tuple(tensors)
        self._of_site = {site: index for index, (sites, _) in enumerate(tensors) for site in sites}
        self._ranges: dict[tuple[int, int], tuple[float, float]] = {}

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites whose inputs were observed."""
        return tuple(self._of_site)

    def range(self, site: str, bits: int) -> tuple[float, float]:
        """Return (low, high) that a quantizer of `bits` bits for the input of `site` shall cover.

        `low` is 0.0 where nothing negative was seen (after ReLU), else low < 0; `high >= 0`.

        Raises
        ------
        DataError
            If the site was not observed.
        SettingError
            If bits is not within 1 to 8.
        """
        if not 1 <= bits <= 8:
            raise SettingError(f"Activations are quantized to 1 to 8 bits, not {bits}.")
        if site not in self._of_site:
            raise DataError(f"The input of site {site!r} was not calibrated.", "Calibrate this very module.")
        key = self._of_site[site], bits
        if key not in self._ranges:
            self._ranges[key] = self._choose(self.tensors[key[0]][1], bits)
        return self._ranges[key]

    def _choose(self, seen: Observation, bits: int) -> tuple[float, float]:
        low, high = min(seen.low, 0.0), max(seen.high, 0.0)
        if self.method in ("minmax", "moving_average") or low == high or seen.low == seen.high:
            return low, high
        if self.method == "percentile":
            return _percentile_range(seen)
        if self.method == "kl":
            return _search_range(seen, bits, _divergences)
        return _search_range(seen, bits, _squared_errors)

    def report(self, bits: Mapping[str, int]) -> list[RangeReport]:
        """Give the ranges of the quantized sites' inputs and what they clip.

        Parameters
        ----------
        bits
            Activation bits of each quantized site. Sites of equal bits that read the same tensor stand in one
            entry.
        """
        rows = []
        for sites, seen in self.tensors:
            for width in sorted({bits[site] for site in sites if site in bits}, reverse=True):
                readers = tuple(site for site in sites if bits.get(site) == width)
                low, high = self.range(readers[0], width)
                row = RangeReport(
                    readers, width, seen.low, seen.high, low, high, seen.clipped(low, high, width)
                )
                rows.append(row)
        return rows

    def to_json(self) -> str:
        """Write as JSON text."""
        tensors = [
            {"sites": list(sites), **vars(seen), "counts": seen.counts.tolist()}
            for sites, seen in self.tensors
        ]
        return json.dumps({"version": VERSION, "method": self.method, "tensors": tensors}, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a file; it is never seen half-written."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Calibration":
        """Read what `save` wrote.

        Raises
        ------
        DataError
            If the file is missing, damaged, or of another version.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values["version"] != VERSION:
                raise DataError(f"The calibration {path} has version {values['version']!r}, not {VERSION}.")
            tensors = [_read_tensor(entry) for entry in values["tensors"]]
            return cls(values["method"], tensors)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"The calibration {path} cannot be read: {error!r}.", "Calibrate again."
            ) from error


def calibrate(module: tvm.IRModule, x: np.ndarray, method: str = "mse", batch_size: int = 256) -> Calibration:
    """Run `x` [N, C, H, W] (normalised) through a float module and observe the inputs of its sites.

    So it does with what functions and products between them read, see `passes.integer_points`.

    Memory does not grow with N: a first pass finds each tensor's bounds, a second counts a histogram between
    them ("minmax" needs the first only).

    Raises
    ------
    DataError
        If there are no images, or an activation is NaN or infinite (names the site).
    ModelError
        If the module is quantized already.
    """
    if method not in METHODS:
        raise SettingError(f"Calibration method {method!r} is unknown.", f"Known are: {', '.join(METHODS)}.")
    if len(x) == 0:
        raise DataError("There are no images to calibrate with.")
    twin = Twin(module)
    if twin.stage not in ("float", "annotated"):
        raise ModelError(f"Calibration takes a float module, not one of stage {twin.stage!r}.")
    others = {point.name: point.tensor for point in find_integer_points(module["main"])}
    bounds = _observe_bounds(twin, x, others, method, batch_size)
    counts = {sites: np.zeros(0 if method == "minmax" else BINS, np.int64) for sites in bounds}
    values = dict.fromkeys(bounds, 0)

    def count(sites: tuple[str, ...], value: torch.Tensor) -> None:
        low, high = bounds[sites]
        values[sites] += value.numel()
        if low < high:
            counts[sites] += torch.histc(value, BINS, low, high).numpy().astype(np.int64)

    if method != "minmax":
        twin.site_inputs(x, callback=count, batch_size=batch_size, others=others)
    observed = [(s, Observation(*bounds[s], counts[s], values[s])) for s in bounds]
    return Calibration(method, observed)


def _observe_bounds(
    twin: Twin, x: np.ndarray, others: Mapping[str, tvm.relax.Var], method: str, batch_size: int
) -> dict[tuple[str, ...], tuple[float, float]]:
    bounds: dict[tuple[str, ...], tuple[float, float]] = {}

    def observe(sites: tuple[str, ...], value: torch.Tensor) -> None:
        low, high = (float(bound) for bound in torch.aminmax(value))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise DataError(
                f"The input of site {sites[0]!r} holds NaN or infinite values.",
                "Check the images and the model's parameters.",
            )
        if sites in bounds:
            old = bounds[sites]
            if method == "moving_average":
                low, high = (MEMORY * o + (1 - MEMORY) * n for o, n in zip(old, (low, high), strict=True))
            else:
                low, high = min(old[0], low), max(old[1], high)
        bounds[sites] = low, high

    twin.site_inputs(x, callback=observe, batch_size=batch_size, others=others)
    return bounds


def _read_tensor(entry: dict[str, Any]) -> tuple[tuple[str, ...], Observation]:
    counts = np.asarray(entry["counts"], np.int64)
    seen = Observation(float(entry["low"]), float(entry["high"]), counts, int(entry["values"]))
    return tuple(entry["sites"]), seen


def _percentile_range(seen: Observation) -> tuple[float, float]:
    """Leave out a share `TAIL` of the values at each end (at none where nothing is negative)."""
    edges = np.linspace(seen.low, seen.high, len(seen.counts) + 1)
    below = np.cumsum(seen.counts)
    total = below[-1]
    high = float(edges[1 + int(np.searchsorted(below, total * (1 - TAIL)))])
    low = float(edges[int(np.searchsorted(below, total * TAIL, side="right"))])
    return (min(low, 0.0) if seen.low < 0 else 0.0), max(high, 0.0)


# Loss of each candidate range [K], whose low bounds, high bounds, or both are [K].
_Bounds: TypeAlias = np.ndarray | float
_Loss: TypeAlias = Callable[[Observation, _Bounds, _Bounds, int], np.ndarray]


def _search_range(seen: Observation, bits: int, loss: _Loss) -> tuple[float, float]:
    """Return the range with the least loss over the histogram, as the quantizer would compute it.

    High and low bound are searched in turns, twice, then once more around the best.
    """
    bottom, top = min(seen.low, 0.0), max(seen.high, 0.0)
    low, high = bottom, top
    for shares in (_SHARES, _SHARES, None):
        for side in ("high", "low"):
            bound, current = (top, high) if side == "high" else (bottom, low)
            if bound == 0.0:
                continue
            around = current / bound + np.linspace(-0.015, 0.015, 31)
            candidates = bound * (shares if shares is not None else around[(around > 0) & (around <= 1)])
            lows, highs = (low, candidates) if side == "high" else (candidates, high)
            best = float(candidates[int(np.argmin(loss(seen, lows, highs, bits)))])
            low, high = (low, best) if side == "high" else (best, high)
    return low, high


def _grid(low: _Bounds, high: _Bounds, bits: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Scale and zero point, [K, 1], of a grid of 2**bits levels that holds 0, and its last level."""
    low, high = (np.reshape(np.asarray(bound, np.float64), (-1, 1)) for bound in (low, high))
    levels = 2**bits - 1
    scale = (high - low) / levels
    return scale, np.clip(np.rint(-low / scale), 0, levels), levels


def _squared_errors(seen: Observation, low: _Bounds, high: _Bounds, bits: int) -> np.ndarray:
    """Sum of count * (x - x̂)² for each candidate range [K]."""
    used = seen.counts > 0
    values, counts = seen.centers[used], seen.counts[used].astype(np.float64)
    scale, zero_point, levels = _grid(low, high, bits)
    q = np.clip(np.rint(values / scale) + zero_point, 0, levels)
    return (((q - zero_point) * scale - values) ** 2 @ counts).ravel()


def _divergences(seen: Observation, low: _Bounds, high: _Bounds, bits: int) -> np.ndarray:
    """KL(p || q) for each candidate range [K] (Migacz 2017, "8-bit inference with TensorRT").

    p is the histogram with what lies outside of the range moved to its outermost bins; q is the histogram
    inside of the range, levelled over the bins that become the same integer. The bin that holds 0 is left
    out, where ReLU leaves a peak that the grid represents exactly. Ranges that clip most values do not count:
    of a distribution that is a single bin, the divergence is 0 again.
    """
    centers = seen.centers
    used = (seen.counts > 0) & (np.arange(BINS) != np.argmin(np.abs(centers)))
    values, counts = centers[used], seen.counts[used].astype(np.float64)
    scales, zero_points, levels = _grid(low, high, bits)
    found = np.full(len(scales), np.inf)
    for k, (scale, zero_point) in enumerate(zip(scales[:, 0], zero_points[:, 0], strict=True)):
        steps = np.rint(values / scale) + zero_point
        inside = np.flatnonzero((steps >= 0) & (steps <= levels))
        if not len(inside) or counts[inside].sum() < LEAST_INSIDE * counts.sum():
            continue
        first, last = inside[0], inside[-1]
        p = counts[first : last + 1].copy()
        level = steps[first : last + 1].astype(np.int64)
        mass = np.bincount(level, p, levels + 1)
        q = (mass / np.maximum(np.bincount(level, minlength=levels + 1), 1))[level]
        p[0] += counts[:first].sum()
        p[-1] += counts[last + 1 :].sum()
        p, q = p / p.sum(), np.maximum(q / q.sum(), _NO_MASS)
        found[k] = float(np.sum(p * np.log(p / q)))
    # All equal where nothing but zeros was seen: the whole range then.
    return found
