"""Trials are measured anew and fitted to the budget before one is chosen."""

import dataclasses

import pytest

from tests.tvm_compress.search_doubles import FormulaEvaluator, problem
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.search.fit import BudgetFit, choose, likely_winners
from tvm_compress.search.results import EpisodeResult, Trial
from tvm_compress.search.settings import SearchSettings

SHARES = {0.25: 0.1, 0.5: 0.3, 0.75: 0.9}
# The middle set is the one that bears the least: it goes last.
SENSITIVITY = {
    "stem": {"pruning": {share: 2 * omega for share, omega in SHARES.items()}},
    "conv1": {"pruning": SHARES},
    "conv2": {"pruning": {share: 1000 * omega for share, omega in SHARES.items()}},
}
NETWORK = problem(sensitivity=SENSITIVITY)
RULES = rules_for(parse_target("host"))


def trial(episode: int = 0, **channels: int) -> Trial:
    sites = {site.name: SitePolicy(channels.get(site.name)) for site in NETWORK.sites}
    policy = CompressionPolicy(sites, target="host", rounding=8)
    result = FormulaEvaluator(NETWORK).evaluate(policy, episode)
    return Trial(episode, "search", policy, [], result, 0.0, 0.0)


def fit(one: Trial, budget: float, agent: str = "joint", evaluator: FormulaEvaluator | None = None) -> Trial:
    network = dataclasses.replace(NETWORK, agent=agent)
    settings = SearchSettings(budget=budget, agent=agent)
    return BudgetFit(network, RULES, evaluator or FormulaEvaluator(network), settings).fit(one)


def test_the_most_sensitive_sets_widen_first_while_the_budget_lasts() -> None:
    cut = trial(stem=24, conv1=16, conv2=32, down=32)
    # Each of the five sites is a fifth of the cost: the pair's next step costs 0.1, conv1's 0.05.
    settings = SearchSettings(budget=cut.result.ratio + 0.12)
    wide = BudgetFit(NETWORK, RULES, FormulaEvaluator(NETWORK), settings).widen(cut)
    assert wide.policy["conv2"].channels == wide.policy["down"].channels == 48
    assert wide.policy["conv1"].channels == 16
    assert cut.result.ratio < wide.result.ratio <= settings.budget
    plenty = SearchSettings(budget=1.0)
    whole = BudgetFit(NETWORK, RULES, FormulaEvaluator(NETWORK), plenty).widen(cut)
    assert {site.channels for site in whole.policy.sites.values()} == {None}
    assert BudgetFit(NETWORK, RULES, FormulaEvaluator(NETWORK), plenty).widen(whole) == whole


def test_what_is_too_slow_loses_its_least_sensitive_channels() -> None:
    slow = trial()
    budget = slow.result.ratio * 0.8
    narrow = fit(slow, budget)
    assert narrow.result.ratio <= budget * 1.02
    assert narrow.policy["conv2"].channels is None
    assert narrow.policy["conv1"].channels is not None
    assert narrow.policy["conv1"].channels < 64


class LowSums(FormulaEvaluator):
    """Sums of kernels that miss a third of what whole networks take."""

    def ratio(self, policy: CompressionPolicy) -> float:
        return super().ratio(policy) * 2 / 3


def test_a_network_that_is_slower_than_its_kernels_is_narrowed_again() -> None:
    slow = trial()
    budget = slow.result.ratio * 0.8
    narrow = fit(slow, budget, evaluator=LowSums(NETWORK))
    assert narrow.policy == fit(slow, budget).policy
    assert narrow.result.ratio <= budget * 1.02
    evaluator = LowSums(NETWORK)
    assert fit(slow, 0.01, evaluator=evaluator).result.ratio > 0.01
    assert evaluator.calls < 20


