"""Running normalisation of what the agent sees: states by all that was seen, rewards by a moving average."""

import torch


class RunningStandardizer:
    """Centres and scales observations [.., S] by mean and deviation of all seen (Welford, float64)."""

    def __init__(self, size: int, clip: float = 5.0) -> None:
        self._count = 0
        self._mean = torch.zeros(size, dtype=torch.float64)
        self._squares = torch.zeros(size, dtype=torch.float64)
        self._clip = clip

    def update(self, observation: torch.Tensor) -> None:
        """Let one observation [S] count."""
        self._count += 1
        value = observation.double()
        delta = value - self._mean
        self._mean += delta / self._count
        self._squares += delta * (value - self._mean)

    def apply(self, observations: torch.Tensor) -> torch.Tensor:
        """Standardise; a feature that never varied becomes 0."""
        deviation = (self._squares / max(self._count, 1)).sqrt()
        scaled = (observations.double() - self._mean) / torch.where(deviation > 1e-8, deviation, torch.inf)
        return scaled.clamp(-self._clip, self._clip).float()

    def state_dict(self) -> dict[str, torch.Tensor | int]:
        """Count, mean and sum of squares."""
        return {"count": self._count, "mean": self._mean.clone(), "squares": self._squares.clone()}

    def load_state_dict(self, state: dict) -> None:
        """Restore `state_dict`'s values."""
        self._count = int(state["count"])
        self._mean = state["mean"].clone()
        self._squares = state["squares"].clone()


class MovingNormalizer:
    """Centres and scales rewards by moving averages of the sampled batches' mean and variance."""

    def __init__(self, factor: float = 0.5) -> None:
        self._factor = factor
        self._mean: float | None = None
        self._variance = 0.0

    def update(self, rewards: torch.Tensor) -> None:
        """Let one batch of rewards [B] count."""
        mean, variance = float(rewards.mean()), float(rewards.var(unbiased=False))
        if self._mean is None:
            self._mean, self._variance = mean, variance
            return
        self._mean += self._factor * (mean - self._mean)
        self._variance += self._factor * (variance - self._variance)

    def apply(self, rewards: torch.Tensor) -> torch.Tensor:
        """Normalise rewards [B]; they stay as they are before the first update."""
        if self._mean is None:
            return rewards
        return (rewards - self._mean) / max(self._variance**0.5, 1e-3)

    def state_dict(self) -> dict[str, float | None]:
        """Both averages."""
        return {"mean": self._mean, "variance": self._variance}

    def load_state_dict(self, state: dict) -> None:
        """Restore `state_dict`'s values."""
        self._mean, self._variance = state["mean"], state["variance"]
