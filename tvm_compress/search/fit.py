"""From the trials of a search to the policies that are worth fine-tuning: measured anew and fitted.

Widths come in steps and the agent hits the budget from either side. What is left of it is accuracy for
nothing, and a policy a little over it is not lost: its least sensitive channels go.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tvm_compress.passes.groups import CoupledSet
from tvm_compress.passes.policy import BitserialRules, CompressionPolicy, channels_after
from tvm_compress.search.environment import reward_of
from tvm_compress.search.problem import SearchProblem
from tvm_compress.search.results import EpisodeResult, Trial, pareto_front
from tvm_compress.search.settings import SearchSettings

# A latency that exceeds the budget by no more than this share still meets it: as close as a measurement is.
BUDGET_TOLERANCE = 0.02

# So often a policy is narrowed: sums of kernels may say that it meets the budget where the network does not.
ROUNDS = 3

# Added to a step's divergence, so that steps which cost none differ by what they save.
_LEAST_DIVERGENCE = 1e-4


def meets_budget(ratio: float, budget: float) -> bool:
    """Whether a latency ratio keeps to the budget, a measurement's error allowed."""
    return ratio <= budget * (1.0 + BUDGET_TOLERANCE)


def likely_winners(trials: Sequence[Trial], settings: SearchSettings) -> list[Trial]:
    """Trials that are worth a second look: more than will be fine-tuned.

    As many of the highest rewards, and as many of the Pareto set next to the budget: the fastest beyond it
    and the most accurate within it, in turn. Trials with the same sites count once.
    """
    by_reward = sorted(trials, key=lambda t: (-t.reward, t.episode))
    front = pareto_front(list(trials))
    within = [t for t in reversed(front) if meets_budget(t.result.ratio, settings.budget)]
    beyond = [t for t in front if not meets_budget(t.result.ratio, settings.budget)]
    near = [t for pair in _zip_longest(beyond, within) for t in pair]
    chosen: list[Trial] = []
    for candidates, count in ((by_reward, settings.refine), (near, settings.refine)):
        target = len(chosen) + count
        for trial in candidates:
            if len(chosen) == target:
                break
            if all(trial.policy.sites != other.policy.sites for other in chosen):
                chosen.append(trial)
    return chosen


def _zip_longest(first: Sequence[Trial], second: Sequence[Trial]) -> Iterator[list[Trial]]:
    for index in range(max(len(first), len(second))):
        yield [*first[index : index + 1], *second[index : index + 1]]


def choose(trials: Sequence[Trial], settings: SearchSettings) -> list[Trial]:
    """Pick the trials to fine-tune: the most accurate within the budget, then the highest rewards."""
    within = [t for t in trials if meets_budget(t.result.ratio, settings.budget)]
    others = [t for t in trials if not meets_budget(t.result.ratio, settings.budget)]
    within.sort(key=lambda t: (-t.result.accuracy, t.episode))
    others.sort(key=lambda t: (-t.reward, t.episode))
    return [*within, *others][: settings.refine]


class Judge(Protocol):
    """Tells what a policy is worth, or only how fast it is, which is cheaper to find out."""

    def evaluate(self, policy: CompressionPolicy, episode: int) -> EpisodeResult:
        """Result of a policy."""
        ...

    def ratio(self, policy: CompressionPolicy) -> float:
        """Latency of a policy over the dense model's."""
        ...


@dataclass(frozen=True)
class _Step:
    """A policy one width further, and what that costs: divergence for each multiply-accumulate."""

    price: float
    group: str
    policy: CompressionPolicy


