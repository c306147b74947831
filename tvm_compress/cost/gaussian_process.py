"""A Gaussian process on kernel features: smooth where the latency model's trees have steps.

Kernels of shapes between measured ones come out nearer to the truth than by trees, kernels unlike all others
do not; the latency model takes the mean of both. Covariance: Matérn with smoothness 3/2 (Rasmussen and
Williams 2006, equation 4.17) over features that are put on a logarithmic scale and standardised.
"""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_compress.cost.features import FEATURE_NAMES

# Distances over which kernels tell of each other, in standard deviations of a feature; the one with the least
# error on left-out rows is taken.
LENGTHS = (4.0, 8.0, 16.0)
# Variance of what features do not say, and of timing, in squares of the logarithm: 3 %.
NOISE = 1e-3
# More rows than these cost minutes; the first ones stand for all.
MOST_ROWS = 6000

# A feature that varies less says nothing.
SAME = 1e-4
# Features that are logarithms, shares or marks already.
_AS_THEY_ARE = np.asarray(
    [name.startswith(("log2_", "share_", "kind_", "backend_")) for name in FEATURE_NAMES]
)


@dataclass(frozen=True)
class GaussianProcess:
    """A fitted process.

    Attributes
    ----------
    points
        Where it was fitted: [N, F] float32, standardised.
    center, spread
        Of the features [F] on their scale; a spread of 0 leaves a feature out.
    weights
        Of the covariances to the points, [N].
    mean
        Far from all points.
    length
        Of `LENGTHS`.
    """

    points: np.ndarray
    center: np.ndarray
    spread: np.ndarray
    weights: np.ndarray
    mean: float
    length: float

    def predict(self, vectors: np.ndarray) -> np.ndarray:
        """Expected values [n] at feature vectors [n, F]."""
        near = _covariance(_standardized(vectors, self.center, self.spread), self.points, self.length)
        return self.mean + near @ self.weights

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        arrays = {name: getattr(self, name) for name in ("points", "center", "spread", "weights")}
        coded = {
            name: {"shape": list(array.shape), "float32": base64.b64encode(array.astype("<f4")).decode()}
            for name, array in arrays.items()
        }
        return coded | {"mean": self.mean, "length": self.length}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GaussianProcess":
        """Process from `to_dict`'s values."""
        arrays = {
            name: np.frombuffer(base64.b64decode(values[name]["float32"]), "<f4").reshape(
                values[name]["shape"]
            )
            for name in ("points", "center", "spread", "weights")
        }
        return cls(**arrays, mean=float(values["mean"]), length=float(values["length"]))


def fit(vectors: np.ndarray, target: np.ndarray) -> tuple[GaussianProcess, np.ndarray]:
    """Fit to rows [N, F] with values [N]; also what it would predict for each row [N] without having seen it.

    Rows beyond `MOST_ROWS` are predicted, not learned.
    """
    seen = vectors[:MOST_ROWS]
    scaled = _scaled(seen)
    # As a file keeps them: the same predictions before and after.
    center, spread = scaled.mean(axis=0).astype(np.float32), scaled.std(axis=0).astype(np.float32)
    spread[spread < SAME] = 0
    points = _standardized(seen, center, spread)
    mean = float(np.median(target))
    off = target[: len(seen)] - mean
    best: tuple[float, np.ndarray, np.ndarray, float] | None = None
    for length in LENGTHS:
        inverse = np.linalg.inv(_covariance(points, points, length) + NOISE * np.eye(len(points)))
        weights = inverse @ off
        # What a row's absence changes follows from the inverse alone (Rasmussen and Williams, equation 5.12).
        missed = weights / np.diag(inverse)
        error = float(np.mean(np.abs(missed)))
        if best is None or error < best[0]:
            best = error, weights, missed, length
    assert best is not None
    _, weights, missed, length = best
    process = GaussianProcess(points, center, spread, weights.astype(np.float32), mean, length)
    unseen = process.predict(vectors[MOST_ROWS:]) if len(vectors) > MOST_ROWS else np.zeros(0)
    return process, np.concatenate([target[: len(seen)] - missed, unseen])


def _scaled(vectors: np.ndarray) -> np.ndarray:
    """Features on the scale on which ratios of sizes are distances."""
    vectors = np.asarray(vectors, np.float64)
    return np.where(_AS_THEY_ARE, vectors, np.sign(vectors) * np.log2(1 + np.abs(vectors)))


def _standardized(vectors: np.ndarray, center: np.ndarray, spread: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (_scaled(vectors) - center) / spread
    return np.where(spread > 0, found, 0.0).astype(np.float32)


def _covariance(a: np.ndarray, b: np.ndarray, length: float) -> np.ndarray:
    """Matérn 3/2, float64 [len(a), len(b)]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    distances = np.sqrt(3 * np.maximum(squares, 0)) / length
    return (1 + distances) * np.exp(-distances)
