"""Deep deterministic policy gradient, as the search paper uses it.

Differences from the paper ("Proposed Agents") and from its authors' published tool:

- The last step of an episode is terminal: its target is the reward alone. (In the published tool the last
  state bootstraps into itself.)
- Gradient steps are taken per transition that an episode added (1 by default here, 4 in a search, see
  `SearchSettings.updates`); the published tool takes one per episode.
- The reward baseline is a moving average of the means of the sampled batches, factor 0.5 as in the published
  tool; the paper gives none. Rewards are also divided by a moving deviation, since with beta = -3 they span
  two decades between the first policies and the last.
- Standardised states are clipped to [-5, 5]: a feature that hardly varied so far would otherwise explode.
- The actor's last layer starts with small weights (Lillicrap et al., section 7), so that all actions start at
  0.5.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from tvm_compress.search.normalize import MovingNormalizer, RunningStandardizer
from tvm_compress.search.replay import Batch, ReplayBuffer


@dataclass(frozen=True)
class DDPGSettings:
    """Hyperparameters; the defaults are the paper's."""

    hidden: tuple[int, int] = (400, 300)
    discount: float = 0.99
    target_rate: float = 0.001
    actor_rate: float = 1e-4
    critic_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    critic_weight_decay: float = 0.0
    buffer_size: int = 2000
    batch_size: int = 128


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: small layers gain nothing from more, and sums come out the same anywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _linear(inputs: int, outputs: int, bound: float, generator: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=generator)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


class Actor(nn.Module):
    """Observations [B, S] -> actions [B, A] in (0, 1)."""

    def __init__(
        self, state_size: int, action_size: int, hidden: tuple[int, int], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.first = _linear(state_size, hidden[0], state_size**-0.5, generator)
        self.second = _linear(hidden[0], hidden[1], hidden[0] ** -0.5, generator)
        self.last = _linear(hidden[1], action_size, 3e-3, generator)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Return the actions of standardised observations."""
        hidden = F.relu(self.second(F.relu(self.first(observations))))
        return torch.sigmoid(self.last(hidden))


class Critic(nn.Module):
    """Observations [B, S] and actions [B, A] -> values [B]."""

    def __init__(
        self, state_size: int, action_size: int, hidden: tuple[int, int], generator: torch.Generator
    ) -> None:
        super().__init__()
        inputs = state_size + action_size
        self.first = _linear(inputs, hidden[0], inputs**-0.5, generator)
        self.second = _linear(hidden[0], hidden[1], hidden[0] ** -0.5, generator)
        self.last = _linear(hidden[1], 1, 3e-3, generator)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Return the expected discounted sum of normalised rewards."""
        hidden = F.relu(self.first(torch.cat([observations, actions], dim=1)))
        return self.last(F.relu(self.second(hidden))).squeeze(1)


class DDPG:
    """Actor and critic with their targets, optimizers, replay buffer and running statistics.

    Parameters
    ----------
    state_size, action_size
        Lengths S of an observation and A of an action.
    seed
        Of everything random here: initial weights and the batches drawn. No global random state is used.
    """

    def __init__(
        self, state_size: int, action_size: int, seed: int, settings: DDPGSettings | None = None
    ) -> None:
        self.settings = settings or DDPGSettings()
        self.generator = torch.Generator().manual_seed(seed)
        hidden = self.settings.hidden
        self.actor = Actor(state_size, action_size, hidden, self.generator)
        self.critic = Critic(state_size, action_size, hidden, self.generator)
        self._target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self._target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        betas = self.settings.betas
        self._actor_optimizer = torch.optim.Adam(self.actor.parameters(), self.settings.actor_rate, betas)
        self._critic_optimizer = torch.optim.Adam(
            self.critic.parameters(),
            self.settings.critic_rate,
            betas,
            weight_decay=self.settings.critic_weight_decay,
        )
        self.buffer = ReplayBuffer(self.settings.buffer_size, state_size, action_size)
        self.states = RunningStandardizer(state_size)
        self.rewards = MovingNormalizer()

    def act(self, observation: torch.Tensor) -> torch.Tensor:
        """Action [A] of an observation [S], without noise."""
        with torch.no_grad(), _one_thread():
            return self.actor(self.states.apply(observation)[None])[0]

    def observe(self, observation: torch.Tensor) -> None:
        """Let an observation [S] count for the standardisation."""
        self.states.update(observation)

    def update(self, steps: int) -> None:
        """Take gradient steps, each on a batch of its own. Without transitions this does nothing."""
        with _one_thread():
            for _ in range(steps if len(self.buffer) else 0):
                self._step(self.buffer.sample(self.settings.batch_size, self.generator))

    def targets(self, batch: Batch) -> torch.Tensor:
        """Right sides of the Bellman equation, [B]: a terminal transition is worth its reward alone."""
        with torch.no_grad():
            following = self.states.apply(batch.next_observations)
            values = self._target_critic(following, self._target_actor(following))
            rewards = self.rewards.apply(batch.rewards)
            return rewards + self.settings.discount * (1.0 - batch.dones) * values

    def _step(self, batch: Batch) -> None:
        self.rewards.update(batch.rewards)
        targets = self.targets(batch)
        observations = self.states.apply(batch.observations)
        self._critic_optimizer.zero_grad()
        F.mse_loss(self.critic(observations, batch.actions), targets).backward()
        self._critic_optimizer.step()
        self._actor_optimizer.zero_grad()
        (-self.critic(observations, self.actor(observations)).mean()).backward()
        self._actor_optimizer.step()
        self._follow(self._target_actor, self.actor)
        self._follow(self._target_critic, self.critic)

    def _follow(self, target: nn.Module, source: nn.Module) -> None:
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), source.parameters(), strict=True):
                slow.lerp_(fast, self.settings.target_rate)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on to the bit: tensors and plain values only."""
        return {name: copy.deepcopy(part.state_dict()) for name, part in self._parts().items()} | {
            "generator": self.generator.get_state()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s values."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])

    def _parts(self) -> dict[str, Any]:
        return {
            "actor": self.actor,
            "critic": self.critic,
            "target_actor": self._target_actor,
            "target_critic": self._target_critic,
            "actor_optimizer": self._actor_optimizer,
            "critic_optimizer": self._critic_optimizer,
            "buffer": self.buffer,
            "states": self.states,
            "rewards": self.rewards,
        }
