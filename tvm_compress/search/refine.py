"""After the search: fine-tune the winners, measure them again, and choose the one to deploy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from tvm_compress.compressor import Compressor, Training
from tvm_compress.data.dataset import Dataset
from tvm_compress.passes.groups import CoupledSet
from tvm_compress.passes.policy import BitserialRules
from tvm_compress.search.environment import reward_of
from tvm_compress.search.evaluate import CompressionEvaluator
from tvm_compress.search.problem import SearchProblem
from tvm_compress.search.results import Evaluator, Refined, Trial, pareto_front
from tvm_compress.search.settings import SearchSettings

# Share of the fine-tuning that is done with quantizers: an epoch with them takes more than twice as long, and
# what was pruned recovers as well without them.
QDQ_SHARE = 1 / 3

# A latency that exceeds the budget by no more than this share still meets it: as close as a measurement is.
BUDGET_TOLERANCE = 0.02


def meets_budget(ratio: float, budget: float) -> bool:
    """Whether a latency ratio keeps to the budget, a measurement's error allowed."""
    return ratio <= budget * (1.0 + BUDGET_TOLERANCE)


def choose(trials: Sequence[Trial], settings: SearchSettings) -> list[Trial]:
    """Trials that are worth fine-tuning: the highest rewards, then those of the Pareto set within the budget.

    Of the Pareto set the most accurate come first; where none keeps to the budget, the fastest. Trials with
    the same sites count once.
    """
    by_reward = sorted(trials, key=lambda t: (-t.reward, t.episode))
    front = pareto_front(list(trials))
    within = [t for t in reversed(front) if meets_budget(t.result.ratio, settings.budget)]
    chosen: list[Trial] = []
    for wanted, candidates in ((settings.refine_top, by_reward), (settings.refine_pareto, within or front)):
        target = len(chosen) + wanted
        for trial in candidates:
            if len(chosen) == target:
                break
            if all(trial.policy.sites != other.policy.sites for other in chosen):
                chosen.append(trial)
    return chosen


def confirm(trials: Sequence[Trial], evaluator: Evaluator, settings: SearchSettings) -> list[Trial]:
    """Measure again, thoroughly, those that are likely to be chosen; twice as many as will be, and one more.

    Of many short measurements (or predictions) those that look best are also the luckiest: what is chosen by
    them alone would miss the budget on the day.
    """
    likely = choose(
        trials,
        replace(settings, refine_top=2 * settings.refine_top + 1, refine_pareto=2 * settings.refine_pareto),
    )
    confirmed = []
    for trial in likely:
        result = evaluator.evaluate(trial.policy, trial.episode)
        confirmed.append(
            replace(trial, result=result, reward=reward_of(result, settings.budget, settings.beta))
        )
    return confirmed


def spend_budget(
    trial: Trial,
    problem: SearchProblem,
    rules: BitserialRules,
    evaluator: Evaluator,
    budget: float,
) -> Trial:
    """Give a trial that is faster than asked its channels back, set by set, the most cut first.

    Widths come in steps and the agent hits the budget from either side: what is left of it is accuracy for
    nothing. Each wider policy is measured and kept if it is within the budget; a trial over the budget stays
    as it is.
    """
    if not meets_budget(trial.result.ratio, budget):
        return trial
    policy, result = trial.policy, trial.result

    def kept(group: CoupledSet) -> float:
        counts = [n for n in (policy[name].channels for name in group.producers) if n is not None]
        return min(counts, default=group.channels) / group.channels

    for group in sorted((g for g in problem.sets if kept(g) < 1), key=kept):
        sites = dict(policy.sites)
        for name in group.producers:
            sites[name] = replace(policy[name], channels=None, kept=None)
        wider = replace(policy, sites=sites).legalize(problem.sites, rules, problem.sets)
        found = evaluator.evaluate(wider, trial.episode)
        if found.ratio <= budget:
            policy, result = wider, found
    return replace(trial, policy=policy, result=result)


def refine(
    trials: Sequence[Trial],
    compressor: Compressor,
    evaluator: CompressionEvaluator,
    train: Dataset,
    settings: SearchSettings,
    progress: Callable[[int, int, str], None],
) -> list[Refined]:
    """Fine-tune each trial's policy and judge what comes of it.

    Parameters
    ----------
    evaluator
        One that measures latencies.
    train
        Training images with labels; the dense model is the teacher.
    progress
        Called with (steps done, steps in all, what is done).
    """
    epochs = settings.finetune_epochs
    quantized = math.ceil(epochs * QDQ_SHARE)
    total = len(trials) * (epochs + 1)
    found: list[Refined] = []
    for index, trial in enumerate(trials):
        begin = index * (epochs + 1)
        text = f"episode {trial.episode}"

        def tell(epoch: int, begin: int = begin, text: str = text) -> None:
            progress(begin + epoch, total, f"{text}: fine-tuning")

        training = Training(
            train, epochs - quantized, quantized, settings.finetune_lr, settings.seed, progress=tell
        )
        candidate = compressor.apply(trial.policy, training)
        result = evaluator.judge(candidate, evaluator.key(trial.policy), trial.episode)
        reward = reward_of(result, settings.budget, settings.beta)
        found.append(
            Refined(
                trial.episode, candidate.policy, result, reward, candidate.module, candidate.integer_module
            )
        )
        progress(begin + epochs + 1, total, text)
    return found


def best_refined(refined: Sequence[Refined], budget: float) -> Refined:
    """Most accurate of those within the budget; where none is, the one with the highest reward.

    The reward is not used within the budget: it would put a more accurate policy that is faster than asked
    behind a less accurate one.
    """
    within = [r for r in refined if meets_budget(r.result.ratio, budget)]
    if within:
        return max(within, key=lambda r: (r.result.accuracy, -r.result.ratio))
    return max(refined, key=lambda r: r.reward)
