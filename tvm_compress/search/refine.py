"""After the search: fine-tune the winners, judge them again, and choose the one to deploy."""

from collections.abc import Callable, Sequence

from tvm_compress.compressor import Compressor, Training, quantized_epochs
from tvm_compress.data.dataset import Dataset
from tvm_compress.search.environment import reward_of
from tvm_compress.search.evaluate import CompressionEvaluator
from tvm_compress.search.fit import meets_budget
from tvm_compress.search.results import Refined, Trial
from tvm_compress.search.settings import SearchSettings


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
    total = len(trials) * (epochs + 1)
    found: list[Refined] = []
    for index, trial in enumerate(trials):
        begin = index * (epochs + 1)
        text = f"episode {trial.episode}"

        def tell(epoch: int, begin: int = begin, text: str = text) -> None:
            progress(begin + epoch, total, f"{text}: fine-tuning")

        quantized = quantized_epochs(trial.policy, epochs)
        training = Training(
            train,
            epochs - quantized,
            quantized,
            settings.finetune_lr,
            settings.seed,
            augment=settings.augment,
            progress=tell,
        )
        candidate = compressor.apply(trial.policy, training)
        result = evaluator.judge(candidate, evaluator.key(trial.policy), trial.episode)
        reward = reward_of(result, settings.budget, settings.beta)
        found.append(
            Refined(
                trial.episode,
                candidate.policy,
                result,
                reward,
                candidate.module,
                candidate.integer_module,
                candidate.ranges,
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
