"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from tvm_compress.calibration import METHODS as CALIBRATIONS
from tvm_compress.fastlc.settings import SCHEMES
from tvm_compress.weight_rounding import METHODS as WEIGHT_ROUNDINGS

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="x.pt2, x.onnx, a saved Model directory, or sample:NAME.")
]
ArtifactArgument = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Artifact directory or .tar.")]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        help=".npz (x, y), IDX or image folder, cifar-10-batches-bin, or sample:NAME (a sample's default).",
    ),
]
LayoutOption = Annotated[str | None, typer.Option(help="Layout of the images in an .npz: NCHW or NHWC.")]
MeanOption = Annotated[
    str | None,
    typer.Option(help="Mean per channel on pixels in [0, 1], such as 0.49,0.48,0.45; else the model's."),
]
StdOption = Annotated[str | None, typer.Option(help="Standard deviation per channel; goes with --mean.")]
SplitSeedOption = Annotated[int, typer.Option(help="Seed of the split into train, validation and test.")]
DeviceOption = Annotated[
    str, typer.Option("--device", help="local, emulated-a72, tracker://HOST:PORT/KEY or ssh://USER@HOST.")
]
ThreadsOption = Annotated[int, typer.Option(help="Threads on the device.")]
RepeatOption = Annotated[
    int, typer.Option(help="Samples; the median is reported.", rich_help_panel="Measurement")
]
WarmupOption = Annotated[int, typer.Option(help="Untimed calls before.", rich_help_panel="Measurement")]
NumberOption = Annotated[int, typer.Option(help="Calls per sample.", rich_help_panel="Measurement")]
MinRepeatOption = Annotated[
    float,
    typer.Option(
        help="Calls are added until a sample takes so long; not with --cache-flush.",
        rich_help_panel="Measurement",
    ),
]
CooldownOption = Annotated[
    float, typer.Option(help="Pause after each sample.", rich_help_panel="Measurement")
]
TimeoutOption = Annotated[
    float,
    typer.Option(help="Seconds that a single call to the device may take.", rich_help_panel="Measurement"),
]
MaxSpreadOption = Annotated[
    float | None,
    typer.Option(
        help="Take samples until their MAD is at most this part of the median, such as 0.02.",
        rich_help_panel="Measurement",
    ),
]
MaxRepeatOption = Annotated[
    int, typer.Option(help="The most samples that --max-spread may lead to.", rich_help_panel="Measurement")
]
CacheFlushOption = Annotated[
    bool,
    typer.Option("--cache-flush", help="Flush the caches before each call.", rich_help_panel="Measurement"),
]
FlushBytesOption = Annotated[
    int | None,
    typer.Option(
        help="Bytes to walk for that; by default twice the device's last cache.",
        rich_help_panel="Measurement",
    ),
]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
TargetOption = Annotated[
    str, typer.Option("--target", help='host, raspberry-pi/4b-aarch64, or "llvm -mcpu=...".')
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

CalibrationOption = Annotated[
    str | None,
    typer.Option(
        help="How ranges follow from what was seen: " + ", ".join(CALIBRATIONS) + ". Default mse.",
        rich_help_panel="Post-training quantization",
    ),
]
CalibrationPlotOption = Annotated[
    Path | None,
    typer.Option(
        help="PNG file for a plot of the ranges and of what they clip.",
        rich_help_panel="Post-training quantization",
    ),
]
WeightRoundingOption = Annotated[
    str | None,
    typer.Option(
        help="Of quantized weights: " + ", ".join(WEIGHT_ROUNDINGS) + ". Default nearest.",
        rich_help_panel="Post-training quantization",
    ),
]
EqualizeOption = Annotated[
    bool,
    typer.Option(
        "--equalize",
        help="Share weight ranges between layers that follow each other.",
        rich_help_panel="Post-training quantization",
    ),
]
BiasCorrectionOption = Annotated[
    bool,
    typer.Option(
        "--bias-correction",
        help="Put the channels' mean outputs and their spread right.",
        rich_help_panel="Post-training quantization",
    ),
]

GroupOption = Annotated[
    str | None,
    typer.Option(
        help="Weights that go together: element, simd-N, filter or block-MxN; toco: channel and layer too.",
        rich_help_panel="fastlc, toco",
    ),
]
SchemeOption = Annotated[
    str | None, typer.Option(help="One of: " + ", ".join(SCHEMES) + ".", rich_help_panel="fastlc")
]
CodebookBitsOption = Annotated[
    int | None, typer.Option("--bits", help="Of kmeans and fixed. Default 4.", rich_help_panel="fastlc")
]
RatioOption = Annotated[
    float | None,
    typer.Option(help="So many times fewer weights (prune, low-rank). Default 4.", rich_help_panel="fastlc"),
]
RankOption = Annotated[
    int | None, typer.Option(help="One rank for all sites, in place of --ratio.", rich_help_panel="fastlc")
]
FactorizationOption = Annotated[
    str | None, typer.Option(help="channel or spatial split of low rank.", rich_help_panel="fastlc")
]
SparseShareOption = Annotated[
    float | None, typer.Option(help="Sparse share of low-rank+sparse.", rich_help_panel="fastlc")
]
ScopeOption = Annotated[
    str | None, typer.Option(help="Prune over the network, or in each layer.", rich_help_panel="fastlc")
]
GranularityOption = Annotated[
    str | None, typer.Option(help="A codebook per tensor or per channel.", rich_help_panel="fastlc")
]
ScaledOption = Annotated[
    bool | None, typer.Option(help="Binary weights -a and +a, or -1 and +1.", rich_help_panel="fastlc")
]
MetricOption = Annotated[
    str | None, typer.Option(help="Norm of the compression steps: curvature or l2.", rich_help_panel="fastlc")
]
DampingOption = Annotated[
    float | None, typer.Option(help="Share of the mean curvature added to it.", rich_help_panel="fastlc")
]
GradientOption = Annotated[
    bool | None, typer.Option(help="Whether the loss's gradient is followed.", rich_help_panel="fastlc")
]
KeepOption = Annotated[
    list[str] | None, typer.Option(help="A site that stays as it is; repeatable.", rich_help_panel="fastlc")
]
StatisticsOption = Annotated[
    bool,
    typer.Option(
        "--reestimate-batch-norm", help="Take batch-norm statistics again (data).", rich_help_panel="fastlc"
    ),
]
ImagesOption = Annotated[
    int | None,
    typer.Option(
        help="Training images for the curvature, for toco's loss and samples, or for ranges (policy: 256).",
        rich_help_panel="policy, fastlc, toco",
    ),
]
DrawsOption = Annotated[
    int | None, typer.Option(help="Labels drawn per image; 0 is exact.", rich_help_panel="fastlc")
]
CurvatureOption = Annotated[
    Path | None,
    typer.Option(help="Saved curvature of this model: then no data are needed.", rich_help_panel="fastlc"),
]
SaveCurvatureOption = Annotated[
    Path | None, typer.Option(help="File for the curvature that was computed.", rich_help_panel="fastlc")
]
ObjectiveOption = Annotated[
    str | None, typer.Option(help="prune or quantize. Default prune.", rich_help_panel="toco")
]
LossBoundOption = Annotated[
    float | None,
    typer.Option(
        help="The loss may grow to this many times the dense model's. Default 1.05.", rich_help_panel="toco"
    ),
]
SigmaOption = Annotated[
    float | None,
    typer.Option(help="Factor by which the bound grows towards that. Default 1.02.", rich_help_panel="toco"),
]
TrustRadiusOption = Annotated[
    float | None,
    typer.Option(help="How far weights may move at first, of the largest weight.", rich_help_panel="toco"),
]
IterationsOption = Annotated[int | None, typer.Option(help="At most so many.", rich_help_panel="toco")]
SensitivityOption = Annotated[
    str | None,
    typer.Option(
        help="Whose gradient a weight's tolerance follows: weight or filter.",
        rich_help_panel="toco",
    ),
]
WorthOption = Annotated[
    str | None,
    typer.Option(
        help="What a pruned weight counts: weights (all alike), operations (its multiplications).",
        rich_help_panel="toco",
    ),
]
StepOption = Annotated[
    float | None,
    typer.Option(
        help="Share of the weights left that one iteration may prune. Default 0.1.", rich_help_panel="toco"
    ),
]
BatchesOption = Annotated[
    int | None, typer.Option(help="Gradients per iteration, of 32 images each.", rich_help_panel="toco")
]
MemoryOption = Annotated[
    float | None,
    typer.Option(help="How much the last iteration's gradients count in the next.", rich_help_panel="toco"),
]
SamplingOption = Annotated[
    str | None,
    typer.Option(help="Where gradients are taken: active, random or all.", rich_help_panel="toco"),
]
PercentileOption = Annotated[
    float | None,
    typer.Option(help="Of a group's tolerances that gives its bits; 0 is the least.", rich_help_panel="toco"),
]
LabelsOption = Annotated[
    str | None,
    typer.Option(help="data, or model: its own predictions.", rich_help_panel="toco"),
]
TrialsOption = Annotated[
    Path | None,
    typer.Option(
        help="Directory for trials.jsonl; an interrupted run goes on from there.", rich_help_panel="toco"
    ),
]