def test_widening_goes_by_what_the_whole_network_takes() -> None:
    cut = trial(stem=24, conv1=16, conv2=32, down=32)
    settings = SearchSettings(budget=cut.result.ratio + 0.12)
    honest = BudgetFit(NETWORK, RULES, FormulaEvaluator(NETWORK), settings).widen(cut)
    assert BudgetFit(NETWORK, RULES, LowSums(NETWORK), settings).widen(cut) == honest

    class Surprise(FormulaEvaluator):
        """Whatever is changed takes twice as long as its kernels."""

        def evaluate(self, policy: CompressionPolicy, episode: int) -> EpisodeResult:
            result = super().evaluate(policy, episode)
            return dataclasses.replace(result, ratio=2 * result.ratio) if episode else result

    late = dataclasses.replace(cut, episode=1)
    assert BudgetFit(NETWORK, RULES, Surprise(NETWORK), settings).widen(late) == late


def test_what_was_widened_too_far_keeps_some_of_it() -> None:
    class Steep(FormulaEvaluator):
        """Whole networks whose latency grows faster than that of their kernels."""

        def evaluate(self, policy: CompressionPolicy, episode: int) -> EpisodeResult:
            result = super().evaluate(policy, episode)
            return dataclasses.replace(result, ratio=result.ratio + 0.6 * max(0.0, result.ratio - low))

        def ratio(self, policy: CompressionPolicy) -> float:
            return super().evaluate(policy, 0).ratio

    cut = trial(stem=8, conv1=8, conv2=16, down=16)
    low = cut.result.ratio
    settings = SearchSettings(budget=low + 0.4)
    wide = BudgetFit(NETWORK, RULES, Steep(NETWORK), settings).widen(cut)
    assert low < wide.result.ratio <= settings.budget * 1.02


def test_a_budget_out_of_reach_ends() -> None:
    evaluator = FormulaEvaluator(NETWORK)
    narrow = fit(trial(), 0.01, evaluator=evaluator)
    assert narrow.result.ratio > 0.01
    assert evaluator.calls < 20


def test_bits_that_cost_nothing_are_given_back() -> None:
    class Bytes(FormulaEvaluator):
        """A machine that takes as long for 2 bits as for 6."""

        def evaluate(self, policy: CompressionPolicy, episode: int) -> EpisodeResult:
            accurate = super().evaluate(policy, episode).accuracy
            sites = {n: SitePolicy(s.channels, s.kept, "int8", 8, 8) for n, s in policy.sites.items()}
            result = super().evaluate(dataclasses.replace(policy, sites=sites), episode)
            return dataclasses.replace(result, accuracy=accurate)

    coarse = trial()
    sites = {n: SitePolicy(None, None, "bitserial", 2, 3) for n in coarse.policy.sites}
    coarse = dataclasses.replace(coarse, policy=dataclasses.replace(coarse.policy, sites=sites))
    fine = fit(coarse, 0.3, evaluator=Bytes(NETWORK))
    assert {(s.weight_bits, s.activation_bits) for s in fine.policy.sites.values()} == {(6, 6)}
    # Here they cost, and the budget is spent.
    cost = FormulaEvaluator(NETWORK).evaluate(coarse.policy, 0).ratio
    assert fit(coarse, cost).policy == coarse.policy


@pytest.mark.parametrize("budget", [0.3, 1.0])
def test_an_agent_that_must_not_prune_leaves_the_channels(budget: float) -> None:
    whole = trial()
    assert fit(whole, budget, agent="quantization").policy == whole.policy


def test_a_lucky_measurement_is_found_out() -> None:
    honest, lucky = trial(0, stem=16, conv1=16), trial(1, conv2=48, down=48)
    flattered = dataclasses.replace(
        lucky, result=dataclasses.replace(lucky.result, ratio=honest.result.ratio), reward=9.0
    )
    settings = SearchSettings(budget=honest.result.ratio, agent="quantization", refine=1)
    assert choose([honest, flattered], settings) == [flattered]
    assert likely_winners([honest, flattered], settings)[0] == flattered
    network = dataclasses.replace(NETWORK, agent="quantization")
    fitting = BudgetFit(network, RULES, FormulaEvaluator(network), settings)
    fitted = [fitting.fit(t) for t in likely_winners([honest, flattered], settings)]
    assert {t.episode: t.result.ratio for t in fitted}[1] == lucky.result.ratio
    assert [t.episode for t in choose(fitted, settings)] == [0]


