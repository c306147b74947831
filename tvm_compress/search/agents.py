"""Who chooses the actions of an episode: DDPG, or the baselines random and fixed.

All see the same observations and share the reward of an episode over its transitions; which of the actions
(pruning, activation, weight) there are is the environment's business.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from tvm_compress.search.ddpg import DDPG, DDPGSettings
from tvm_compress.search.noise import NoiseSchedule, truncated_normal, warmup_levels
from tvm_compress.search.settings import SearchSettings

# Deviation of a site's warm-up action around its episode's level.
WARMUP_SIGMA = 0.2


@dataclass(frozen=True)
class Transition:
    """One step: what was seen [S], what was done [A]."""

    observation: torch.Tensor
    action: torch.Tensor


class Agent(Protocol):
    """Chooses actions and learns from the reward of each episode."""

    def phase(self, episode: int) -> str:
        """Name of the episode's phase: "warmup" or "search"."""
        ...

    def act(self, observation: torch.Tensor, episode: int) -> torch.Tensor:
        """Actions [A] in [0, 1] for an observation [S]."""
        ...

    def learn(self, transitions: Sequence[Transition], reward: float, episode: int) -> None:
        """Take note of an episode; its reward counts for every transition, the last of which is terminal."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on to the bit: tensors and plain values only."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s values."""
        ...


class DDPGAgent:
    """DDPG with random warm-up episodes, then truncated normal noise that decays.

    Parameters
    ----------
    state_size, action_size
        Lengths of observations and actions.
    warmup
        Episodes of random actions; nothing is optimised before their end. Each has levels of its own, see
        `warmup_levels` (the paper's warm-up draws every action alike).
    seed
        Of the initial weights, the batches, the noise and the warm-up.
    updates
        Gradient steps per transition that an episode added.
    """

    def __init__(
        self,
        state_size: int,
        action_size: int,
        warmup: int,
        seed: int,
        settings: DDPGSettings | None = None,
        noise: NoiseSchedule | None = None,
        updates: int = 1,
    ) -> None:
        learner_seed, noise_seed, warmup_seed = _seeds(seed, 3)
        self.learner = DDPG(state_size, action_size, learner_seed, settings)
        self._noise = noise or NoiseSchedule()
        self._generator = torch.Generator().manual_seed(noise_seed)
        self._warmup = warmup
        self._updates = updates
        self._levels = warmup_levels(warmup, action_size, torch.Generator().manual_seed(warmup_seed))

    def phase(self, episode: int) -> str:
        """Name of the episode's phase."""
        return "warmup" if episode < self._warmup else "search"

    def act(self, observation: torch.Tensor, episode: int) -> torch.Tensor:
        """Actions with the exploration of the episode."""
        self.learner.observe(observation)
        if episode < self._warmup:
            return truncated_normal(self._levels[episode].float(), WARMUP_SIGMA, self._generator)
        sigma = self._noise.sigma(episode - self._warmup)
        return truncated_normal(self.learner.act(observation), sigma, self._generator)

    def learn(self, transitions: Sequence[Transition], reward: float, episode: int) -> None:
        """Store the transitions and, from the end of the warm-up on, take gradient steps for each."""
        for index, transition in enumerate(transitions):
            last = index + 1 == len(transitions)
            # A terminal transition has no next observation; its own stands in and is masked out of the
            # target.
            following = transition if last else transitions[index + 1]
            self.learner.buffer.add(
                transition.observation, transition.action, reward, following.observation, last
            )
        if episode + 1 >= self._warmup:
            self.learner.update(len(transitions) * self._updates)

    def state_dict(self) -> dict[str, Any]:
        """State of the learner and of the noise."""
        return {"learner": self.learner.state_dict(), "noise": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s values."""
        self.learner.load_state_dict(state["learner"])
        self._generator.set_state(state["noise"])


class RandomAgent:
    """Baseline: levels drawn for each episode, sites around them; never learns."""

    def __init__(self, action_size: int, seed: int) -> None:
        self._action_size = action_size
        self._generator = torch.Generator().manual_seed(_seeds(seed, 1)[0])
        self._levels = torch.zeros(action_size)
        self._episode = -1

    def phase(self, episode: int) -> str:
        """Name of the episode's phase."""
        return "search"

    def act(self, observation: torch.Tensor, episode: int) -> torch.Tensor:
        """Actions around the episode's levels."""
        if episode != self._episode:
            self._episode = episode
            self._levels = torch.rand(self._action_size, generator=self._generator)
        return truncated_normal(self._levels, WARMUP_SIGMA, self._generator)

    def learn(self, transitions: Sequence[Transition], reward: float, episode: int) -> None:
        """Learn nothing."""

    def state_dict(self) -> dict[str, Any]:
        """State of the generator; an episode starts with it."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s values."""
        self._generator.set_state(state["generator"])
        self._episode = -1


class FixedAgent:
    """Baseline: the same actions at every site."""

    def __init__(self, action: Sequence[float]) -> None:
        self._action = torch.tensor(action, dtype=torch.float32)

    def phase(self, episode: int) -> str:
        """Name of the episode's phase."""
        return "search"

    def act(self, observation: torch.Tensor, episode: int) -> torch.Tensor:
        """Return the fixed actions."""
        return self._action.clone()

    def learn(self, transitions: Sequence[Transition], reward: float, episode: int) -> None:
        """Learn nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def make_agent(settings: SearchSettings, state_size: int, action_size: int) -> Agent:
    """Agent that the settings ask for."""
    if settings.strategy == "random":
        return RandomAgent(action_size, settings.seed)
    assert settings.strategy == "ddpg", settings.strategy
    return DDPGAgent(state_size, action_size, settings.warmup, settings.seed, updates=settings.updates)


def _seeds(seed: int, count: int) -> list[int]:
    return [
        int(value) for value in np.random.SeedSequence(seed).generate_state(count, np.uint64) >> np.uint64(1)
    ]
