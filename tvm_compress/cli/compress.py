"""`tvm-compress compress` and `compile`: apply a policy; build an artifact."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tvm_compress.calibration import RangeReport
from tvm_compress.cli.methods import METHODS, run_method
from tvm_compress.cli.options import (
    BatchesOption,
    BiasCorrectionOption,
    CalibrationOption,
    CalibrationPlotOption,
    CodebookBitsOption,
    CurvatureOption,
    DampingOption,
    DataOption,
    DebugOption,
    DrawsOption,
    EqualizeOption,
    FactorizationOption,
    GradientOption,
    GranularityOption,
    GroupOption,
    ImagesOption,
    IterationsOption,
    JsonOption,
    KeepOption,
    LabelsOption,
    LayoutOption,
    LossBoundOption,
    MeanOption,
    MemoryOption,
    MetricOption,
    ModelArgument,
    ObjectiveOption,
    PercentileOption,
    RankOption,
    RatioOption,
    SamplingOption,
    SaveCurvatureOption,
    ScaledOption,
    SchemeOption,
    ScopeOption,
    SeedOption,
    SensitivityOption,
    SigmaOption,
    SparseShareOption,
    SplitSeedOption,
    StatisticsOption,
    StdOption,
    StepOption,
    TargetOption,
    TrialsOption,
    TrustRadiusOption,
    WeightRoundingOption,
    WorthOption,
)
from tvm_compress.cli.output import describe_memory, print_json, print_lines, print_table
from tvm_compress.compression import compile_model, model_policy, model_ranges, twin_logits
from tvm_compress.data.dataset import Split
from tvm_compress.metrics.cost import metrics
from tvm_compress.model import Model, load_model
from tvm_compress.prune_then_quantize import EsnSettings
from tvm_compress.report.html import write_ranges


def compress(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the compressed Model.")],
    method: Annotated[
        str, typer.Option(help="What decides: " + ", ".join(METHODS) + ". Each has its own options below.")
    ] = "policy",
    policy: Annotated[
        Path | None,
        typer.Option(help="policy.json; without it every site is treated alike by the options below."),
    ] = None,
    data: DataOption = None,
    layout: LayoutOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    split_seed: SplitSeedOption = 0,
    pruning_ratio: Annotated[
        float | None, typer.Option(help="Share of the channels to remove, without --policy. Default 0.")
    ] = None,
    weight_bits: Annotated[
        int | None, typer.Option(help="32, or 1 to 8, without --policy. Default 32; esn: 4.")
    ] = None,
    activation_bits: Annotated[
        int | None, typer.Option(help="32, 8, or 1 to 6, without --policy. Default 32; esn: 8.")
    ] = None,
    rounding: Annotated[
        int | None,
        typer.Option(help="Kept channels are rounded up to a multiple: 1, 8 or 32. Default 8."),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(help="tolerance, l1 or l2: which channels go first. Default tolerance; esn: l2."),
    ] = None,
    calibration: CalibrationOption = None,
    calibration_plot: CalibrationPlotOption = None,
    equalize: EqualizeOption = False,
    weight_rounding: WeightRoundingOption = None,
    bias_correction: BiasCorrectionOption = False,
    target: TargetOption = "host",
    finetune_epochs: Annotated[
        int | None, typer.Option(help="Epochs of fine-tuning afterwards. Default 0; esn: 4.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the fine-tuning. Default 0.01; esn: 0.02.")
    ] = None,
    width: Annotated[
        float | None,
        typer.Option(
            help=f"Share of the channels to keep. Default {EsnSettings.width}.", rich_help_panel="esn"
        ),
    ] = None,
    mean_bits: Annotated[
        float | None,
        typer.Option(
            help="Mean weight bits, given out by layer from the signal norm in training.",
            rich_help_panel="esn",
        ),
    ] = None,
    esn_record: Annotated[
        Path | None,
        typer.Option(help="Recorded training that --mean-bits follows.", rich_help_panel="esn"),
    ] = None,
    save_esn: Annotated[
        Path | None,
        typer.Option(help="File for the signal norm of the fine-tuning.", rich_help_panel="esn"),
    ] = None,
    quantized_epochs: Annotated[
        int | None,
        typer.Option(
            help=f"Epochs of fine-tuning after quantization. Default {EsnSettings.quantized_epochs}.",
            rich_help_panel="esn",
        ),
    ] = None,
    scheme: SchemeOption = None,
    bits: CodebookBitsOption = None,
    ratio: RatioOption = None,
    rank: RankOption = None,
    factorization: FactorizationOption = None,
    sparse_share: SparseShareOption = None,
    scope: ScopeOption = None,
    group: GroupOption = None,
    granularity: GranularityOption = None,
    scaled: ScaledOption = None,
    metric: MetricOption = None,
    damping: DampingOption = None,
    gradient: GradientOption = None,
    keep: KeepOption = None,
    reestimate_batch_norm: StatisticsOption = False,
    images: ImagesOption = None,
    draws: DrawsOption = None,
    curvature: CurvatureOption = None,
    save_curvature: SaveCurvatureOption = None,
    objective: ObjectiveOption = None,
    loss_bound: LossBoundOption = None,
    sigma: SigmaOption = None,
    trust_radius: TrustRadiusOption = None,
    iterations: IterationsOption = None,
    step: StepOption = None,
    sensitivity: SensitivityOption = None,
    worth: WorthOption = None,
    batches: BatchesOption = None,
    memory: MemoryOption = None,
    sampling: SamplingOption = None,
    percentile: PercentileOption = None,
    labels: LabelsOption = None,
    trials: TrialsOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Apply a compression policy to a model without searching."""
    given = dict(locals())
    compressed, split, summary = run_method(method, given)
    if calibration_plot is not None:
        write_ranges(model_ranges(compressed), calibration_plot)
    _finish(compressed, split, output, target, summary, as_json)


