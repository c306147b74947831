"""The main job from end to end: search, build for each target, verify on the device, measure, report."""

import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tvm_compress.artifact import Artifact, Verification
from tvm_compress.compression import compile_model, compressed_model, twin_logits
from tvm_compress.cost.latency_model import LatencyModel
from tvm_compress.data.dataset import Split
from tvm_compress.errors import TargetError
from tvm_compress.fastlc.curvature import Curvature
from tvm_compress.metrics.cost import metrics
from tvm_compress.model import Model
from tvm_compress.passes.groups import find_coupled_sets
from tvm_compress.passes.sites import find_sites
from tvm_compress.report.data import ReportData, SiteBar, TrialPoint, Variant
from tvm_compress.report.html import write_report
from tvm_compress.rpc.device import Device, LatencyResult, MeasurementSettings, open_device
from tvm_compress.rpc.local import processor_name
from tvm_compress.search.results import Progress, ProgressEvent, SearchResult, no_progress
from tvm_compress.search.run import run_search
from tvm_compress.search.settings import SearchSettings

REPORT_DATA = "report.json"
RPI4 = "raspberry-pi/4b-aarch64"

# Emulation takes a second where a board takes a millisecond: fewer images show the same.
EMULATED_IMAGES = 100


@dataclass(frozen=True)
class Built:
    """The dense and the compressed artifact for one target, verified and timed on one device."""

    target: str
    dense: Artifact
    best: Artifact
    dense_check: Verification
    best_check: Verification
    dense_latency: LatencyResult
    best_latency: LatencyResult

    @property
    def ratio(self) -> float:
        """Latency of the compressed library over that of the dense one, from the same session."""
        return self.best_latency.value / self.dense_latency.value


@dataclass(frozen=True)
class Outcome:
    """What `run_study` hands over: the search, what was built, and the report."""

    search: SearchResult
    built: list[Built]
    report_data: ReportData
    report: Path
    summary: dict[str, Any]


def target_label(target: str) -> str:
    """Short name of a target for files: "host", "rpi4", else its letters, digits, dots and dashes."""
    return {"host": "host", RPI4: "rpi4"}.get(target, re.sub(r"[^A-Za-z0-9.]+", "-", target).strip("-"))


def device_for(target: str, settings: SearchSettings) -> Device:
    """Device on which libraries for a target can be run here.

    Raises
    ------
    TargetError
        If nothing here can run them: an artifact that was not verified is not handed out.
    """
    if target == settings.build_target:
        return open_device(settings.device, threads=settings.threads)
    if target == "host":
        return open_device("local", threads=settings.threads)
    if target == RPI4:
        return open_device("emulated-a72")
    raise TargetError(
        f"Nothing here runs libraries for {target!r}, so the artifact could not be verified.",
        f"Use host or {RPI4}, or build it afterwards with `tvm-compress compile`.",
    )


def run_study(
    model: Model,
    split: Split,
    settings: SearchSettings,
    path: Path,
    *,
    targets: Sequence[str] = (),
    measurement: MeasurementSettings | None = None,
    title: str = "",
    progress: Progress = no_progress,
    curvature: Curvature | None = None,
    latency_model: LatencyModel | None = None,
) -> Outcome:
    """Search a policy, build, verify and time dense and compressed artifacts, and write the report.

    Parameters
    ----------
    path
        The study's directory. Everything is written there; started again, a search goes on
        from its checkpoint.
    targets
        Targets to build artifacts for; the search's own comes first and may be left out.
    measurement
        How the final latencies are taken; the default takes more samples than the search does.
    curvature, latency_model
        See `run_search`.

    Raises
    ------
    TvmCompressError
        See the parts: search, passes, devices.
    """
    wanted = list(dict.fromkeys([settings.build_target, *targets]))
    # Before the search, so that a target that cannot be verified here costs no time.
    devices = {target: device_for(target, settings) for target in wanted}
    search = run_search(model, split, settings, path, progress, curvature, latency_model)
    best = compressed_model(model, search.best.policy, search.best.module, search.best.ranges)
    best.save(path / "compressed")
    search.best.policy.save(path / "policy.json")
    built = []
    for index, target in enumerate(wanted):
        progress(ProgressEvent("build", index, len(wanted), text=target))
        built.append(_build_and_check(model, best, split, target, devices[target], path, measurement))
    data = _report_data(title or f"Study {path.name}", path.name, model, best, search, built, settings)
    (path / REPORT_DATA).write_text(data.to_json(), encoding="utf-8")
    report = write_report(data, path / "report.html")
    return Outcome(search, built, data, report, _summary(data, search, built, path, report))


def _build_and_check(
    dense: Model,
    best: Model,
    split: Split,
    target: str,
    device: Device,
    path: Path,
    measurement: MeasurementSettings | None,
) -> Built:
    label = target_label(target)
    artifacts = (
        compile_model(dense, target, path / f"artifact-dense-{label}"),
        compile_model(best, target, path / f"artifact-{label}"),
    )
    test = split.test
    images = test if device.unit == "seconds" else test.take(slice(0, EMULATED_IMAGES))
    checks = []
    for model, artifact in zip((dense, best), artifacts, strict=True):
        logits = twin_logits(model, images)
        checks.append(artifact.verify(images.normalized(), images.y, device, logits, split.labels))
    recorded = [artifact.record(check) for artifact, check in zip(artifacts, checks, strict=True)]
    timing = measurement or MeasurementSettings(threads=device.threads, warmup=3, repeat=30, min_repeat_ms=20)
    latencies = recorded[1].benchmark(device, {"dense": recorded[0]}, timing)
    return Built(
        target, recorded[0], recorded[1], checks[0], checks[1], latencies["dense"], latencies["this"]
    )


