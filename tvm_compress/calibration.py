"""Ranges of the sites' inputs, from data, for the quantizers."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm

from tvm_compress.errors import DataError, ModelError, SettingError
from tvm_compress.files import write_text
from tvm_compress.twin import Twin

METHODS = ("mse", "minmax", "percentile", "moving_average")
VERSION = 1
BINS = 2048
# The share of the values that "percentile" leaves out at each end.
TAIL = 1e-4
# Weight of the past in "moving_average".
MEMORY = 0.9
# Candidate ranges of the MSE search per pass, as shares of the observed bound.
_SHARES = np.linspace(1.0, 0.02, 99)


@dataclass(frozen=True)
class Observation:
    """What one tensor was seen to be.

    Attributes
    ----------
    low, high
        Smallest and largest value (with "moving_average": their moving averages over the batches).
    counts
        int64 [BINS]: how many values fell into each of equal bins between low and high; empty where the
        method needs none.
    """

    low: float
    high: float
    counts: np.ndarray

    @property
    def centers(self) -> np.ndarray:
        """Middles of the bins; the outermost bins stand for the bounds, where ReLU puts most values."""
        width = (self.high - self.low) / len(self.counts)
        centers = self.low + width * (np.arange(len(self.counts)) + 0.5)
        centers[0], centers[-1] = self.low, self.high
        return centers


class Calibration:
    """What the inputs of a module's sites were seen to be.

    Parameters
    ----------
    method
        How ranges follow from the observations: "mse", "minmax", "percentile" or "moving_average".
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
        return _mse_range(seen, bits)

    def to_json(self) -> str:
        """Write as JSON text."""
        tensors = [
            {"sites": list(sites), "low": seen.low, "high": seen.high, "counts": seen.counts.tolist()}
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

    Memory does not grow with N: a first pass finds each tensor's bounds, a second counts a histogram between
    them.

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
    bounds = _observe_bounds(twin, x, method, batch_size)
    if method in ("minmax", "moving_average"):
        empty = np.zeros(0, np.int64)
        return Calibration(method, [(s, Observation(low, high, empty)) for s, (low, high) in bounds.items()])
    counts = {sites: np.zeros(BINS, np.int64) for sites in bounds}

    def count(sites: tuple[str, ...], value: torch.Tensor) -> None:
        low, high = bounds[sites]
        if low < high:
            counts[sites] += torch.histc(value, BINS, low, high).numpy().astype(np.int64)

    twin.site_inputs(x, callback=count, batch_size=batch_size)
    return Calibration(method, [(s, Observation(low, high, counts[s])) for s, (low, high) in bounds.items()])


def _observe_bounds(
    twin: Twin, x: np.ndarray, method: str, batch_size: int
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

    twin.site_inputs(x, callback=observe, batch_size=batch_size)
    return bounds


def _read_tensor(entry: dict[str, Any]) -> tuple[tuple[str, ...], Observation]:
    counts = np.asarray(entry["counts"], np.int64)
    return tuple(entry["sites"]), Observation(float(entry["low"]), float(entry["high"]), counts)


def _percentile_range(seen: Observation) -> tuple[float, float]:
    """Leave out a share `TAIL` of the values at each end (at none where nothing is negative)."""
    edges = np.linspace(seen.low, seen.high, len(seen.counts) + 1)
    below = np.cumsum(seen.counts)
    total = below[-1]
    high = float(edges[1 + int(np.searchsorted(below, total * (1 - TAIL)))])
    low = float(edges[int(np.searchsorted(below, total * TAIL, side="right"))])
    return (min(low, 0.0) if seen.low < 0 else 0.0), max(high, 0.0)


def _mse_range(seen: Observation, bits: int) -> tuple[float, float]:
    """Return the range with the least squared error over the histogram, as the quantizer would compute it.

    High and low bound are searched in turns, twice, then once more around the best.
    """
    used = seen.counts > 0
    values, counts = seen.centers[used], seen.counts[used].astype(np.float64)
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
            errors = _squared_errors(values, counts, lows, highs, bits)
            best = float(candidates[int(np.argmin(errors))])
            low, high = (low, best) if side == "high" else (best, high)
    return low, high


def _squared_errors(
    values: np.ndarray, counts: np.ndarray, low: np.ndarray | float, high: np.ndarray | float, bits: int
) -> np.ndarray:
    """Sum of count * (x - x̂)² for each candidate range [K], x̂ on a grid of 2**bits levels that holds 0."""
    low, high = (np.reshape(np.asarray(bound, np.float64), (-1, 1)) for bound in (low, high))
    levels = 2**bits - 1
    scale = (high - low) / levels
    zero_point = np.clip(np.rint(-low / scale), 0, levels)
    q = np.clip(np.rint(values / scale) + zero_point, 0, levels)
    return (((q - zero_point) * scale - values) ** 2 @ counts).ravel()
