"""What is left of a budget is spent on channels."""

import dataclasses

from tests.tvm_compress.search_doubles import FormulaEvaluator, problem
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.search.refine import choose, confirm, spend_budget
from tvm_compress.search.results import Trial
from tvm_compress.search.settings import SearchSettings

NETWORK = problem()
RULES = rules_for(parse_target("host"))


def trial(**channels: int) -> Trial:
    sites = {site.name: SitePolicy(channels.get(site.name)) for site in NETWORK.sites}
    policy = CompressionPolicy(sites, target="host", rounding=8)
    return Trial(0, "search", policy, [], FormulaEvaluator(NETWORK).evaluate(policy, 0), 0.0, 0.0)


def test_the_most_cut_sets_widen_first_while_the_budget_lasts() -> None:
    cut = trial(stem=24, conv1=16, conv2=32, down=32)
    # Each of the five sites is a fifth of the cost: there is room for conv1, not for conv2 and down besides.
    budget = cut.result.ratio + 0.17
    wide = spend_budget(cut, NETWORK, RULES, FormulaEvaluator(NETWORK), budget)
    assert wide.policy["conv1"].channels is None
    assert wide.policy["conv2"].channels == wide.policy["down"].channels == 32
    assert wide.policy["stem"].channels == 24
    assert cut.result.ratio < wide.result.ratio <= budget


def test_a_trial_over_the_budget_stays_as_it_is() -> None:
    cut = trial(conv1=16)
    evaluator = FormulaEvaluator(NETWORK)
    assert spend_budget(cut, NETWORK, RULES, evaluator, cut.result.ratio * 0.9) is cut
    assert evaluator.calls == 0


def test_nothing_to_widen() -> None:
    whole = trial()
    assert spend_budget(whole, NETWORK, RULES, FormulaEvaluator(NETWORK), 1.0) == dataclasses.replace(whole)


def test_a_lucky_measurement_is_found_out() -> None:
    honest, lucky = trial(stem=16, conv1=16), trial(conv1=32)
    flattered = dataclasses.replace(
        lucky, episode=1, result=dataclasses.replace(lucky.result, ratio=honest.result.ratio), reward=9.0
    )
    settings = SearchSettings(budget=honest.result.ratio, refine_top=1, refine_pareto=0)
    assert choose([honest, flattered], settings) == [flattered]
    confirmed = confirm([honest, flattered], FormulaEvaluator(NETWORK), settings)
    assert {t.episode: t.result.ratio for t in confirmed}[1] == lucky.result.ratio
    assert [t.episode for t in choose(confirmed, settings)] == [0]
