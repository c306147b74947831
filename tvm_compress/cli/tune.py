"""`tvm-compress tune`: the fastest way to compute each layer of a model, measured on a device."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from tvm_compress.cli.cost import default_target
from tvm_compress.cli.options import DebugOption, DeviceOption, JsonOption, ModelArgument, ThreadsOption
from tvm_compress.cli.output import print_json, print_lines
from tvm_compress.model import load_model
from tvm_compress.report.html import format_latency
from tvm_compress.rpc.device import open_device
from tvm_compress.schedules.choices import Choice
from tvm_compress.schedules.tuning import TunedLayer
from tvm_compress.tuner import tune_model


def tune(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Tuning database (JSON); what is there already is kept.")
    ],
    target: Annotated[str, typer.Option(help="Of the kernels; by default the device's own.")] = "",
    device: DeviceOption = "local",
    threads: ThreadsOption = 1,
    trials: Annotated[
        int, typer.Option(min=1, help="Ways to compute each layer that are measured, beside the default.")
    ] = 8,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure ways to compute each layer, and keep the fastest for `compile --tuning`."""
    opened = open_device(device, threads)
    show = None if as_json else lambda text: print_lines([text])
    layers = tune_model(
        load_model(model), target or default_target(device), opened, output, trials, progress=show
    )
    value, default = (
        sum(values) for values in zip(*((o.value, o.default_value) for o in layers), strict=True)
    )
    changed = sum(one.choice != one.default for one in layers)
    if as_json:
        print_json(
            {
                "database": str(output),
                "device": opened.describe(),
                "unit": opened.unit,
                "layers": [
                    {"layer": o.layer, "choice": _text(o.choice), "default": _text(o.default)}
                    | {"value": o.value, "default_value": o.default_value, "tried": o.tried}
                    for o in layers
                ],
                "changed": changed,
                "ratio": value / default,
            }
        )
        return
    _print_layers(device, layers)
    print_lines(
        [
            f"{changed} of {len(layers)} layers are faster by another choice than the default; "
            f"all together they take {value / default:.3f} of what the defaults take",
            f"tuning database: {output}",
            f"next: tvm-compress compile {model} --target {target or default_target(device)} "
            f"--tuning {output} -o ARTIFACT",
        ]
    )


def _print_layers(device: str, layers: Sequence[TunedLayer]) -> None:
    """Print a line for each layer, as their descriptions are long."""
    lines = [
        "",
        f"layers on {device}",
        f"{'ratio':>5}  {'choice':<20}  {'default':<20}  takes, by default, layer",
    ]
    for one in layers:
        times = (format_latency(value, one.unit) for value in (one.value, one.default_value))
        choice = _text(one.choice) if one.choice != one.default else "the default"
        lines.append(
            f"{one.value / one.default_value:5.3f}  {choice:<20}  {_text(one.default):<20}  "
            f"{', '.join(times)}, {one.layer}"
        )
    print_lines([*lines, ""])


def _text(choice: Choice) -> str:
    return f"{choice.kernel} {','.join(map(str, choice.cut))}"
