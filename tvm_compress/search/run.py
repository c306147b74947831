"""The search from end to end: dense reference, analysis, episodes, refinement of the winners."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tvm

import tvm_compress
from tvm_compress.compressor import Compressor, Training
from tvm_compress.cost.latency_model import LatencyModel
from tvm_compress.data.dataset import Dataset, Split
from tvm_compress.errors import DataError, ModelError, SettingError
from tvm_compress.fastlc.curvature import Curvature
from tvm_compress.metrics.cost import metrics
from tvm_compress.model import Model
from tvm_compress.passes.groups import find_coupled_sets
from tvm_compress.passes.params import get_params, get_stage
from tvm_compress.passes.policy import fingerprint
from tvm_compress.passes.sites import find_sites
from tvm_compress.rpc.device import Device, MeasurementSettings, open_device
from tvm_compress.rpc.store import MeasurementStore
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.search import sensitivity as sensitivity_analysis
from tvm_compress.search.agents import make_agent
from tvm_compress.search.environment import CompressionEnv
from tvm_compress.search.evaluate import CompressionEvaluator
from tvm_compress.search.fit import BudgetFit, choose, likely_winners
from tvm_compress.search.latency import SHORT, THOROUGH, LatencyMeter
from tvm_compress.search.latency_sources import (
    HybridLatency,
    KernelLatency,
    LatencySource,
    MeasuredLatency,
)
from tvm_compress.search.loop import run_episodes
from tvm_compress.search.observation import SiteObservation, curvature_statistics, tolerance_statistics
from tvm_compress.search.problem import SearchProblem
from tvm_compress.search.refine import best_refined, refine
from tvm_compress.search.results import (
    MEASURED,
    EpisodeResult,
    Progress,
    ProgressEvent,
    Refined,
    SearchResult,
    Trial,
    best_of,
    no_progress,
    pareto_front,
)
from tvm_compress.search.sensitivity import Sensitivity
from tvm_compress.search.settings import SearchSettings
from tvm_compress.search.study import Study
from tvm_compress.tolerance.channels import channel_scores
from tvm_compress.twin import Twin

# So many times as many images retrain those that may win, before one of them is chosen.
REFINEMENT = 3

CurvatureStatistics = Mapping[str, Mapping[str, float]]


def run_search(
    model: Model,
    split: Split,
    settings: SearchSettings,
    study_dir: Path,
    progress: Progress = no_progress,
    curvature: Curvature | None = None,
    latency_model: LatencyModel | None = None,
) -> SearchResult:
    """Search a policy for a model, or go on with the study that stands in `study_dir`.

    Parameters
    ----------
    model
        Dense, at the stage float.
    split
        Train and validation images are used; the test images are not looked at.
    study_dir
        Directory of the study, see `study`.
    curvature
        Of this model, as Fast LC saves it: two more numbers of each site that the agent sees.
    latency_model
        Fitted before, by `cost fit` or by another search: with "hybrid" latencies it predicts kernels from
        the start, and what this search measures corrects it.

    Raises
    ------
    StudyError
        If the directory holds a study with other settings, or a damaged one.
    ModelError, DataError, SettingError, TargetError, DeviceError
        Whatever does not fit.
    """
    if latency_model is not None and settings.latency != "hybrid":
        raise SettingError(
            f"A latency model is given, but latencies are taken by {settings.latency!r}.",
            'Only "hybrid" predicts (--latency hybrid).',
        )
    if get_stage(model.module) != "float":
        raise ModelError(
            "The model is compressed already.", "Search with the dense model that it was made from."
        )
    for name, part in (("training", split.train), ("validation", split.validation)):
        if not len(part):
            raise DataError(f"There are no {name} images.", "A search needs training and validation images.")
    seen = {} if curvature is None else curvature_statistics(model.module, curvature)
    facts = _facts(model, split) | {"curvature": _digest(seen), "latency_model": _digest(latency_model)}
    with Study(study_dir, settings, facts) as study:
        return _Search(model, split, study, progress, seen, latency_model).run()


def _digest(given: CurvatureStatistics | LatencyModel | None) -> str:
    if not given:
        return "none"
    values = given.to_dict() if isinstance(given, LatencyModel) else given
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _facts(model: Model, split: Split) -> dict[str, str]:
    """What must not change within a study besides the settings."""
    parameters = hashlib.sha256()
    for name, value in get_params(model.module).items():
        parameters.update(name.encode() + np.ascontiguousarray(value).tobytes())
    data = hashlib.sha256()
    for part in (split.train, split.validation):
        data.update(np.ascontiguousarray(part.x).tobytes() + part.y.tobytes())
    return {
        "model": fingerprint(find_sites(model.module)),
        "parameters": parameters.hexdigest()[:16],
        "data": data.hexdigest()[:16],
        "tvm": tvm.__version__,
        "torch": torch.__version__,
        "tvm_compress": tvm_compress.__version__,
    }


def _latency_source(
    meter: LatencyMeter, settings: SearchSettings, latency_model: LatencyModel | None
) -> LatencySource:
    if settings.latency == "hybrid":
        return HybridLatency(meter, settings, latency_model)
    return KernelLatency(meter, settings) if settings.latency == "kernels" else MeasuredLatency(meter)


@dataclass(frozen=True)
class _Images:
    """The images that the steps of a search see, drawn once from the seed."""

    calibration: Dataset
    sensitivity: Dataset
    validation: Dataset
    retraining: Dataset
    refinement: Dataset  # as `retraining`, but more of them: few candidates are left by then

    @classmethod
    def draw(cls, split: Split, settings: SearchSettings) -> "_Images":
        def some(data: Dataset, count: int, stream: int) -> Dataset:
            return data.subset(count, np.random.default_rng([settings.seed, stream])) if count else data

        return cls(
            some(split.train, settings.calibration_images, 0),
            some(split.train, settings.sensitivity_images, 1),
            some(split.validation, settings.validation_images, 2),
            some(split.train, settings.retrain_images, 3),
            some(split.train, REFINEMENT * settings.retrain_images, 4),
        )


class _Search:
    """One run over an open study."""

    def __init__(
        self,
        model: Model,
        split: Split,
        study: Study,
        progress: Progress,
        curvature: CurvatureStatistics,
        latency_model: LatencyModel | None,
    ) -> None:
        self.model, self.split, self.study, self.progress = model, split, study, progress
        self.curvature, self.latency_model = curvature, latency_model
        self.settings = study.settings
        self.images = _Images.draw(split, self.settings)
        self.validation = self.images.validation.normalized()
        self.fingerprint = fingerprint(find_sites(model.module))
        self.target = parse_target(self.settings.build_target)
        self.seconds: dict[str, float] = {}

    def run(self) -> SearchResult:
        """Do what the study lacks and hand over everything."""
        settings = self.settings
        problem, compressor = self._analyse()
        device = open_device(settings.device, settings.threads)
        store = MeasurementStore(self.study.measurements)
        with self._meter(device, store, SHORT) as meter:
            with self._timed("dense"):
                dense = self._dense(meter)
            source = _latency_source(meter, settings, self.latency_model)
            evaluator = self._evaluator(compressor, source, meter)
            with self._timed("episodes"):
                trials = self._episodes(problem, evaluator)
            self.seconds["latency"] = round(sum(evaluator.latency_seconds), 3)
            if isinstance(source, HybridLatency):
                source.model.save(self.study.path / "latency_model.json")
            with self._timed("refinement"), self._meter(device, store, THOROUGH) as thorough:
                self._dense(thorough)
                kernels = source if isinstance(source, KernelLatency) else None
                evaluator = self._evaluator(compressor, MeasuredLatency(thorough, kernels), thorough, True)
                refined = self._refine(trials, problem, compressor, evaluator)
        best_trial = best_of(trials)
        assert best_trial is not None
        best = best_refined(refined, settings.budget)
        return SearchResult(
            dense=dense,
            best=best,
            refined=refined,
            best_trial=best_trial,
            pareto=pareto_front(trials),
            trials=trials,
            sensitivity=sensitivity_analysis.labelled(problem.sensitivity),
            settings=settings.to_dict(),
            path=self.study.path,
            seconds=self.seconds,
            sum_errors=source.sum_errors() if isinstance(source, KernelLatency) else [],
            drifts=source.drifts if isinstance(source, HybridLatency) else [],
        )

    def _meter(self, device: Device, store: MeasurementStore, timing: MeasurementSettings) -> LatencyMeter:
        return LatencyMeter(device, self.target, store, self.model.input_spec.shape, timing)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - begin, 3)

    def _tell(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(ProgressEvent(stage, done, total))

    def _analyse(self) -> tuple[SearchProblem, Compressor]:
        """Sites, coupled sets, channel scores and sensitivity."""
        settings, module = self.settings, self.model.module
        rules = rules_for(self.target)
        problem = SearchProblem(
            sites=find_sites(module),
            sets=find_coupled_sets(module),
            agent=settings.agent,
            bitserial_rule=rules.bitserial_legal,
            rounding=settings.rounding,
            max_bits=settings.max_bits,
            target=settings.build_target,
            criterion=settings.criterion,
            seed=settings.seed,
            model=self.fingerprint,
            curvature=self.curvature,
        )
        problem.decision_sites()  # raises at once if there is nothing to decide
        calibration = self.images.calibration
        x = calibration.normalized()
        with self._timed("tolerance"):
            self._tell("tolerance")(0, 1)
            scores = channel_scores(module, x, calibration.y, criterion=settings.criterion)
            self._tell("tolerance")(1, 1)
        compressor = Compressor(module, x, scores)
        with self._timed("sensitivity"):
            sensitivity = self._sensitivity(problem, compressor)
        return replace(problem, sensitivity=sensitivity, tolerance=tolerance_statistics(scores)), compressor

    def _sensitivity(self, problem: SearchProblem, compressor: Compressor) -> Sensitivity:
        name = "sensitivity.json"
        stored = self.study.read_json(name)
        if stored is not None:
            return sensitivity_analysis.from_json(stored)
        x = self.images.sensitivity.normalized()
        found = sensitivity_analysis.analyse(problem, compressor, x, self._tell("sensitivity"))
        self.study.write_json(name, sensitivity_analysis.to_json(found))
        return found

    def _dense(self, meter: LatencyMeter) -> EpisodeResult:
        self._tell("dense")(0, 1)
        module = self.model.module
        key = hashlib.sha256(json.dumps(["dense", self.fingerprint, meter.where]).encode()).hexdigest()[:32]
        latency = meter.set_dense(module, key)
        accuracy = Twin(module).accuracy(self.validation, self.images.validation.y)
        self._tell("dense")(1, 1)
        return EpisodeResult(accuracy, latency.value, 1.0, MEASURED, latency.unit, metrics(module))

    def _evaluator(
        self, compressor: Compressor, source: LatencySource, meter: LatencyMeter, last: bool = False
    ) -> CompressionEvaluator:
        """Evaluator of the episodes, or of the `last` few policies, which are looked at more thoroughly."""
        settings, images = self.settings, self.images
        epochs, rate = settings.retrain_epochs, settings.finetune_lr
        retraining = images.refinement if last else images.retraining
        validation = self.split.validation if last else images.validation
        training = Training(retraining, epochs, 0, rate, settings.seed, distill=False)
        return CompressionEvaluator(
            compressor,
            source,
            validation.normalized(),
            validation.y,
            self.fingerprint,
            meter.where,
            meter.device.unit,
            training if settings.retrain_epochs else None,
        )

    def _episodes(self, problem: SearchProblem, evaluator: CompressionEvaluator) -> list[Trial]:
        settings = self.settings
        found_by = f"{settings.strategy} {settings.agent}, seed {settings.seed}, budget {settings.budget:g}"
        env = CompressionEnv(problem, evaluator, settings.budget, settings.beta, found_by)
        agent = make_agent(settings, SiteObservation.size(), len(problem.actions))
        return run_episodes(self.study, env, agent, evaluator, self.progress)

    def _refine(
        self,
        trials: list[Trial],
        problem: SearchProblem,
        compressor: Compressor,
        evaluator: CompressionEvaluator,
    ) -> list[Refined]:
        def tell(done: int, total: int, text: str) -> None:
            self.progress(ProgressEvent("refine", done, total, text=text))

        fit = BudgetFit(problem, rules_for(self.target), evaluator, self.settings)
        winners = likely_winners(trials, self.settings)
        balanced = fit.fit_balanced(winners[0])
        fitted = [*(fit.fit(trial) for trial in winners), *([] if balanced is None else [balanced])]
        chosen = [fit.widen(trial) for trial in choose(fitted, self.settings)]
        # A single one is not judged against others, so that it may learn from the validation images too.
        single = len(chosen) == 1
        train = self.split.train.joined(self.split.validation) if single else self.split.train
        return refine(chosen, compressor, evaluator, train, self.settings, tell)
