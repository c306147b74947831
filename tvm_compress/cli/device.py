"""`tvm-compress device`: what libraries can be measured on, and a board's own server."""

import platform
import signal
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from tvm_compress.cli.options import DebugOption, JsonOption, ThreadsOption
from tvm_compress.cli.output import print_json, print_lines
from tvm_compress.errors import DeviceError
from tvm_compress.passes.pipeline import build
from tvm_compress.rpc.address import Tracker
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import MeasurementSettings, open_device
from tvm_compress.rpc.worker_process import WorkerProcess
from tvm_compress.samples.load import load_sample
from tvm_compress.schedules.target_rules import parse_target

app = typer.Typer(no_args_is_help=True, help="Devices: list, check, serve.")

DEVICES = {
    "local": "this machine, in seconds, in a process of its own",
    "emulated-a72": "a Cortex-A72 under QEMU, in estimated cycles that repeat to the bit",
    "tracker://HOST:PORT/KEY": "boards that serve at a tracker of TVM, in seconds",
    "ssh://USER@HOST[:PORT][/PATH/OF/PYTHON]": "a board that has SSH and TVM's runtime, in seconds",
}
# Ratios that two interleaved measurements of one library should have, if nothing disturbs them.
CHECK = MeasurementSettings(warmup=3, repeat=15, min_repeat_ms=10)


@app.command("list")
def list_devices(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the devices that `--device` takes."""
    if as_json:
        print_json({"devices": DEVICES})
    else:
        print_lines([f"{name}: {text}" for name, text in DEVICES.items()])


@app.command()
def check(
    device: Annotated[str, typer.Argument(help="A device, see `device list`.")] = "local",
    target: Annotated[str, typer.Option(help="Target of the board's processor.")] = "",
    threads: ThreadsOption = 1,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Connect, run a known network, compare what it computes, and tell how noisy its times are."""
    on = open_device(device, threads=threads)
    built_for = parse_target(target or ("host" if device == "local" else "raspberry-pi/4b-aarch64"))
    sample = load_sample("resnet8-fashion")
    x = np.sin(np.arange(28 * 28, dtype=np.float32)).reshape(sample.input_spec.shape)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "sample.so"
        compiled = build(sample.module, built_for)
        compiled.export(library, export_fcompile(str(built_for.attrs.get("mtriple", ""))))
        settings = MeasurementSettings(**{**CHECK.to_dict(), "threads": threads})
        with on.open(settings) as session:
            (found,) = session.run(library, [x])
            timed = session.time_many({"first": (library, [x]), "second": (library, [x])})
    difference = float(np.abs(found - _expected(sample, x)).max())
    if difference > 1e-3:
        raise DeviceError(
            f"{device} computes the sample network wrongly: a logit is off by {difference:.3g}.",
            "Was the right --target named?",
        )
    for result in timed.values():
        if result.error is not None:
            raise DeviceError(f"{device} failed ({result.error[0]}): {result.error[1]}")
    told: dict[str, Any] = _noise(timed["first"].samples, timed["second"].samples) | {
        "device": on.describe(),
        "target": str(built_for),
        "latency": timed["first"].value,
        "unit": timed["first"].unit,
        "largest_difference": difference,
    }
    if as_json:
        print_json(told)
    else:
        print_lines([f"{key}: {value}" for key, value in told.items()])


def _expected(sample: Any, x: np.ndarray) -> np.ndarray:
    from tvm_compress.twin import Twin

    return Twin(sample.module).predict(x)


def _noise(first: tuple[float, ...], second: tuple[float, ...]) -> dict[str, float]:
    """Tell how far samples of a library are apart, and its ratio to itself, which should be 1."""
    median = statistics.median(first)
    spread = statistics.median(abs(sample - median) for sample in first) / median
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    return {"spread": spread, "ratio_to_itself": statistics.median(ratios)}


@app.command()
def serve(
    tracker: Annotated[
        str, typer.Argument(help="tracker://HOST:PORT/KEY: where to be announced, and as what.")
    ],
    emulated: Annotated[bool, typer.Option("--emulated-a72", help="Serve an emulated Cortex-A72.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; default all.")] = "",
    threads: ThreadsOption = 1,
    debug: DebugOption = False,
) -> None:
    """Serve this machine as a board, until interrupted; what a module breaks ends with its session."""
    from tvm_compress.rpc.serve import BoardServer

    where = Tracker.parse(tracker)
    # A shell that starts us in the background of a script has us ignore interrupts, which end us tidily.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print_lines([f"serving {platform.node()} ({platform.machine()}) at {where}; stop with Ctrl-C"])
    machine = "aarch64" if emulated else ""
    BoardServer(where, _starter(emulated, threads), lambda line: print_lines([line]), host, machine).run()


def _starter(emulated: bool, threads: int) -> Any:
    if emulated:
        from tvm_compress.rpc.emulated_a72 import worker_command as emulated_command
        from tvm_compress.rpc.emulation_kit import prepare

        kit = prepare()
        return lambda: WorkerProcess(*emulated_command(kit, counting=False))
    from tvm_compress.rpc.local import worker_command

    command, environment = worker_command(threads)
    return lambda: WorkerProcess(lambda _: command, environment)