def measured(episode: int, accuracy: float, ratio: float, reward: float, bits: int) -> Trial:
    policy = CompressionPolicy(sites={"conv1": SitePolicy(None, None, "bitserial", bits, bits)})
    base = trial(episode)
    result = dataclasses.replace(base.result, accuracy=accuracy, ratio=ratio, latency=ratio)
    return dataclasses.replace(base, policy=policy, result=result, reward=reward)


def test_likely_winners_are_different_and_near_the_budget() -> None:
    trials = [
        measured(0, 0.90, 0.50, 0.90, 3),
        measured(1, 0.90, 0.50, 0.90, 3),  # the same sites
        measured(2, 0.95, 0.60, 0.30, 4),  # the fastest beyond the budget
        measured(3, 0.92, 0.45, 0.60, 5),  # the most accurate within it
        measured(4, 0.80, 0.20, -1.0, 6),
        measured(5, 0.99, 0.90, -0.5, 2),
    ]
    settings = SearchSettings(budget=0.5, refine=1)
    assert [t.episode for t in likely_winners(trials, settings)] == [0, 2]
    assert [t.episode for t in choose(trials, settings)] == [3]
    slow = [dataclasses.replace(t, result=dataclasses.replace(t.result, ratio=2.0)) for t in trials]
    assert [t.episode for t in choose(slow, settings)] == [0]


def test_halving_finds_the_first_policy_within_the_budget() -> None:
    whole = trial()
    settings = SearchSettings(budget=0.5 * whole.result.ratio)
    evaluator = FormulaEvaluator(NETWORK)
    found = BudgetFit(NETWORK, RULES, evaluator, settings).fit(whole)
    assert found.result.ratio <= 1.02 * settings.budget
    assert evaluator.calls <= 6
    # One step wider misses it: no other policy of the path was skipped.
    path = [whole.policy]
    fitting = BudgetFit(NETWORK, RULES, FormulaEvaluator(NETWORK), settings)
    while found.policy not in path:
        path.append(fitting._narrower(path[-1]))  # type: ignore[arg-type]
    assert FormulaEvaluator(NETWORK).evaluate(path[-2], 0).ratio > 1.02 * settings.budget


def test_a_balanced_policy_takes_by_sensitivity_what_chance_took_elsewhere() -> None:
    lopsided = trial(conv2=8, down=8)
    settings = SearchSettings(budget=lopsided.result.ratio)
    fitting = BudgetFit(NETWORK, RULES, FormulaEvaluator(NETWORK), settings)
    balanced = fitting.fit_balanced(lopsided)
    assert balanced is not None
    assert balanced.result.ratio <= 1.02 * settings.budget
    assert (balanced.policy["conv2"].channels or 64) >= 48
    assert balanced.policy["conv1"].channels is not None
    assert fitting.fit_balanced(trial()) is None


def test_steps_that_change_nothing_are_no_steps() -> None:
    settings = SearchSettings(budget=0.01)
    fine = {share / 64: share / 64 for share in range(1, 64)}
    network = dataclasses.replace(
        NETWORK, sensitivity={name: {"pruning": fine} for name in ("stem", "conv1", "conv2")}
    )
    evaluator = FormulaEvaluator(network)
    narrow = BudgetFit(network, RULES, evaluator, settings).fit(trial())
    # Of 63 shares of a set of 32 channels every other ends where the one before did; none leaves a set empty.
    assert narrow.policy["stem"].channels == narrow.policy["conv1"].channels == 1
    assert evaluator.calls <= 10
