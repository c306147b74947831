"""Replay buffer: the transitions that the agent learns from, oldest forgotten first."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Batch:
    """Transitions: (next_)observations [B, S], actions [B, A], rewards [B], dones [B] (0 or 1)."""

    observations: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    next_observations: torch.Tensor
    dones: torch.Tensor


class ReplayBuffer:
    """Ring of at most `capacity` transitions. Observations are kept as seen, before standardisation."""

    def __init__(self, capacity: int, state_size: int, action_size: int) -> None:
        self._capacity = capacity
        self._columns = {
            "observations": torch.zeros(capacity, state_size),
            "actions": torch.zeros(capacity, action_size),
            "rewards": torch.zeros(capacity),
            "next_observations": torch.zeros(capacity, state_size),
            "dones": torch.zeros(capacity),
        }
        self._added = 0

    def __len__(self) -> int:
        return min(self._added, self._capacity)

    def add(
        self,
        observation: torch.Tensor,
        action: torch.Tensor,
        reward: float,
        next_observation: torch.Tensor,
        done: bool,
    ) -> None:
        """Add one transition, in the place of the oldest when full."""
        row = self._added % self._capacity
        values = (observation, action, reward, next_observation, float(done))
        for column, value in zip(self._columns.values(), values, strict=True):
            column[row] = torch.as_tensor(value)
        self._added += 1

    def sample(self, size: int, generator: torch.Generator) -> Batch:
        """Draw `size` different transitions at random (all, shuffled, if there are fewer)."""
        rows = torch.randperm(len(self), generator=generator)[:size]
        return Batch(**{name: column[rows] for name, column in self._columns.items()})

    def state_dict(self) -> dict[str, torch.Tensor | int]:
        """Everything needed to go on: the filled rows and how many were ever added."""
        filled = len(self)
        return {name: column[:filled].clone() for name, column in self._columns.items()} | {
            "added": self._added
        }

    def load_state_dict(self, state: dict[str, torch.Tensor | int]) -> None:
        """Restore `state_dict`'s values."""
        for name, column in self._columns.items():
            values = state[name]
            assert isinstance(values, torch.Tensor)
            column[: len(values)] = values
        self._added = int(state["added"])
