"""Weighted k-means in one dimension: fast by sorting; exact, by dynamic programming, for few values."""

import numpy as np

# Up to so many values the optimum is computed; beyond it Lloyd's iteration runs from several starts.
_EXACT_VALUES = 256
_ITERATIONS = 200
# More values than that are put together in as many bins.
_MOST_VALUES = 2**17


def kmeans_codebook(values: np.ndarray, k: int, importance: np.ndarray | None = None) -> np.ndarray:
    """Give the k values, ascending, with the least Σ importance (v - nearest)²; fewer where v has fewer.

    The clusters of an optimum in one dimension are runs of the sorted values, so that one sort and prefix
    sums make an iteration of Lloyd's cost O(k log n).

    Parameters
    ----------
    values, importance
        Any shape; importance >= 0 (all equal where None; values of importance 0 have no say).
    k
        At least 1.
    """
    flat = np.asarray(values, np.float64).ravel()
    weights = np.ones_like(flat) if importance is None else np.asarray(importance, np.float64).ravel()
    if not weights.any():
        weights = np.ones_like(flat)
    line = _Line(*gather(flat, weights))
    if line.distinct <= k:
        return np.unique(line.values)
    if len(line.values) <= _EXACT_VALUES:
        return line.centres(_exact_bounds(line, k))
    results = [_lloyd(line, start) for start in _starts(line, k)]
    return min(results, key=line.error)


def gather(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sort values of weight above 0; many are first put together in narrow bins, each at its weighted mean.

    Means over runs of bins are exact then; only the ends of runs are no finer than a bin.

    Returns
    -------
    Ascending values, and their weights.
    """
    if len(values) <= _MOST_VALUES or values.min() == values.max():
        used = weights > 0
        values, weights = values[used], weights[used]
        order = np.argsort(values, kind="stable")
        return values[order], weights[order]
    low, high = float(values.min()), float(values.max())
    places = ((values - low) * ((_MOST_VALUES - 1) / (high - low))).astype(np.int64)
    mass = np.bincount(places, weights)
    first = np.bincount(places, weights * (values - low))
    used = mass > 0
    return first[used] / mass[used] + low, mass[used]


def nearest(values: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Give the index of each value's nearest entry of an ascending codebook (the lower one among equals)."""
    return np.searchsorted((codebook[1:] + codebook[:-1]) / 2, values)


class _Line:
    """Sorted values with prefix sums of their moments."""

    def __init__(self, values: np.ndarray, weights: np.ndarray) -> None:
        self.values = values
        # Centred, so that differences of prefix sums keep their digits.
        self.origin = float(np.average(values, weights=weights))
        centred = values - self.origin
        self.mass, self.first, self.second = (
            np.concatenate([[0.0], np.cumsum(weights * centred**power)]) for power in (0, 1, 2)
        )
        self.distinct = int(np.count_nonzero(np.diff(values))) + 1

    def centres(self, bounds: np.ndarray) -> np.ndarray:
        """Mean of each run [bounds[j], bounds[j + 1]) that is not empty."""
        mass = np.diff(self.mass[bounds])
        full = np.diff(bounds) > 0
        return np.diff(self.first[bounds])[full] / mass[full] + self.origin

    def bounds(self, codebook: np.ndarray) -> np.ndarray:
        """Where each entry's run begins, and the end of the last."""
        inner = np.searchsorted(self.values, (codebook[1:] + codebook[:-1]) / 2, side="right")
        return np.concatenate([[0], inner, [len(self.values)]])

    def run_error(self, start: np.ndarray | int, stop: np.ndarray | int) -> np.ndarray:
        """Weighted squares around the mean of runs [start, stop)."""
        mass, first = self.mass[stop] - self.mass[start], self.first[stop] - self.first[start]
        second = self.second[stop] - self.second[start]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(mass > 0, second - first**2 / mass, 0.0)

    def error(self, codebook: np.ndarray) -> float:
        """Weighted squares around the nearest entries, these being means of their runs."""
        bounds = self.bounds(codebook)
        return float(self.run_error(bounds[:-1], bounds[1:]).sum())


def _starts(line: _Line, k: int) -> list[np.ndarray]:
    """Codebooks to start from: equal masses, equal steps, and the density that is best for many entries."""
    middles = (np.arange(k) + 0.5) / k
    values = line.values
    places = np.searchsorted(line.mass[1:], middles * line.mass[-1])
    quantiles = values[np.minimum(places, len(values) - 1)]
    steps = values[0] + (values[-1] - values[0]) * middles
    # Panter and Dite: the density of entries goes with the cube root of the density of values.
    edges = np.linspace(values[0], values[-1], 513)
    mass = np.diff(np.interp(edges, values, line.mass[1:], left=0.0))
    companded = np.concatenate([[0.0], np.cumsum(np.cbrt(np.maximum(mass, 0.0)))])
    dense = np.interp(middles * companded[-1], companded, edges)
    return [np.unique(quantiles), np.unique(steps), np.unique(dense)]


def _lloyd(line: _Line, codebook: np.ndarray) -> np.ndarray:
    bounds = line.bounds(codebook)
    for _ in range(_ITERATIONS):
        codebook = line.centres(bounds)
        moved = line.bounds(codebook)
        if len(moved) == len(bounds) and (moved == bounds).all():
            break
        bounds = moved
    return line.centres(bounds)


def _exact_bounds(line: _Line, k: int) -> np.ndarray:
    """Bounds of an optimum's k runs: `best_j(stop) = min_start best_{j-1}(start) + error(start, stop)`."""
    count = len(line.values)
    starts, stops = np.arange(count)[:, None], np.arange(1, count + 1)[None, :]
    errors = np.where(starts < stops, line.run_error(np.minimum(starts, stops), stops), np.inf)
    best = errors[0]  # one run, ending after value i
    choices = []
    for _ in range(1, k):
        # The last run begins at `start`: the runs before it end with value start - 1.
        options = np.concatenate([[np.inf], best[:-1]])[:, None] + errors
        chosen = options.argmin(axis=0)
        choices.append(chosen)
        best = options[chosen, np.arange(count)]
    bounds = [count]
    for chosen in reversed(choices):
        bounds.append(int(chosen[bounds[-1] - 1]))
    return np.array([0, *reversed(bounds)])
