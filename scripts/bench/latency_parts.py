"""What parts of `latency_model.py` share: meters that remember, boards that forget, models fitted before."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from tvm_compress.cost.latency_model import LatencyModel
from tvm_compress.model import Model
from tvm_compress.rpc.device import MeasurementSettings, open_device
from tvm_compress.rpc.emulation_kit import prepare
from tvm_compress.rpc.store import MeasurementStore
from tvm_compress.schedules.target_rules import parse_target
from tvm_compress.search.latency import SHORT, THOROUGH_PASSES, LatencyMeter
from tvm_compress.search.latency_fit import stored_kernels
from tvm_compress.search.settings import DEFAULT_TARGETS

SAMPLE = "sample:resnet8-fashion"


def store_of(device: str, cache: Path) -> Path:
    """Where the kernels that a device has timed are kept."""
    return cache / f"latency_model-{device}.sqlite"


def open_meter(device: str, model: Model, path: Path, settings: MeasurementSettings = SHORT) -> LatencyMeter:
    """Meter of a network whose measurements are kept; it takes as many passes as `tvm-compress cost`."""
    on, target, store = open_device(device), parse_target(DEFAULT_TARGETS[device]), MeasurementStore(path)
    return LatencyMeter(on, target, store, model.input_spec.shape, settings, THOROUGH_PASSES)


def fitted_before(device: str, model: Model, cache: Path) -> LatencyModel:
    """Model fitted to all kernels that the part `device` has timed."""
    with open_meter(device, model, store_of(device, cache)) as meter:
        kernels = stored_kernels(meter.store, meter.device, meter.target)
    if not kernels:
        # Of another target, for instance: whose cores were fewer when it was read.
        raise SystemExit(f"{store_of(device, cache)} has no kernels for {meter.target}.")
    fitted = LatencyModel(meter.device.unit)
    return fitted.fit(fitted.rows_of(kernels, [kernel.value for kernel in kernels]))


@contextmanager
def forgetful_board(folder: Path) -> Iterator[None]:
    """Let the emulated board keep what it ran in its own folder: it shall know nothing of other searches."""
    kit = replace(prepare(), cache=folder / "cache")
    with patch("tvm_compress.rpc.emulated_a72.prepare", lambda: kit):
        yield
