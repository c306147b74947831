"""The values that a search hands over: an episode's result, a trial of a study, and the outcome of it all."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import tvm

from tvm_compress.calibration import RangeReport
from tvm_compress.passes.policy import CompressionPolicy

MEASURED = "measured"
SUMMED = "summed"
PREDICTED = "predicted"


@dataclass(frozen=True)
class EpisodeResult:
    """What one policy is worth.

    Parameters
    ----------
    accuracy
        Share of the validation images that the integer module gets right, in [0, 1].
    latency
        Latency of one inference in `unit`, corrected for drift: its ratio to the dense model in the same
        session, times the dense model's reference latency.
    ratio
        Latency over the dense model's, under the same schedules and threads.
    latency_kind
        "measured" (the whole network), "summed" (its measured kernels), "predicted" or "failed".
    unit
        "seconds" or "estimated_cycles".
    metrics
        MACs, BOPs, bytes and the like, by name.
    """

    accuracy: float
    latency: float
    ratio: float
    latency_kind: str
    unit: str
    metrics: dict[str, float] = field(default_factory=dict)


class Evaluator(Protocol):
    """Tells what a policy is worth; the environment knows nothing else of models and devices."""

    def evaluate(self, policy: CompressionPolicy, episode: int) -> EpisodeResult:
        """Result of a policy in an episode (counted from 0)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what later results depend on, as plain values: with it a resumed search goes on alike."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s values."""
        ...


@dataclass(frozen=True)
class Trial:
    """One line of a study: the policy of an episode and what came of it.

    `actions` holds one list per decision, in [0, 1]; `phase` is "warmup" or "search".
    """

    episode: int
    phase: str
    policy: CompressionPolicy
    actions: list[list[float]]
    result: EpisodeResult
    reward: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for one JSON line."""
        values = {name: getattr(self, name) for name in ("episode", "phase", "actions", "reward", "seconds")}
        return values | asdict(self.result) | {"policy": json.loads(self.policy.to_json())}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Trial":
        """Trial from `to_dict`'s values."""
        result = EpisodeResult(**{name: values[name] for name in EpisodeResult.__dataclass_fields__})
        own = {name: values[name] for name in ("episode", "phase", "actions", "reward", "seconds")}
        return cls(policy=CompressionPolicy.from_json(json.dumps(values["policy"])), result=result, **own)


@dataclass(frozen=True)
class Refined:
    """A policy after fine-tuning: its modules, ready to be built, and what they reach in validation."""

    episode: int
    policy: CompressionPolicy
    result: EpisodeResult
    reward: float
    module: tvm.IRModule  # QDQ stage (float where nothing is quantized), trained parameters
    integer_module: tvm.IRModule  # integer stage; the same as `module` where nothing is quantized
    ranges: tuple[RangeReport, ...] = ()  # of the quantized tensors, as calibrated


@dataclass(frozen=True)
class SearchResult:
    """Outcome of a search: plain data for the artifact, the report and the command line.

    `best` is the refined policy to deploy; `refined` holds all that were fine-tuned; `pareto` the trials that
    no other trial beats in both accuracy and latency, fastest first; `best_trial` the trial with the highest
    reward. `seconds` are those of this process by stage; "latency" is the part of "episodes" that went into
    latencies. `sum_errors` tells, where latencies were summed from kernels, how far each network that was
    measured whole was from its sum, as a share; `drifts` by what shares kernels' times changed on the way.
    """

    dense: EpisodeResult
    best: Refined
    refined: list[Refined]
    best_trial: Trial
    pareto: list[Trial]
    trials: list[Trial]
    sensitivity: dict[str, Any]
    settings: dict[str, Any]
    path: Path
    seconds: dict[str, float]
    sum_errors: list[float] = field(default_factory=list)
    drifts: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class ProgressEvent:
    """How far a search is: steps done of all in a stage.

    Stages: "tolerance", "sensitivity", "dense", "refine", and "episode" with the trial and the best.
    """

    stage: str
    done: int
    total: int
    trial: Trial | None = None
    best: Trial | None = None
    text: str = ""


Progress = Callable[[ProgressEvent], None]


def no_progress(_: ProgressEvent) -> None:
    """Ignore progress."""


def pareto_front(trials: list[Trial]) -> list[Trial]:
    """Trials that no other trial beats in accuracy and latency at once, fastest first, one per point."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.result.latency, -t.result.accuracy, t.episode)):
        if not front or trial.result.accuracy > front[-1].result.accuracy:
            front.append(trial)
    return front


def best_of(trials: list[Trial]) -> Trial | None:
    """Trial with the highest reward, the earliest of equals."""
    return max(trials, key=lambda t: (t.reward, -t.episode), default=None)