def _finish(
    compressed: Model, split: Split | None, output: Path, target: str, summary: dict[str, Any], as_json: bool
) -> None:
    """Save the model that a method made, and tell what it is worth; its accuracy with data only."""
    compressed.save(output)
    accuracy, told = None, "validation accuracy: not measured, no data was given"
    if split is not None:
        right = twin_logits(compressed, split.validation).argmax(axis=1) == split.validation.y
        accuracy = float(right.mean())
        told = f"validation accuracy: {100 * accuracy:.2f} % ({len(right)} images, twin{_whose(split)})"
    result = {
        "model": str(output),
        "validation_accuracy": accuracy,
        "labels": None if split is None else split.labels,
        "metrics": metrics(compressed.module, model_policy(compressed)),
        **summary,
    }
    ranges = model_ranges(compressed)
    if as_json:
        print_json(result | ({"calibration": compressed.metadata["calibration"]} if ranges else {}))
    else:
        print_ranges(ranges)
        print_lines(
            [
                *(f"{key.replace('_', ' ')}: {value}" for key, value in summary.items() if _is_short(value)),
                f"compressed model: {output}",
                told,
                f"next: tvm-compress compile {output} --target {target} -o ARTIFACT",
            ]
        )


def print_ranges(ranges: Sequence[RangeReport]) -> None:
    """Print a table of what was seen of the quantized sites' inputs, and what of it their integers cover."""
    if ranges:
        rows = [
            (
                ", ".join(row.sites),
                str(row.bits),
                f"{row.seen_low:.4g} .. {row.seen_high:.4g}",
                f"{row.low:.4g} .. {row.high:.4g}",
                f"{100 * row.clipped:.3g} %",
            )
            for row in ranges
        ]
        print_table("Calibrated inputs", ("site", "bits", "seen", "range", "clipped"), rows)


def _whose(split: Split) -> str:
    return "; by the model's own predictions" if split.labels == "model" else ""


def _is_short(value: object) -> bool:
    return value is None or isinstance(value, int | float | str)


def compile_artifact(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Artifact directory, or a file that ends in .tar.")
    ],
    target: TargetOption = "host",
    compact: Annotated[
        bool, typer.Option("--compact", help="A small library: no faster kernels that take larger weights.")
    ] = False,
    tuning: Annotated[Path | None, typer.Option(help="Tuning database, by `tune`.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Build a model, dense or compressed, for a target and write an artifact."""
    artifact = compile_model(load_model(model), target, output, compact, tuning)
    result = {
        "artifact": str(output),
        "target": artifact.manifest.target,
        "library_bytes": artifact.library.stat().st_size,
        "memory": artifact.manifest.memory,
        "sha256": artifact.manifest.sha256,
    }
    if as_json:
        print_json(result)
    else:
        print_lines(
            [
                f"artifact: {output} ({result['library_bytes']:,} bytes of library)",
                f"memory: {describe_memory(artifact.manifest.memory)}",
            ]
        )
