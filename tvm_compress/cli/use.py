"""`tvm-compress verify`, `run` and `benchmark`: an artifact on a device."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tvm_compress.artifact import Artifact
from tvm_compress.cli.load import model_and_data
from tvm_compress.cli.options import (
    ArtifactArgument,
    DataOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    LayoutOption,
    MeanOption,
    SplitSeedOption,
    StdOption,
    ThreadsOption,
)
from tvm_compress.cli.output import print_json, print_lines, print_table
from tvm_compress.compression import twin_logits
from tvm_compress.data.images import read_images
from tvm_compress.errors import ArtifactError, DeviceError
from tvm_compress.report.html import format_latency
from tvm_compress.rpc.device import LatencyResult, MeasurementSettings, open_device


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
    repeat: Annotated[int, typer.Option(help="Samples; the median is reported.")] = 30,
    warmup: Annotated[int, typer.Option(help="Untimed calls before.")] = 3,
    min_repeat_ms: Annotated[float, typer.Option(help="A sample takes at least so long.")] = 20.0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time an artifact on a device."""
    settings = MeasurementSettings(warmup=warmup, repeat=repeat, min_repeat_ms=min_repeat_ms, threads=threads)
    others = {} if against is None else {"against": Artifact.load(against)}
    opened = open_device(device, threads=threads)
    results = Artifact.load(artifact).benchmark(opened, others, settings)
    for name, result in results.items():
        if result.error is not None:
            path = artifact if name == "this" else against
            raise DeviceError(f"Timing {path} failed on {device}: {result.error[0]}, {result.error[1]}.")
    ratio = None
    if against is not None:
        if not results["against"].value > 0:
            raise ArtifactError(f"{against} took no time; there is nothing to compare with.")
        ratio = results["this"].value / results["against"].value
    if as_json:
        print_json(
            {
                "artifact": str(artifact),
                "device": opened.describe(),
                "ratio": ratio,
                "results": {name: result.to_dict() for name, result in results.items()},
            }
        )
        return
    rows = [
        (
            str(artifact if name == "this" else against),
            format_latency(result.value, result.unit),
            format_latency(result.spread, result.unit),
            str(len(result.samples)),
        )
        for name, result in results.items()
    ]
    print_table(f"latency on {device}, {threads} threads", ("artifact", "median", "MAD", "samples"), rows)
    if ratio is not None:
        print_lines([f"ratio: {ratio:.3f}"])
    if results["this"].breakdown:
        _print_breakdown(artifact, results["this"])


def _print_breakdown(artifact: Path, result: LatencyResult) -> None:
    """Print what each kernel costs, the dearest first; in lines, as kernels have long names."""
    kernels = sorted(result.breakdown.items(), key=lambda item: (-item[1].get("cycles", 0.0), item[0]))
    columns = list(dict.fromkeys(column for _, part in kernels for column in part))
    titles = [column.replace("_", " ").replace("l1", "L1").replace("l2", "L2") for column in columns]
    lines = ["", f"kernels of {artifact}", "  ".join([*(f"{title:>14}" for title in titles), "kernel"])]
    for name, part in kernels:
        lines.append("  ".join([*(f"{part.get(column, 0.0):>14,.0f}" for column in columns), name]))
    print_lines(lines)
