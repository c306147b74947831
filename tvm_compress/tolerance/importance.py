"""How early Algorithm 1 could do without each weight.

Source: TOCO, equations 17 and 18: `μ = K / Σ_k rho_k`, rho = 1 in iterations in which φ fell or is 0 already.
Erratum: the text calls a large μ a fast elimination and a low importance; by the equation it is the other way
round, since a weight that is gone in the first iteration has rho = 1 in all K and the least μ, 1.
"""

from collections.abc import Mapping

import numpy as np

Values = Mapping[str, np.ndarray]


class Importance:
    """Counts rho over the iterations."""

    def __init__(self, counts: Values | None = None, iterations: int = 0) -> None:
        self.counts = {name: np.asarray(value, np.int32) for name, value in (counts or {}).items()}
        self.iterations = iterations

    def update(self, before: Values, after: Values) -> None:
        """Count one iteration, given φ of every weight before and after it (0: nothing is left of it)."""
        self.iterations += 1
        for name, value in after.items():
            fell = (value < before[name]) | (value == 0)
            self.counts[name] = self.counts.get(name, np.zeros(value.shape, np.int32)) + fell

    def values(self) -> dict[str, np.ndarray]:
        """Return μ >= 1 by parameter, float64; infinite for weights whose φ never fell."""
        with np.errstate(divide="ignore"):
            return {name: self.iterations / count.astype(np.float64) for name, count in self.counts.items()}
