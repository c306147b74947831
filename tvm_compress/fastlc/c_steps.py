"""The compression steps: each gives the weights nearest to given ones that it can express.

A step takes weights and their importance (None: all equal; else the projection is in that weighted norm).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tvm_compress.fastlc.exact import largest
from tvm_compress.fastlc.kmeans import gather, kmeans_codebook, nearest
from tvm_compress.passes.factorize import as_matrix, from_matrix, truncate

_FIXED_CANDIDATES = 24
_FIXED_ITERATIONS = 8


class CStep(Protocol):
    """A projection onto the weights that some kind of compression can express."""

    def __call__(self, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """Give the nearest compressed weights, the same shape."""


def _energy(weights: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return weights**2 if importance is None else importance * weights**2


def _ones_where_none(weights: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return np.ones_like(weights) if importance is None else importance


@dataclass(frozen=True)
class Prune:
    """Keep the `kept` largest weights; the others become 0."""

    kept: int

    def __call__(self, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """Apply the step."""
        return np.where(largest(_energy(weights, importance), self.kept), weights, 0.0)


@dataclass(frozen=True)
class PruneGroups:
    """Keep whole groups of weights, at most `kept` weights in all.

    Groups go in the order of their mean energy per weight. Where all have one size that is the nearest such
    vector; with several sizes it is the usual greedy solution of a knapsack problem.

    Attributes
    ----------
    groups
        int, the shape of the weights: which group each is in, from 0.
    """

    kept: int
    groups: np.ndarray

    def __call__(self, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """Apply the step."""
        return np.where(self.mask(_energy(weights, importance)), weights, 0.0)

    def mask(self, gains: np.ndarray) -> np.ndarray:
        """Which weights are kept, by what each is worth."""
        labels = self.groups.ravel()
        sizes = np.bincount(labels)
        sums = np.bincount(labels, weights=np.asarray(gains).ravel(), minlength=len(sizes))
        order = np.argsort(-sums / np.maximum(sizes, 1), kind="stable")
        fits = np.cumsum(sizes[order]) <= self.kept
        chosen = np.zeros(len(sizes), bool)
        chosen[order[fits]] = True
        return chosen[self.groups]


class _PerRow:
    """A step on each tensor, or on each output channel of it alone."""

    per_channel: bool

    def __call__(self, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """Apply the step."""
        rows = weights.reshape(len(weights) if self.per_channel else 1, -1)
        scales = [None] * len(rows) if importance is None else importance.reshape(rows.shape)
        return np.stack([self._row(row, h) for row, h in zip(rows, scales, strict=True)]).reshape(
            weights.shape
        )

    def _row(self, row: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        raise NotImplementedError


@dataclass(frozen=True)
class KMeans(_PerRow):
    """Values of a codebook of 2**bits entries, the codebook found too."""

    bits: int
    per_channel: bool = False

    def _row(self, row: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        codebook = kmeans_codebook(row, 2**self.bits, importance)
        return codebook[nearest(row, codebook)]


@dataclass(frozen=True)
class FixedPoint(_PerRow):
    """Whole multiples of a step, within ±(2**(bits - 1) - 1) of them, the step found too (bits >= 2)."""

    bits: int
    per_channel: bool = False

    def _row(self, row: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        limit = 2 ** (self.bits - 1) - 1
        h = _ones_where_none(row, importance)
        top = float(np.abs(row).max())
        if top == 0.0:
            return np.zeros_like(row)

        # The step is found on the values put together; the nearest multiples are taken of each.
        values, mass = gather(row, h)

        def grid(step: float, at: np.ndarray) -> np.ndarray:
            return np.clip(np.rint(at / step), -limit, limit)

        def error(step: float) -> float:
            return float(np.sum(mass * (values - step * grid(step, values)) ** 2))

        # From clipping nothing down to clipping all but a tenth of the range.
        step = min(top / limit * np.linspace(1.0, 0.1, _FIXED_CANDIDATES), key=error)
        least = error(step)
        for _ in range(_FIXED_ITERATIONS):
            whole = grid(step, values)
            total = float(np.sum(mass * whole**2))
            if total == 0.0:
                break
            better = float(np.sum(mass * values * whole)) / total
            found = error(better)
            if found >= least:
                break
            step, least = better, found
        return step * grid(step, row)


@dataclass(frozen=True)
class Binary(_PerRow):
    """-a and +a, a found too; or -1 and +1 where `scaled` is False. 0 becomes positive."""

    scaled: bool = True
    per_channel: bool = False

    def _row(self, row: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        h = _ones_where_none(row, importance)
        size = float(np.sum(h * np.abs(row)) / np.sum(h)) if self.scaled else 1.0
        return np.where(row >= 0, size, -size)


@dataclass(frozen=True)
class Ternary(_PerRow):
    """-a, 0 and +a, a found too.

    With size a, the weights beyond a/2 are not 0; so those are the first in the order of |w|, and the best a
    for each number of them is their weighted mean. All numbers are tried.
    """

    per_channel: bool = False

    def _row(self, row: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        h = _ones_where_none(row, importance)
        order = np.argsort(-np.abs(row), kind="stable")
        first, mass = np.cumsum((h * np.abs(row))[order]), np.cumsum(h[order])
        count = int(np.argmax(first**2 / np.maximum(mass, np.finfo(float).tiny)))
        size = first[count] / mass[count] if mass[count] else 0.0
        result = np.zeros_like(row)
        result[order[: count + 1]] = size * np.sign(row[order[: count + 1]])
        return result


def row_and_column_factors(importance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Square roots of a factor per row and one per column, with the marginals of a matrix of importances."""
    mean = float(importance.mean()) or 1.0
    rows, columns = (np.maximum(importance.mean(axis=axis), 1e-12 * mean) for axis in (1, 0))
    return np.sqrt(rows), np.sqrt(columns / mean)


@dataclass(frozen=True)
class LowRank:
    """Matrices of a given rank (see `passes.factorize` for how a convolution becomes one).

    With an importance the nearest matrix is not known in closed form. It is for importances that are a
    product of one factor per row and one per column, and the nearest of these (in the marginals) is taken.
    """

    rank: int
    factorization: str = "channel"

    def __call__(self, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """Apply the step."""
        matrix = as_matrix(weights, self.factorization)
        if importance is None:
            return from_matrix(truncate(matrix, self.rank), weights.shape, self.factorization)
        rows, columns = row_and_column_factors(as_matrix(importance, self.factorization))
        scaled = truncate(rows[:, None] * matrix * columns, self.rank)
        return from_matrix(scaled / rows[:, None] / columns, weights.shape, self.factorization)


@dataclass(frozen=True)
class Sum:
    """A sum of several compressed parts, such as sparse and low rank.

    Each part in turn takes what the others leave, `rounds` times; the error never grows where each part is an
    exact projection. The first one sees the whole: sparse parts stand first, or outliers bend the others.
    """

    parts: Sequence[CStep]
    rounds: int = 8

    def __call__(self, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """Apply the step."""
        return np.sum(self.split(weights, importance), axis=0)

    def split(self, weights: np.ndarray, importance: np.ndarray | None = None) -> list[np.ndarray]:
        """Give the parts one by one."""
        found = [np.zeros_like(weights) for _ in self.parts]
        for _ in range(self.rounds):
            for position, part in enumerate(self.parts):
                others = sum(value for other, value in enumerate(found) if other != position)
                found[position] = part(weights - others, importance)
        return found
