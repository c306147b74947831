"""`tvm-compress verify`, `run` and `benchmark`: an artifact on a device."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tvm_compress.artifact import Artifact
from tvm_compress.cli.load import model_and_data
from tvm_compress.cli.options import (
    ArtifactArgument,
    CacheFlushOption,
    CooldownOption,
    DataOption,
    DebugOption,
    DeviceOption,
    FlushBytesOption,
    JsonOption,
    LayoutOption,
    MaxRepeatOption,
    MaxSpreadOption,
    MeanOption,
    MinRepeatOption,
    NumberOption,
    RepeatOption,
    SplitSeedOption,
    StdOption,
    ThreadsOption,
    TimeoutOption,
    WarmupOption,
)
from tvm_compress.cli.output import describe_memory, print_json, print_lines, print_table
from tvm_compress.compression import twin_logits
from tvm_compress.data.images import read_images
from tvm_compress.errors import ArtifactError, DeviceError
from tvm_compress.report.html import format_latency
from tvm_compress.rpc.device import LatencyResult, MeasurementSettings, open_device
from tvm_compress.rpc.health import HealthWarning, describe_health
from tvm_compress.rpc.measure import latency_ratio


def verify(
    artifact: ArtifactArgument,
    model: Annotated[str, typer.Option(help="The Model that it was compiled from: its twin is compared.")],
    data: DataOption = None,
    layout: LayoutOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    split_seed: SplitSeedOption = 0,
    device: DeviceOption = "local",
    threads: ThreadsOption = 1,
    limit: Annotated[int, typer.Option(help="At most so many test images; 0 means all.")] = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Run an artifact on labelled test images and compare it with the twin; the manifest gets the result."""
    loaded = Artifact.load(artifact)
    source, split = model_and_data(model, data, split_seed, layout, mean, std)
    test = split.test.take(slice(0, limit)) if limit else split.test
    on = open_device(device, threads=threads)
    check = loaded.verify(test.normalized(), test.y, on, twin_logits(source, test), split.labels)
    before = loaded.manifest.accuracy
    recorded = loaded.record(check)
    if artifact.suffix == ".tar":
        recorded.pack(artifact)
    result = {
        "artifact": str(artifact),
        "accuracy": check.accuracy,
        "agreement": check.agreement,
        "largest_difference": check.largest_difference,
        "samples": check.samples,
        "device": check.device,
        "labels": check.labels,
        "manifest_accuracy_before": before["value"] if before else None,
    }
    if as_json:
        print_json(result)
    else:
        print_lines(
            [
                f"accuracy: {100 * check.accuracy:.2f} % ({check.samples} images on {check.device})",
                f"agreement with the twin: {100 * (check.agreement or 0):.2f} %, "
                f"largest difference of a logit {check.largest_difference:.3g}",
            ]
        )