class BudgetFit:
    """Makes policies finer and wider, or narrower, until they use the budget; the last of each is measured.

    Parameters
    ----------
    rules
        Of the target: changed widths may make bit-serial sites legal or not.
    evaluator
        One that measures what it evaluates thoroughly: of many short measurements (or predictions) those that
        look best are also the luckiest, and what is chosen by them alone would miss the budget on the day.
    """

    def __init__(
        self, problem: SearchProblem, rules: BitserialRules, evaluator: Judge, settings: SearchSettings
    ) -> None:
        self._problem = problem
        self._rules = rules
        self._evaluator = evaluator
        self._settings = settings

    def fit(self, trial: Trial) -> Trial:
        """Measure a trial again, with the most bits that cost nothing, and narrow it to the budget.

        The steps go by the evaluator's `ratio`; what is handed over has met the budget as a whole network, or
        came as near as `ROUNDS` let it.
        """
        policy, budget = trial.policy, self._settings.budget
        ratio = self._evaluator.ratio(policy)
        finer = self._with_most_bits(policy)
        if finer is not None:
            with_more = self._evaluator.ratio(finer)
            if with_more <= max(budget, ratio * (1 + BUDGET_TOLERANCE)):
                policy, ratio = finer, with_more
        for _ in range(ROUNDS):
            if not meets_budget(ratio, budget):
                policy, ratio = self._narrowed(policy, ratio, budget)
            judged = self._judged(trial, policy)
            if meets_budget(judged.result.ratio, self._settings.budget):
                break
            # What the whole network needs beyond the ratio that the steps go by is taken off the budget.
            budget = self._settings.budget * ratio / judged.result.ratio
        return judged

    def fit_balanced(self, trial: Trial) -> Trial | None:
        """Fit a trial's schemes with all channels, which then go by sensitivity only.

        What few episodes found by chance may have cut one set too far, and another not at all. None where
        nothing was cut.
        """
        sites = {name: replace(site, channels=None, kept=None) for name, site in trial.policy.sites.items()}
        whole = replace(trial.policy, sites=sites)
        whole = whole.legalize(self._problem.sites, self._rules, self._problem.sets)
        return None if whole == trial.policy else self.fit(replace(trial, policy=whole))

    def _judged(self, trial: Trial, policy: CompressionPolicy) -> Trial:
        result = self._evaluator.evaluate(policy, trial.episode)
        reward = reward_of(result, self._settings.budget, self._settings.beta)
        return replace(trial, policy=policy, result=result, reward=reward)

    def widen(self, trial: Trial) -> Trial:
        """Give channels back while the budget lasts, step by step: first what costs the most divergence.

        What misses the budget after all, once it is measured, gets less back in another round, and in the end
        nothing.
        """
        measured, summed = trial.result.ratio, self._evaluator.ratio(trial.policy)
        for _ in range(ROUNDS):
            policy, summed = self._widened(trial.policy, summed, self._settings.budget * summed / measured)
            if policy == trial.policy:
                break
            wide = self._judged(trial, policy)
            if meets_budget(wide.result.ratio, self._settings.budget):
                return wide
            measured = wide.result.ratio
        return trial

    def _widened(
        self, policy: CompressionPolicy, ratio: float, budget: float
    ) -> tuple[CompressionPolicy, float]:
        """Give back as many channels as a budget allows; the ratio that is left is given too."""
        full = set[str]()
        while options := [step for step in self._steps(policy, wider=True) if step.group not in full]:
            step = max(options, key=lambda one: (one.price, one.group))
            wider = self._evaluator.ratio(step.policy)
            if wider <= budget:
                policy, ratio = step.policy, wider
            else:
                full.add(step.group)
        return policy, ratio

    def _narrowed(
        self, policy: CompressionPolicy, ratio: float, budget: float
    ) -> tuple[CompressionPolicy, float]:
        """Take as few channels as meet the budget; the ratio is given too.

        Of ever narrower policies the first that meets it.
        """
        path = [policy]
        while (narrower := self._narrower(path[-1])) is not None:
            path.append(narrower)
        macs = [self._macs(policy) for policy in path] + [0.0]
        # Between what misses the budget and what meets it (at last a network of nothing), latency is taken to
        # go with the MACs: that needs fewer measurements than halving.
        low, slow = 0, ratio
        high, fast = len(path), 0.0
        while high - low > 1:
            share = (slow - budget) / max(slow - fast, 1e-9)
            wanted = macs[low] - share * (macs[low] - macs[high])
            middle = next(i for i in range(low + 1, high + 1) if macs[i] <= wanted or i == high)
            middle = min(max(middle, low + 1), high - 1)
            ratio = self._evaluator.ratio(path[middle])
            if meets_budget(ratio, budget):
                high, fast = middle, ratio
            else:
                low, slow = middle, max(ratio, budget)
        # Where none is fast enough, the narrowest.
        return (path[high], fast) if high < len(path) else (path[-1], ratio)

    def _with_most_bits(self, policy: CompressionPolicy) -> CompressionPolicy | None:
        # Where kernels multiply bytes, a site of 2 bits takes as long as one of 6.
        most = self._problem.max_bits
        sites = {
            name: replace(site, weight_bits=most, activation_bits=most)
            if site.scheme == "bitserial"
            else site
            for name, site in policy.sites.items()
        }
        return None if sites == policy.sites else replace(policy, sites=sites)

    def _narrower(self, policy: CompressionPolicy) -> CompressionPolicy | None:
        """Take one step off the set that loses the least divergence for the MACs that it saves."""
        steps = self._steps(policy, wider=False)
        return min(steps, key=lambda one: (one.price, one.group)).policy if steps else None

    def _steps(self, policy: CompressionPolicy, wider: bool) -> list["_Step"]:
        """Steps to the next width of each set that may be pruned."""
        steps = []
        macs = self._macs(policy)
        for group in self._problem.sets:
            if not group.prunable or "pruning" not in self._problem.actions:
                continue
            divergences = {0.0: 0.0, **self._divergences(group)}
            before = _removed(policy, group)
            known = max(share for share in divergences if share <= before + 1e-6)
            for share in sorted(divergences, reverse=wider):
                channels = _kept(group, share)
                # Widths are whole: a step that ends where it began is none.
                change = channels - _kept(group, before)
                if change == 0 or (change > 0) != wider:
                    continue
                candidate = self._with_channels(policy, group, channels)
                lost = abs(divergences[share] - divergences[known]) + _LEAST_DIVERGENCE
                price = lost / max(abs(macs - self._macs(candidate)), 1.0)
                steps.append(_Step(price, group.name, candidate))
                break
        return steps

    def _divergences(self, group: CoupledSet) -> dict[float, float]:
        for name in group.producers:
            table = self._problem.sensitivity.get(name, {}).get("pruning")
            if table:
                return dict(table)
        return {}

    def _with_channels(
        self, policy: CompressionPolicy, group: CoupledSet, channels: int
    ) -> CompressionPolicy:
        sites = dict(policy.sites)
        for name in group.producers:
            whole = channels == group.channels
            sites[name] = replace(policy[name], channels=None if whole else channels, kept=None)
        changed = replace(policy, sites=sites)
        return changed.legalize(self._problem.sites, self._rules, self._problem.sets)

    def _macs(self, policy: CompressionPolicy) -> float:
        left = channels_after(self._problem.sites, self._problem.sets, policy)
        return sum(
            site.macs * (left[site.name][0] / site.in_channels) * (left[site.name][1] / site.out_channels)
            for site in self._problem.sites
        )


def _kept(group: CoupledSet, removed: float) -> int:
    return max(1, round((1 - removed) * group.channels))


def _removed(policy: CompressionPolicy, group: CoupledSet) -> float:
    """Share of a set's channels that a policy removes."""
    counts = [n for n in (policy[name].channels for name in group.producers) if n is not None]
    return 1 - min(counts, default=group.channels) / group.channels
