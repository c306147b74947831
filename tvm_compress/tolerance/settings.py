"""Settings of TOCO."""

import math
from dataclasses import dataclass

from tvm_compress.errors import SettingError
from tvm_compress.passes.policy import GROUP

OBJECTIVES = ("prune", "quantize")
SENSITIVITIES = ("weight", "filter")
# Channels, as everywhere else: fills the vectors of all kernels.
ROUNDING = 8
WORTHS = ("weights", "operations")
SAMPLINGS = ("active", "random", "all")


@dataclass(frozen=True)
class TocoSettings:
    """Settings of Algorithm 1 and of what surrounds it.

    Parameters
    ----------
    objective
        "prune": weights go to zero. "quantize": weights take fewer bits.
    group
        What is decided together. Prune: "element", "simd-N", "filter", "channel", "block-MxN" (see
        `Grouping`). Quantize: "layer", "filter", "element" and the tiles. "" is "element", or "layer".
    rounding
        With group "channel": kept channels are rounded up to a multiple of this, since kernels take as long
        for fewer; 8 if nothing is said, 1 keeps what the tolerances leave.
    loss_bound
        The loss may grow to this many times the uncompressed model's; above 1.
    sigma
        Factor by which the loss bound grows towards that, above 1.
    trust_radius
        First δ, as a share of the model's largest |w|; it is never above 1.
    iterations
        K, at most so many iterations.
    step
        Of the weights that are left, at most this share is pruned in one iteration, in (0, 1]; 1 is the
        paper's. No bound on quantization, nor below the paper's budget.
    sampling
        Where gradients are taken: "active" (similarity-weighted query by committee), "random" batches, or
        "all" images.
    images
        Training images that the loss is evaluated on and samples are drawn from; 0 takes all.
    share
        Share of the images that the committee lets through (paper: 0.01).
    batches, batch_size
        Gradients per iteration; |g| is the root mean square over them. The paper takes one batch of 32.
    memory
        How much each iteration's squared gradients count in the next, in [0, 1); the paper's is 0.
    sensitivity
        Whose |g| a weight's tolerance follows: its own ("weight", the paper's), or "filter", the geometric
        mean of its filter's and the network's. Default: "filter" for pruning, "weight" for quantization.
    worth
        For "prune": what a weight that goes counts, "weights" (1, the paper's) or "operations" (as often as
        it is multiplied: tolerances are larger in proportion).
    percentile
        Of a group's tolerances, for "quantize": 0 is the least, as in the paper.
    labels
        "data", or "model": the model's own predictions, where there are no labels.
    finetune_epochs, learning_rate
        Afterwards; pruned weights stay zero, quantized ones stay as they are.
    target
        Written into the policy; nothing else depends on it.

    Raises
    ------
    SettingError
        On a value outside its range.
    """

    objective: str = "prune"
    group: str = ""
    rounding: int | None = None
    loss_bound: float = 1.05
    sigma: float = 1.02
    trust_radius: float = 0.25
    iterations: int = 100
    step: float = 0.1
    sampling: str = "active"
    images: int = 2048
    share: float = 0.01
    batches: int = 8
    batch_size: int = 32
    memory: float = 0.9
    sensitivity: str = ""
    worth: str = "weights"
    percentile: float = 0.0
    labels: str = "data"
    seed: int = 0
    finetune_epochs: int = 0
    learning_rate: float = 0.01
    target: str = "host"

    def __post_init__(self) -> None:
        _choose("objective", self.objective, OBJECTIVES)
        _choose("sampling", self.sampling, SAMPLINGS)
        _choose("labels", self.labels, ("data", "model"))
        if not self.group:
            object.__setattr__(self, "group", "element" if self.objective == "prune" else "layer")
        if not self.sensitivity:
            object.__setattr__(self, "sensitivity", "filter" if self.objective == "prune" else "weight")
        _choose("sensitivity", self.sensitivity, SENSITIVITIES)
        _choose("worth", self.worth, WORTHS)
        if self.worth != "weights" and self.objective != "prune":
            raise SettingError(f"worth {self.worth!r} goes with objective prune.", "Leave it out.")
        self._check_group()
        if self.group == "channel" and self.rounding is None:
            object.__setattr__(self, "rounding", ROUNDING)
        if self.rounding is not None and (self.group != "channel" or self.rounding < 1):
            raise SettingError(
                f"rounding is {self.rounding} with group {self.group!r}.",
                "It goes with group channel, and is at least 1.",
            )
        for name in ("loss_bound", "sigma"):
            value = getattr(self, name)
            if not (value > 1 and math.isfinite(value)):
                raise SettingError(
                    f"{name} is {value}, but must be above 1: it is a factor on the uncompressed model's "
                    "loss, and at or below that loss nothing can be compressed.",
                    "1.05 lets the loss grow by 5 %.",
                )
        for name in ("trust_radius", "step", "share"):
            if not 0 < getattr(self, name) <= 1:
                raise SettingError(f"{name} is {getattr(self, name)}, but must be in (0, 1].")
        if not 0 <= self.memory < 1:
            raise SettingError(f"memory is {self.memory}, but must be in [0, 1).")
        if not 0 <= self.percentile < 100:
            raise SettingError(f"percentile is {self.percentile}, but must be in [0, 100).")
        for name, least in (("iterations", 1), ("batches", 1), ("batch_size", 1), ("images", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise SettingError(f"{name} is {getattr(self, name)}, but must be at least {least}.")
        if self.finetune_epochs < 0 or not self.learning_rate > 0:
            raise SettingError("finetune_epochs must be at least 0 and learning_rate above 0.")

    def _check_group(self) -> None:
        known = bool(GROUP.fullmatch(self.group))
        if self.objective == "prune" and not known:
            raise SettingError(
                f"Group {self.group!r} is unknown for pruning.",
                "Known are element, simd-N, filter, channel and block-MxN.",
            )
        if self.objective == "quantize" and (self.group == "channel" or not (known or self.group == "layer")):
            raise SettingError(
                f"Group {self.group!r} is unknown for quantization.",
                "Known are layer, filter, element, simd-N and block-MxN.",
            )
        if self.percentile and (self.objective != "quantize" or self.group not in ("layer", "filter")):
            raise SettingError("percentile goes with objective quantize and group layer or filter.")


def _choose(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SettingError(f"{name} is {value!r}, but must be one of: {', '.join(known)}.")
