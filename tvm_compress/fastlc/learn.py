"""The learning-compression loop on the quadratic model."""

from dataclasses import dataclass

import numpy as np

from tvm_compress.errors import SettingError
from tvm_compress.fastlc.c_steps import CStep
from tvm_compress.fastlc.quadratic import QuadraticModel

METRICS = ("curvature", "l2")


@dataclass(frozen=True)
class MuSchedule:
    """How the penalty grows: 0, then `start * growth**k`, `steps` values in all, in units of the curvature.

    Raises
    ------
    SettingError
        Unless start > 0, growth > 1 and steps >= 1.
    """

    start: float = 1e-3
    growth: float = 2.0
    steps: int = 24

    def values(self) -> list[float]:
        """The values of μ, ascending; the first L step is free."""
        return [0.0, *(self.start * self.growth**k for k in range(self.steps - 1))]

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.growth > 1 and self.steps >= 1):
            raise SettingError(
                f"The penalty starts at {self.start}, grows by {self.growth} for {self.steps} steps, but "
                "must start above 0, grow by more than 1, for at least 1 step.",
            )


@dataclass(frozen=True)
class Learned:
    """What the loop found.

    Attributes
    ----------
    value
        Compressed weights, the best of all that were met.
    loss
        The model's loss there; `direct_loss` at the direct compression of the weights.
    steps
        How many L and C steps were taken.
    """

    value: np.ndarray
    loss: float
    direct_loss: float
    steps: int


def learn(
    model: QuadraticModel,
    compress: CStep,
    schedule: MuSchedule | None = None,
    metric: str = "curvature",
    tolerance: float = 1e-6,
) -> Learned:
    """Minimise the model's loss over what `compress` can express.

    Alternates `v <- argmin L̃(v) + μ/2 ||v - Δ||²` (L) and `Δ <- compress(v)` (C) while μ grows, from the
    direct compression of the weights on, until both agree.

    Differs from the poster in two ways. The result is the best Δ that was met, so it is never worse than the
    direct compression. And the norm of the penalty may be that of the curvature ("curvature", the default):
    the C step then projects in it. With "l2", as in the poster, alternation cannot find the exact pruning:
    from the first L step on, kept weights stand at their best values while pruned ones only shrink, so the
    weights that are kept are those of largest |w - g/h|, whatever the curvature.

    Raises
    ------
    SettingError
        On an unknown metric.
    """
    if metric not in METRICS:
        raise SettingError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}.")
    schedule = schedule or MuSchedule()
    penalty = model.penalty(metric)
    importance = penalty if metric == "curvature" else None
    best = compress(model.weights, None)
    direct_loss = loss = model.loss(best)
    compressed = best
    scale = _norm(model.weights, penalty) or 1.0
    steps = 0
    for mu in schedule.values():
        learned = model.learn(compressed, mu, penalty)
        before, compressed = compressed, compress(learned, importance)
        steps += 1
        found = model.loss(compressed)
        if found < loss:
            best, loss = compressed, found
        # In the curvature's norm the L steps move along the line to Δ, whose projection stays Δ.
        still = metric == "curvature" and _norm(before - compressed, penalty) <= tolerance * scale
        if still or _norm(learned - compressed, penalty) <= tolerance * scale:
            break
    return Learned(best, loss, direct_loss, steps)


def _norm(values: np.ndarray, penalty: np.ndarray) -> float:
    return float(np.sqrt(np.sum(penalty * values**2)))
