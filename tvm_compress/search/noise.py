"""Exploration: truncated normal noise that decays (search paper, equation 7), and the warm-up's levels."""

import math
from dataclasses import dataclass

import torch

_SQRT2 = math.sqrt(2.0)


def truncated_normal(mean: torch.Tensor, sigma: float, generator: torch.Generator) -> torch.Tensor:
    """Sample N(mean, sigma^2) truncated to [0, 1], elementwise, by inverting the distribution function.

    Parameters
    ----------
    mean
        Any shape, values in [0, 1].
    sigma
        Standard deviation before truncation; 0 returns the mean.
    """
    if sigma <= 0.0:
        return mean.clone()
    mean64 = mean.double()
    low = 0.5 * (1.0 + torch.erf((0.0 - mean64) / (sigma * _SQRT2)))
    high = 0.5 * (1.0 + torch.erf((1.0 - mean64) / (sigma * _SQRT2)))
    uniform = torch.rand(mean.shape, generator=generator, dtype=torch.float64)
    quantile = low + uniform * (high - low)
    sample = mean64 + sigma * _SQRT2 * torch.erfinv(2.0 * quantile - 1.0)
    return sample.clamp(0.0, 1.0).to(mean.dtype)


@dataclass(frozen=True)
class NoiseSchedule:
    """Deviation of the exploration noise: `initial * decay**k` in the k-th episode after the warm-up."""

    initial: float = 0.5
    decay: float = 0.95

    def sigma(self, episodes_after_warmup: int) -> float:
        """Deviation in an episode, counted from 0 at the end of the warm-up."""
        return self.initial * self.decay**episodes_after_warmup


def warmup_levels(episodes: int, actions: int, generator: torch.Generator) -> torch.Tensor:
    """Mean action of each warm-up episode, shape [episodes, actions]: a Latin hypercube over [0, 1].

    Actions that are independent at every site average out: all such policies compress about alike, and the
    agent sees nothing of light and strong compression. So each warm-up episode has a level of its own per
    action, around which its sites vary.
    """
    columns = []
    for _ in range(actions):
        order = torch.randperm(episodes, generator=generator)
        offset = torch.rand(episodes, generator=generator, dtype=torch.float64)
        columns.append((order + offset) / max(episodes, 1))
    return torch.stack(columns, dim=1) if columns else torch.zeros(episodes, 0, dtype=torch.float64)
