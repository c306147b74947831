"""The quadratic model of a loss around trained weights, and its learning step."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class QuadraticModel:
    """`L̃(v) = Σ g (v - w) + ½ h (v - w)²`, separable over the weights.

    Parameters
    ----------
    weights, gradient, curvature
        w, g, h >= 0, arrays of one shape.

    Differs from the poster: h may be 0, and where it is the model is a line without a minimum. There the
    gradient is not followed: `target` keeps the weight as it is.
    """

    weights: np.ndarray
    gradient: np.ndarray
    curvature: np.ndarray

    @classmethod
    def damped(
        cls, weights: np.ndarray, gradient: np.ndarray, curvature: np.ndarray, damping: float
    ) -> "QuadraticModel":
        """Model with `damping` times the mean curvature added to each h.

        The model is good near the weights only, and where h is tiny its minimum lies far away.
        """
        h = np.asarray(curvature, np.float64)
        h = h + damping * h.mean() if damping else h
        return cls(np.asarray(weights, np.float64), np.asarray(gradient, np.float64), h)

    @property
    def target(self) -> np.ndarray:
        """The minimiser, `w - g / h`; w where h is 0."""
        if not self.gradient.any():
            return self.weights
        curved = self.curvature > 0
        return np.where(
            curved, self.weights - self.gradient / np.where(curved, self.curvature, 1.0), self.weights
        )

    def loss(self, values: np.ndarray) -> float:
        """`L̃` at other weights: the change of the loss that the model predicts."""
        change = np.ravel(values - self.weights)
        slope = float(self.gradient.ravel() @ change)
        bend = change * self.curvature.ravel()
        return slope + 0.5 * float(bend @ change)

    def penalty(self, metric: str) -> np.ndarray:
        """What μ is multiplied with, weight by weight; μ itself has no unit.

        "l2": the mean curvature everywhere, so that C steps are the poster's plain l2 projections.
        "curvature": h itself, so that C steps project in the metric of the loss. Where h is 0 a trace stands
        for it, for projections to be unique.
        """
        mean = float(self.curvature.mean()) or 1.0
        if metric == "l2":
            return np.full(self.curvature.shape, mean)
        return np.maximum(self.curvature, 1e-9 * mean)

    def learn(self, compressed: np.ndarray, mu: float, penalty: np.ndarray) -> np.ndarray:
        """L step: minimise `L̃(v) + μ/2 Σ penalty (v - Δ)²`, Δ the compressed weights.

        `v = (h w + μ p Δ - g) / (h + μ p)`; where h is 0, g counts as 0.
        """
        if mu == 0:
            return self.target
        strength = mu * penalty
        followed = np.where(self.curvature > 0, self.gradient, 0.0)
        pulled = self.curvature * self.weights + strength * compressed - followed
        return pulled / (self.curvature + strength)
