"""What a search is told: one frozen, checked value that a study stores and compares when it is resumed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from tvm_compress.errors import SettingError
from tvm_compress.finetune import AUGMENTATIONS

AGENTS = ("pruning", "quantization", "joint")
STRATEGIES = ("ddpg", "random")
LATENCY_MODES = ("measure", "kernels", "hybrid")
CRITERIA = ("tolerance", "l1", "l2")
ROUNDINGS = (1, 8, 32)
DEFAULT_TARGETS = {"local": "host", "emulated-a72": "raspberry-pi/4b-aarch64"}

# What may differ when a study is opened again: how long it runs and what is done with its winners.
RESUMABLE = frozenset({"episodes", "finetune_epochs", "finetune_lr", "augment", "refine"})


@dataclass(frozen=True)
class SearchSettings:
    """Settings of one search.

    Parameters
    ----------
    agent
        What the agent decides: "pruning" (1 action per site), "quantization" (2) or "joint" (3).
    budget
        The wanted latency as a share of the dense model's, c in the reward; in (0, 1].
    episodes
        Policies to try, `warmup` random ones included.
    updates
        Gradient steps of the agent per transition; the paper's own tool
        takes 1 per episode. With 4 instead of 1 the agent comes closer to the budget within tens of episodes.
    strategy
        How actions are chosen: "ddpg", or "random" as a baseline.
    device, threads
        Where latency is measured, and with how many threads (the dense model's too).
    target
        TVM target of the kernels; empty means the device's own.
    latency
        "measure" builds and times each policy; "kernels" times each distinct kernel once, sums them up and
        measures whole policies now and then; "hybrid" also lets the latency model predict where it is sure.
    rounding
        Kept channels are rounded up to a multiple of this. 8 fills the vectors of all kernels; 32 keeps every
        site that is fit for bit-serial kernels fit, but cannot prune a set of 32 channels or fewer.
    criterion
        Which channels go first: "tolerance" (TOCO), "l1" or "l2".
    beta
        Cost exponent of the reward, negative (search paper, equation 6).
    max_bits
        Largest bit width of a bit-serial site, 1 to 6.
    retrain_epochs
        Epochs of retraining on `retrain_images` images of a pruned candidate, still in float, before an
        episode's accuracy is taken. Without, batch-norm statistics are re-estimated all the same, but strong
        pruning leaves little more than chance, and the accuracy says nothing of what fine-tuning could reach.
    calibration_images, validation_images, sensitivity_images
        How many images calibrate the ranges (and re-estimate batch norm), give the accuracy of an episode
        (0: the whole validation set), and give the sensitivities.
    finetune_epochs, finetune_lr, refine
        After the search: epochs and learning rate of the fine-tuning, and how many policies get it (see
        `fit.likely_winners`). With `refine` 1 there is nothing left to choose, so that the one learns from
        the validation images too.
    augment
        How the images of that fine-tuning are varied: "none", "shift", "mirror" or "shift+mirror".
    measure_first, measure_every
        In "kernels" and "hybrid": the first episodes and every n-th are measured as whole networks.
    """

    agent: str = "joint"
    budget: float = 0.5
    episodes: int = 120
    warmup: int = 10
    seed: int = 0
    strategy: str = "ddpg"
    updates: int = 4
    device: str = "local"
    threads: int = 1
    target: str = ""
    latency: str = "measure"
    rounding: int = 8
    criterion: str = "tolerance"
    beta: float = -3.0
    max_bits: int = 6
    retrain_epochs: int = 1
    retrain_images: int = 768
    calibration_images: int = 256
    validation_images: int = 512
    sensitivity_images: int = 128
    finetune_epochs: int = 6
    finetune_lr: float = 0.04
    augment: str = "none"
    refine: int = 2
    measure_first: int = 2
    measure_every: int = 64

    def __post_init__(self) -> None:
        _check_choice("agent", self.agent, AGENTS)
        _check_choice("strategy", self.strategy, STRATEGIES)
        _check_choice("latency", self.latency, LATENCY_MODES)
        _check_choice("criterion", self.criterion, CRITERIA)
        _check_choice("rounding", self.rounding, ROUNDINGS)
        _check_choice("augment", self.augment, AUGMENTATIONS)
        _check_number(
            "budget", self.budget, 0.0, 1.0, open_low=True, hint="0.4 asks for 40 % of the dense latency."
        )
        _check_number("beta", self.beta, -1e6, 0.0)
        _check_number("finetune_lr", self.finetune_lr, 0.0, 10.0, open_low=True)
        for name, low, high in _INTEGERS:
            _check_integer(name, getattr(self, name), low, high)
        if not self.target and self.device not in DEFAULT_TARGETS:
            raise SettingError(
                f"No target is known for device '{self.device}'.",
                "Name one with --target, such as --target host.",
            )

    @property
    def build_target(self) -> str:
        """Name of the TVM target that kernels are built for."""
        return self.target or DEFAULT_TARGETS[self.device]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SearchSettings":
        """Settings from plain values.

        Raises
        ------
        SettingError
            If a name is unknown or a value is out of range.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise SettingError(
                f"Unknown search setting: {', '.join(unknown)}.", "Was it written by a newer version?"
            )
        return cls(**values)


_INTEGERS: tuple[tuple[str, int, int], ...] = (
    ("episodes", 1, 1_000_000),
    ("warmup", 0, 1_000_000),
    ("seed", 0, 2**63 - 1),
    ("updates", 1, 1000),
    ("threads", 1, 1024),
    ("max_bits", 1, 6),
    ("retrain_epochs", 0, 1000),
    ("retrain_images", 1, 10**9),
    ("calibration_images", 1, 10**9),
    ("validation_images", 0, 10**9),
    ("sensitivity_images", 1, 10**9),
    ("finetune_epochs", 0, 100_000),
    ("refine", 1, 1000),
    ("measure_first", 1, 1_000_000),
    ("measure_every", 1, 1_000_000),
)


def _check_choice(name: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        raise SettingError(f"{name} is {value!r}, but must be one of {', '.join(map(str, allowed))}.")


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise SettingError(f"{name} is {value!r}, but must be a whole number from {low} to {high}.")


def _check_number(
    name: str, value: object, low: float, high: float, open_low: bool = False, hint: str = ""
) -> None:
    bracket = "(" if open_low else "["
    inside = isinstance(value, int | float) and (low < value if open_low else low <= value) and value <= high
    if not inside:
        raise SettingError(f"{name} is {value!r}, but must be in {bracket}{low:g}, {high:g}].", hint)
