"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

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
DeviceOption = Annotated[str, typer.Option("--device", help="local or emulated-a72.")]
ThreadsOption = Annotated[int, typer.Option(help="Threads on the device.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
TargetOption = Annotated[
    str, typer.Option("--target", help='host, raspberry-pi/4b-aarch64, or "llvm -mcpu=...".')
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
