"""The search as a gymnasium environment: one step per decision site, the reward at the end."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np

from tvm_compress.search.observation import Previous, SiteObservation, observe
from tvm_compress.search.problem import PolicyDraft, SearchProblem
from tvm_compress.search.results import EpisodeResult, Evaluator

# No field of an observation comes near this; gymnasium wants a bound.
_LARGEST = 1e6


def reward_of(result: EpisodeResult, budget: float, beta: float) -> float:
    """Reward of a policy: `accuracy + beta * |ratio / budget - 1|`, beta < 0 (search paper, equation 6)."""
    return result.accuracy + beta * abs(result.ratio / budget - 1.0)


class CompressionEnv(gymnasium.Env):
    """An episode decides the sites in order; its last step evaluates the policy.

    Observations are `SiteObservation` vectors, float32 [S]; actions float32 [A] in [0, 1], A = 1 (pruning), 2
    (quantization: activation, weight) or 3 (joint: pruning, activation, weight). A pruning action counts at
    the first site of a prunable coupled set; its other sites follow. Rewards are 0 but for the last step's;
    whoever learns gives that one to every step, as the paper does. The last step's `info` holds "policy" and
    "result".

    Parameters
    ----------
    problem
        What is decided.
    evaluator
        Tells what a policy is worth.
    budget, beta
        Of the reward.
    found_by
        Written into the policies.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    def __init__(
        self,
        problem: SearchProblem,
        evaluator: Evaluator,
        budget: float,
        beta: float = -3.0,
        found_by: str = "search",
    ) -> None:
        self.problem = problem
        self._evaluator = evaluator
        self._budget = budget
        self._beta = beta
        self._found_by = found_by
        self._sites = problem.decision_sites()
        self._episode = -1
        self._start()
        size = SiteObservation.size()
        self.observation_space = gymnasium.spaces.Box(-_LARGEST, _LARGEST, (size,), np.float32)
        self.action_space = gymnasium.spaces.Box(0.0, 1.0, (len(problem.actions),), np.float32)

    def _start(self) -> None:
        self._step = 0
        self._previous = Previous()
        self._draft = PolicyDraft(self.problem)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode; `options` may give its number as {"episode": n}, else one is counted up."""
        super().reset(seed=seed)
        self._episode = (options or {}).get("episode", self._episode + 1)
        self._start()
        return self._observe(), {}

    def step(
        self, action: Sequence[float] | np.ndarray
    ) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Decide the next site."""
        assert self._step < len(self._sites), "reset() begins the next episode"
        site = self._sites[self._step]
        values = np.clip(np.asarray(action, np.float64).ravel(), 0.0, 1.0)
        named = dict(zip(self.problem.actions, values.tolist(), strict=True))
        self._draft.decide(site, named)
        precision = self._draft.precision(site)
        bits = {"activation_bits": precision.activation_bits / 8, "weight_bits": precision.weight_bits / 8}
        self._previous = Previous(**named, **bits)
        self._step += 1
        if self._step < len(self._sites):
            return self._observe(), 0.0, False, False, {}
        policy = self._draft.to_policy(self._found_by)
        result = self._evaluator.evaluate(policy, self._episode)
        self._step -= 1  # the observation of a finished episode is its last site's
        last = self._observe()
        self._step += 1
        info = {"policy": policy, "result": result}
        return last, reward_of(result, self._budget, self._beta), True, False, info

    def _observe(self) -> np.ndarray:
        return observe(self.problem, self._draft, self._sites[self._step], self._previous).vector()