def _variant(name: str, model: Model, search: SearchResult, built: Sequence[Built]) -> Variant:
    first = built[0]
    artifact, check, latency = (
        (first.dense, first.dense_check, first.dense_latency)
        if name == "dense"
        else (first.best, first.best_check, first.best_latency)
    )
    policy = None if name == "dense" else search.best.policy
    costs = metrics(model.module, policy)
    cycles = [
        (b.dense_latency if name == "dense" else b.best_latency).value
        for b in built
        if b.best_latency.unit == "estimated_cycles"
    ]
    return Variant(
        name=name,
        accuracy=check.accuracy,
        latency=latency.value,
        latency_spread=latency.spread,
        latency_unit=latency.unit,
        emulated_cycles=cycles[0] if cycles else None,
        library_bytes=float(artifact.library.stat().st_size),
        **{key: costs.get(key) for key in ("macs", "bops", "parameter_bytes", "esn_a", "esn_d")},
    )


def _report_data(
    title: str,
    study: str,
    model: Model,
    best: Model,
    search: SearchResult,
    built: Sequence[Built],
    settings: SearchSettings,
) -> ReportData:
    timing = built[0].best_latency.settings
    return ReportData(
        title=title,
        study=study,
        seed=settings.seed,
        budget=settings.budget,
        dense=_variant("dense", model, search, built),
        best=_variant("compressed", best, search, built),
        trials=[
            TrialPoint(
                t.episode,
                t.reward,
                t.result.accuracy,
                t.result.ratio,
                t.result.latency_kind,
                t.phase == "warmup",
            )
            for t in search.trials
        ],
        sites=site_bars(model, search),
        sensitivity=search.sensitivity,
        pareto=[t.episode for t in search.pareto],
        ranges=search.best.ranges,
        chosen=search.best.episode,
        agreement={b.best.path.name: float(b.best_check.agreement or 0.0) for b in built},
        settings={key: str(value) for key, value in settings.to_dict().items()}
        | {"final measurement": ", ".join(f"{k} {v}" for k, v in timing.to_dict().items())}
        | {"test images": ", ".join(f"{b.best_check.samples} on {b.best_check.device}" for b in built)}
        | {"labels": "the data's" if built[0].best_check.labels == "data" else "the model's own predictions"}
        | {"seconds": ", ".join(f"{k} {v:.1f}" for k, v in search.seconds.items())}
        | _kernel_sums(search),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            **built[0].best.manifest.versions,
        },
        machine={
            "processor": processor_name(),
            "system": platform.platform(),
            "target": str(built[0].best.manifest.target),
        },
    )


def _kernel_sums(search: SearchResult) -> dict[str, str]:
    """Rows of the report that say how far sums of kernels were from whole networks, and how times drifted."""
    found = {}
    if errors := search.sum_errors:
        median = 100 * statistics.median(errors)
        text = f"median {median:.1f} %, largest {100 * max(errors):.1f} %, of {len(errors)} networks"
        found["whole network against the sum of its kernels"] = text
    if search.drifts:
        found["corrections for drift"] = ", ".join(f"{100 * change:+.0f} %" for change in search.drifts)
    return found


def site_bars(model: Model, search: SearchResult) -> list[SiteBar]:
    """What the best policy does to each site of the dense model, in order of execution."""
    policy = search.best.policy
    kept = {
        producer: policy[group.name].channels or group.channels
        for group in find_coupled_sets(model.module)
        for producer in group.producers
    }
    return [
        SiteBar(
            name=site.name,
            channels_total=site.out_channels,
            channels_kept=kept.get(site.name, site.out_channels),
            scheme=policy[site.name].scheme,
            weight_bits=policy[site.name].weight_bits,
            activation_bits=policy[site.name].activation_bits,
            note=policy[site.name].note,
        )
        for site in find_sites(model.module)
    ]


def _summary(
    data: ReportData, search: SearchResult, built: Sequence[Built], path: Path, report: Path
) -> dict[str, Any]:
    """The JSON of `search` and `demo` (docs/architecture.md)."""

    def variant(v: Variant) -> dict[str, Any]:
        return {
            "accuracy": v.accuracy,
            "latency": v.latency,
            "latency_unit": v.latency_unit,
            "macs": v.macs,
            "bops": v.bops,
            "bytes": v.parameter_bytes,
            "emulated_cycles": v.emulated_cycles,
        }

    return {
        "study": data.study,
        "seed": data.seed,
        "dense": variant(data.dense),
        "best": variant(data.best),
        "ratio": built[0].ratio,
        "agreement": dict(data.agreement),
        "trials": [
            {
                "episode": t.episode,
                "reward": t.reward,
                "accuracy": t.result.accuracy,
                "ratio": t.result.ratio,
                "latency_kind": t.result.latency_kind,
            }
            for t in search.trials
        ],
        "paths": {
            "study": str(path),
            "policy": str(path / "policy.json"),
            "model": str(path / "compressed"),
            "artifacts": {target_label(b.target): str(b.best.path) for b in built},
            "report": str(report),
        },
    }