def run(
    artifact: ArtifactArgument,
    source: Annotated[Path, typer.Option("--input", "-i", help="An .npy, an .npz (x) or a picture.")],
    device: DeviceOption = "local",
    threads: ThreadsOption = 1,
    top: Annotated[int, typer.Option(help="How many classes to show for each image.")] = 3,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Classify images with an artifact."""
    loaded = Artifact.load(artifact)
    spec = loaded.manifest.input
    images = read_images(source, loaded.input_shape, tuple(spec["mean"]), tuple(spec["std"]))
    logits = loaded.predict(images, open_device(device, threads=threads))
    names = loaded.manifest.class_names or [str(i) for i in range(logits.shape[1])]
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = shifted / shifted.sum(axis=1, keepdims=True)
    predictions = [
        [{"class": names[c], "index": int(c), "probability": float(row[c])} for c in np.argsort(-row)[:top]]
        for row in shares
    ]
    if as_json:
        print_json({"artifact": str(artifact), "logits": logits.tolist(), "predictions": predictions})
    else:
        print_lines(
            [
                f"{index}: " + ", ".join(f"{p['class']} {100 * p['probability']:.1f} %" for p in row)
                for index, row in enumerate(predictions)
            ]
        )


def benchmark(
    artifact: ArtifactArgument,
    against: Annotated[
        Path | None,
        typer.Option(help="Another artifact, such as the dense one, timed in turns with this one."),
    ] = None,
    device: DeviceOption = "local",
    threads: ThreadsOption = 1,
    repeat: RepeatOption = 30,
    warmup: WarmupOption = 3,
    number: NumberOption = 1,
    min_repeat_ms: MinRepeatOption = 20.0,
    cooldown_ms: CooldownOption = 0.0,
    timeout_s: TimeoutOption = 60.0,
    max_spread: MaxSpreadOption = None,
    max_repeat: MaxRepeatOption = 100,
    cache_flush: CacheFlushOption = False,
    cache_flush_bytes: FlushBytesOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time an artifact on a device."""
    settings = MeasurementSettings(
        warmup=warmup,
        number=number,
        repeat=repeat,
        min_repeat_ms=min_repeat_ms,
        cooldown_ms=cooldown_ms,
        timeout_s=timeout_s,
        threads=threads,
        cache_flush=cache_flush if cache_flush_bytes is None else cache_flush_bytes,
        max_spread=max_spread,
        max_repeat=max_repeat,
    )
    this = Artifact.load(artifact)
    others = {} if against is None else {"against": Artifact.load(against)}
    opened = open_device(device, threads=threads)
    with warnings.catch_warnings():
        # They are in the results, and printed from there.
        warnings.simplefilter("ignore", HealthWarning)
        results = this.benchmark(opened, others, settings)
    paths = {name: artifact if name == "this" else against for name in results}
    for name, result in results.items():
        if result.error is not None:
            raise DeviceError(
                f"Timing {paths[name]} failed on {device}: {result.error[0]}, {result.error[1]}."
            )
    ratio = None
    if against is not None:
        if not min(results["against"].samples) > 0:
            raise ArtifactError(f"{against} took no time; there is nothing to compare with.")
        ratio = latency_ratio(results["this"], results["against"])
    memory = {name: loaded.manifest.memory for name, loaded in {"this": this, **others}.items()}
    if as_json:
        print_json(
            {
                "artifact": str(artifact),
                "device": opened.describe(),
                "memory": memory,
                "ratio": ratio,
                "results": {name: result.to_dict() for name, result in results.items()},
            }
        )
        return
    _print_latencies(device, [(str(paths[name]), result) for name, result in results.items()], ratio)
    print_lines([f"memory of {paths[name]}: {describe_memory(used)}" for name, used in memory.items()])


def _print_latencies(device: str, results: Sequence[tuple[str, LatencyResult]], ratio: float | None) -> None:
    """Table of what was timed together, then why it stopped, the state of the device, and what is wrong."""
    rows = [
        (
            path,
            format_latency(result.value, result.unit),
            format_latency(result.spread, result.unit),
            f"{100 * result.spread / result.value:.1f} %" if result.value > 0 else "-",
            str(len(result.samples)),
        )
        for path, result in results
    ]
    first = results[0][1]
    title = f"latency on {device}, {first.settings.threads} threads"
    print_table(title, ("artifact", "median", "MAD", "MAD / median", "samples"), rows)
    lines = [] if ratio is None else [f"ratio: {ratio:.3f} (median of the ratios within each round)"]
    lines.append(f"stopped: {_why_stopped(first)}")
    if "cache_flush_bytes" in first.counters:
        lines.append(f"caches flushed before each call: {first.counters['cache_flush_bytes'] / 2**20:g} MiB")
    for when in ("before", "after"):
        told = describe_health(first.health.get(when, {}))
        lines += [f"device {when}: {told}"] if told else []
    lines += [f"warning: {text}" for text in first.health.get("warnings", [])]
    print_lines(lines)
    if first.breakdown:
        _print_breakdown(results[0][0], first)


def _why_stopped(result: LatencyResult) -> str:
    settings = result.settings
    if result.unit == "estimated_cycles":
        return "counts repeat to the bit, one sample each"
    if result.stopped_by == "repeat" or settings.max_spread is None:
        return f"after the {settings.repeat} samples asked for"
    if result.stopped_by == "spread":
        return f"the spread of each is at most {100 * settings.max_spread:g} % of its median"
    return (
        f"after {settings.max_repeat} samples, the limit: a spread is still above "
        f"{100 * settings.max_spread:g} % of its median"
    )


def _print_breakdown(artifact: str, result: LatencyResult) -> None:
    """Print what each kernel costs, the dearest first; in lines, as kernels have long names."""
    kernels = sorted(result.breakdown.items(), key=lambda item: (-item[1].get("cycles", 0.0), item[0]))
    columns = list(dict.fromkeys(column for _, part in kernels for column in part))
    titles = [column.replace("_", " ").replace("l1", "L1").replace("l2", "L2") for column in columns]
    lines = ["", f"kernels of {artifact}", "  ".join([*(f"{title:>14}" for title in titles), "kernel"])]
    for name, part in kernels:
        lines.append("  ".join([*(f"{part.get(column, 0.0):>14,.0f}" for column in columns), name]))
    print_lines(lines)
