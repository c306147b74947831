"""`tvm-compress cost`: latency models of a device: fit, evaluate, export."""

import csv
import io
from pathlib import Path
from typing import Annotated, Any

import typer

from tvm_compress.cli.options import DebugOption, JsonOption, SeedOption, ThreadsOption
from tvm_compress.cli.output import print_json, print_lines
from tvm_compress.cost.features import FEATURE_NAMES, kernel_vector
from tvm_compress.cost.latency_model import MIN_ROWS, LatencyModel
from tvm_compress.errors import SettingError
from tvm_compress.files import write_text
from tvm_compress.model import load_model
from tvm_compress.rpc.device import open_device
from tvm_compress.rpc.store import MeasurementStore
from tvm_compress.schedules.target_rules import parse_target
from tvm_compress.search.latency import THOROUGH_PASSES, LatencyMeter
from tvm_compress.search.latency_fit import evaluate_latency_model, fit_latency_model, stored_kernels
from tvm_compress.search.sampling import KernelSampler
from tvm_compress.search.settings import DEFAULT_TARGETS

app = typer.Typer(no_args_is_help=True, help="Latency models of a device: fit, eval, export.")

DeviceOption = Annotated[str, typer.Option(help="What is timed, see `device list`.")]
TargetOption = Annotated[str, typer.Option(help="Of the kernels; by default the device's own.")]
MeasurementsOption = Annotated[
    Path, typer.Option(help="SQLite file of kernels' times, such as a study's measurements.sqlite.")
]
# What the kernels of networks of any size fit into, for a meter that measures no network.
_ANY_SHAPE = (1, 1, 1, 1)


@app.command()
def fit(
    output: Annotated[Path, typer.Option("--output", "-o", help="File of the latency model (JSON).")],
    measurements: MeasurementsOption,
    device: DeviceOption = "local",
    target: TargetOption = "",
    threads: ThreadsOption = 1,
    network: Annotated[
        list[str] | None, typer.Option(help="Dense model whose kernels are sampled too; may be repeated.")
    ] = None,
    sample: Annotated[
        int, typer.Option(min=0, help="Time kernels until so many are known; 0 takes those in the file.")
    ] = 2000,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Time kernels of random policies, most where the model errs most, and fit a latency model to them."""
    models = [load_model(name) for name in network or []]
    with _meter(device, target, threads, measurements, _ANY_SHAPE) as meter:
        known = stored_kernels(meter.store, meter.device, meter.target)
        wanted = sample or len(known)
        if wanted < MIN_ROWS:
            raise SettingError(
                f"{measurements} holds {len(known)} kernels of {device} for {meter.target}, and {sample} are "
                f"asked for: a latency model needs {MIN_ROWS}.",
                "Ask for some with --sample.",
            )
        show = None if as_json else lambda done, total: print_lines([f"{done} of {total} kernels"])
        model = fit_latency_model(KernelSampler(models, meter, seed), meter, wanted, seed, show or _quiet)
    model.save(output)
    told = {
        "model": str(output),
        "kernels": model.rows,
        "unit": model.unit,
        "measurements": str(measurements),
    }
    print_json(told) if as_json else print_lines([f"{key}: {value}" for key, value in told.items()])


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Latency model, by `cost fit`.")],
    network: Annotated[str, typer.Option(help="Dense model that policies are drawn for.")],
    measurements: MeasurementsOption,
    device: DeviceOption = "local",
    target: TargetOption = "",
    threads: ThreadsOption = 1,
    policies: Annotated[int, typer.Option(min=3, help="Random policies to compare on.")] = 20,
    within: Annotated[float, typer.Option(help="Relative error that counts as right.")] = 0.1,
    seed: SeedOption = 1,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare a latency model with measurements of kernels and of whole networks."""
    latency_model, dense = LatencyModel.load(model), load_model(network)
    with _meter(device, target, threads, measurements, dense.input_spec.shape) as meter:
        if latency_model.unit != meter.device.unit:
            raise SettingError(
                f"{model} predicts {latency_model.unit}, but {device} measures {meter.device.unit}.",
                "Name the device that it was fitted on with --device.",
            )
        found = evaluate_latency_model(latency_model, dense, meter, policies, seed)
    told: dict[str, Any] = {
        "model": str(model),
        "network": network,
        "within": within,
        **found.summary(within),
    }
    print_json(told) if as_json else print_lines([f"{key}: {value}" for key, value in told.items()])


@app.command()
def export(
    measurements: MeasurementsOption,
    output: Annotated[Path, typer.Option("--output", "-o", help="CSV file to write.")],
    device: DeviceOption = "local",
    target: TargetOption = "",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write timed kernels as a table: key, kind, the model's features, the time of one call and its unit."""
    on, built_for = open_device(device), parse_target(target or default_target(device))
    kernels = stored_kernels(MeasurementStore(measurements), on, built_for)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["key", "kind", *FEATURE_NAMES, "value", "unit"])
    for kernel in kernels:
        writer.writerow([kernel.key, kernel.kind, *kernel_vector(kernel).tolist(), kernel.value, on.unit])
    write_text(output, table.getvalue())
    told = {"table": str(output), "kernels": len(kernels), "unit": on.unit}
    print_json(told) if as_json else print_lines([f"{key}: {value}" for key, value in told.items()])


def _quiet(done: int, total: int) -> None:
    pass


def default_target(device: str) -> str:
    """Return the target of a device's own kernels; SettingError where none is known."""
    if device not in DEFAULT_TARGETS:
        raise SettingError(f"No target is known for device {device!r}.", "Name one with --target.")
    return DEFAULT_TARGETS[device]


def _meter(
    device: str, target: str, threads: int, measurements: Path, shape: tuple[int, ...]
) -> LatencyMeter:
    on, built_for = open_device(device, threads), parse_target(target or default_target(device))
    return LatencyMeter(on, built_for, MeasurementStore(measurements), shape, passes=THOROUGH_PASSES)
