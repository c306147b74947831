"""Latency of candidates: measured beside the dense model, or predicted and measured when it matters."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tvm

from tvm_compress.cost.latency_model import KernelRow, LatencyModel
from tvm_compress.errors import DeviceError
from tvm_compress.passes.pipeline import Compiled, build, lower
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import ArgumentSpecs, Device, LatencyResult, MeasurementSettings, Session
from tvm_compress.rpc.measure import measure
from tvm_compress.rpc.store import MeasurementStore
from tvm_compress.schedules.apply import KernelInfo, kernel_infos
from tvm_compress.search.results import MEASURED, PREDICTED, SUMMED
from tvm_compress.search.settings import SearchSettings

# A candidate that the device fails on (twice) counts as this many times slower than the dense model.
FAILED_RATIO = 10.0

# How the search times a library: short, since the dense model is timed along with each candidate.
SHORT = MeasurementSettings(repeat=9, min_repeat_ms=8.0)
# How it times those that may win: the best of many short measurements is the luckiest one too.
THOROUGH = MeasurementSettings(repeat=30, min_repeat_ms=20.0)
# The same for a single kernel.
KERNEL_SAMPLES = 3
KERNEL_SAMPLE_MS = 2.0
# So many whole networks are measured before sums of kernels are trusted.
CHECKS_FIRST = 3


@dataclass(frozen=True)
class Latency:
    """Latency of a network in the device's unit, its ratio to the dense model's, and where it comes from."""

    value: float
    ratio: float
    kind: str  # "measured" | "summed" | "predicted" | "failed"


def structure_key(policy: CompressionPolicy, model: str, where: str) -> str:
    """Key of all that a policy's latency depends on: model, channels, schemes, bits, and where it runs."""
    sites = {
        name: [site.channels, site.scheme, site.weight_bits, site.activation_bits]
        for name, site in sorted(policy.sites.items())
    }
    return hashlib.sha256(json.dumps([model, sites, where]).encode()).hexdigest()[:32]


class LatencyMeter:
    """Measures modules on a device, each interleaved with the dense model, so that drift cancels.

    A context manager; the session with the device is opened when it is first needed. What was measured
    before, by key, comes from the store.

    Parameters
    ----------
    device
        Where libraries run.
    target
        Of the kernels; the dense model's too.
    store
        Of all measurements.
    input_shape
        (1, C, H, W).
    settings
        How libraries are timed; the threads are the device's.
    """

    def __init__(
        self,
        device: Device,
        target: tvm.target.Target,
        store: MeasurementStore,
        input_shape: Sequence[int],
        settings: MeasurementSettings = SHORT,
    ) -> None:
        self.device = device
        self.target = target
        self._store = store
        # Latency does not depend on the values, but zeros alone would be unlike any input.
        ramp = np.arange(math.prod(input_shape), dtype=np.float32)
        self._inputs = [np.sin(ramp).reshape(tuple(input_shape))]
        self._settings = replace(settings, threads=device.threads)
        self._kernel_settings = replace(self._settings, repeat=KERNEL_SAMPLES, min_repeat_ms=KERNEL_SAMPLE_MS)
        self._stack = ExitStack()
        self._session: Session | None = None
        self._kernel_session: Session | None = None
        self._dense_library: Path | None = None
        self._dense: LatencyResult | None = None

    def __enter__(self) -> "LatencyMeter":
        self._stack.__enter__()
        self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="tvm-compress-")))
        return self

    def __exit__(self, *details: Any) -> None:
        self._stack.__exit__(*details)

    @property
    def where(self) -> str:
        """Text of all that latencies depend on besides the module."""
        return json.dumps([self.device.name, str(self.target), self._settings.threads, tvm.__version__])

    @property
    def dense(self) -> LatencyResult:
        """Reference latency T_0, once `set_dense` was called."""
        assert self._dense is not None, "set_dense comes first"
        return self._dense

    def set_dense(self, module: tvm.IRModule, key: str) -> LatencyResult:
        """Build the dense module and take its latency; a study that is resumed finds it in the store.

        Raises
        ------
        DeviceError
            If the device cannot run it.
        """
        self._dense_library = self.export(build(module, self.target), "dense")
        found = self._stored(key)
        if found is None:
            found = self._open().time_many({"dense": (self._dense_library, self._inputs)})["dense"]
            if not found.ok:
                raise _failure(self.device, found)
            self._put(key, found, {"what": "dense"})
        self._dense = found
        return found

    def export(self, compiled: Compiled, name: str) -> Path:
        """Write a library for the device into the meter's temporary folder."""
        path = self._folder / f"{name}.so"
        compiled.export(path, fcompile=self._linker())
        return path

    def measured(self, key: str) -> LatencyResult | None:
        """What the store has of a key: a latency that is corrected for drift already."""
        return self._stored(key)

    def measure(self, compiled: Compiled, key: str) -> LatencyResult:
        """Latency of a built module: its ratio to the dense one beside it, times T_0; or a failure.

        Raises
        ------
        DeviceError
            If the dense model fails too: then the device is to blame.
        """
        library = self.export(compiled, "candidate")
        assert self._dense_library is not None
        for _ in range(2):
            timed = measure(
                self._open(),
                {"dense": self._dense_library, "candidate": library},
                self._inputs,
                reference="dense" if self.device.unit == "seconds" else None,
            )
            result, ratio = timed["candidate"].result, timed["candidate"].ratio
            if result.ok:
                break
        if not result.ok and not timed["dense"].result.ok:
            raise _failure(self.device, timed["dense"].result)
        provenance = {"what": "policy", "raw": result.value if result.ok else None, "ratio": ratio}
        if ratio is not None:
            result = replace(result, value=ratio * self.dense.value)
        if result.ok:
            self._put(key, result, provenance)
        return result

    def time_kernels(
        self, kernels: Sequence[KernelInfo], library: Path | None = None
    ) -> dict[str, LatencyResult]:
        """Latency of one call of each kernel, by key; from the store where it has them.

        Those that it lacks are timed in `library`, or in one that is built of them alone.
        """
        found = {
            k.key: r
            for k in kernels
            if (r := self._stored(_kernel_key(k), self._kernel_settings)) is not None
        }
        missing = {k.name: k for k in kernels if k.key not in found}
        if missing:
            specs = {name: argument_specs(k) for name, k in missing.items()}
            timed = self._open_for_kernels().time_kernels(library or self._library_of(missing), specs)
            for name, result in timed.items():
                if result.ok:
                    found[missing[name].key] = result
                    self._put(
                        _kernel_key(missing[name]), result, {"what": "kernel", "kind": missing[name].kind}
                    )
        return found

    def _library_of(self, kernels: Mapping[str, KernelInfo]) -> Path:
        functions = {name: k.func.with_attr("global_symbol", name) for name, k in kernels.items()}
        path = self._folder / "kernels.so"
        compiled = tvm.compile(tvm.IRModule(functions), self.target)
        compiled.export_library(str(path), fcompile=self._linker())
        return path

    def _linker(self) -> Callable[..., None] | None:
        return export_fcompile(str(self.target.attrs.get("mtriple", "")))

    def _open_for_kernels(self) -> Session:
        if self._kernel_session is None:
            self._kernel_session = self._stack.enter_context(self.device.open(self._kernel_settings))
        return self._kernel_session

    def _open(self) -> Session:
        if self._session is None:
            self._session = self._stack.enter_context(self.device.open(self._settings))
        return self._session

    def _stored(self, key: str, settings: MeasurementSettings | None = None) -> LatencyResult | None:
        found = self._store.get(key, self._stored_as, self.device.unit, settings or self._settings)
        return found if found is not None and found.ok else None

    @property
    def _stored_as(self) -> str:
        return f"{self.device.name} {self.device.definition}".rstrip()

    def _put(self, key: str, result: LatencyResult, provenance: Mapping[str, Any]) -> None:
        self._store.put(key, self._stored_as, result, {**self.device.describe(), **provenance})


def _failure(device: Device, result: LatencyResult) -> DeviceError:
    kind, text = result.error or ("crash", "no reason was given")
    return DeviceError(f"The device {device.name} failed on the dense model ({kind}): {text}")


def _kernel_key(kernel: KernelInfo) -> str:
    return f"kernel-{kernel.key}"


def argument_specs(kernel: KernelInfo) -> ArgumentSpecs:
    """Shape and dtype of each argument of a kernel, outputs last."""
    return [([int(extent) for extent in p.shape], str(p.dtype)) for p in kernel.func.params]


class MeasuredLatency:
    """Builds and measures every policy that was not measured before."""

    def __init__(self, meter: LatencyMeter) -> None:
        self._meter = meter

    def latency(self, module: tvm.IRModule, key: str, episode: int, accuracy: float) -> Latency:
        """Latency of an integer (or float) module with the structure `key`."""
        result = self._meter.measured(key) or self._meter.measure(build(module, self._meter.target), key)
        return _measured(result, self._meter.dense)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what was measured is in the store."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


def _measured(result: LatencyResult, dense: LatencyResult) -> Latency:
    if not result.ok:
        return Latency(FAILED_RATIO * dense.value, FAILED_RATIO, "failed")
    return Latency(result.value, result.value / dense.value, MEASURED)


class KernelLatency:
    """Sums up a policy's kernels, each of which is built and timed once in all its networks.

    Whole networks are measured for the first episodes and every n-th; the median of measured over summed
    corrects the sums, for what a network costs beside its kernels.
    """

    def __init__(self, meter: LatencyMeter, settings: SearchSettings) -> None:
        self._meter = meter
        self._settings = settings
        # (sum of the kernels, latency of the whole network).
        self.checks: list[tuple[float, float]] = []

    def latency(self, module: tvm.IRModule, key: str, episode: int, accuracy: float) -> Latency:
        """Latency of an integer (or float) module with the structure `key`."""
        lowered = lower(module, self._meter.target)
        kernels = kernel_infos(lowered, self._meter.target)
        times = self._meter.time_kernels(kernels)
        dense = self._meter.dense
        failed = [kernel for kernel in kernels if kernel.key not in times]
        if failed:
            return Latency(FAILED_RATIO * dense.value, FAILED_RATIO, "failed")
        total = sum(times[kernel.key].value * kernel.count for kernel in kernels)
        if len(self.checks) < CHECKS_FIRST or (episode + 1) % self._settings.measure_every == 0:
            result = self._meter.measured(key) or self._meter.measure(build(lowered, self._meter.target), key)
            if result.ok:
                self.checks.append((total, result.value))
            return _measured(result, dense)
        value = total * float(np.median([whole / kernels for kernels, whole in self.checks]))
        return Latency(value, value / dense.value, SUMMED)

    def state_dict(self) -> dict[str, Any]:
        """The checks so far; the kernels' times are in the store."""
        return {"checks": [list(check) for check in self.checks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s values."""
        self.checks = [(total, whole) for total, whole in state["checks"]]


class HybridLatency:
    """Predicts policies from their kernels, and measures those that matter.

    Measured are the first episodes, every n-th, and each policy that by its prediction would be the best so
    far or stand on the Pareto set. What is measured gives the time of every kernel in it; known kernels count
    with their own time, others as the model predicts, and the model is fitted again.
    """

    def __init__(self, meter: LatencyMeter, settings: SearchSettings) -> None:
        self._meter = meter
        self._settings = settings
        self._rows: dict[str, KernelRow] = {}
        # Networks that were measured: (calls by kernel's key, latency).
        self._networks: list[tuple[dict[str, int], float]] = []
        # (accuracy, ratio) of every episode so far.
        self._points: list[tuple[float, float]] = []
        self.model = LatencyModel(meter.device.unit, settings.seed, {"device": meter.device.name})

    def latency(self, module: tvm.IRModule, key: str, episode: int, accuracy: float) -> Latency:
        """Latency of an integer (or float) module with the structure `key`."""
        dense = self._meter.dense
        # Not straight from the store: an episode that is done again after an interruption must learn the same
        # from it.
        kernels = kernel_infos(lower(module, self._meter.target), self._meter.target)
        predicted = self.model.predict(kernels, {k: row.value for k, row in self._rows.items()})
        latency = Latency(predicted, predicted / dense.value, PREDICTED)
        if self._worth_measuring(episode, accuracy, latency.ratio):
            latency = self._measure(module, key, dense)
        self._points.append((accuracy, latency.ratio))
        return latency

    def _worth_measuring(self, episode: int, accuracy: float, ratio: float) -> bool:
        settings = self._settings
        if episode < settings.measure_first or (episode + 1) % settings.measure_every == 0:
            return True

        def reward(point: tuple[float, float]) -> float:
            return point[0] + settings.beta * abs(point[1] / settings.budget - 1.0)

        best = all(reward((accuracy, ratio)) > reward(point) for point in self._points)
        return best or not any(a >= accuracy and r <= ratio for a, r in self._points)

    def _measure(self, module: tvm.IRModule, key: str, dense: LatencyResult) -> Latency:
        compiled = build(module, self._meter.target)
        kernels = compiled.kernels
        result = self._meter.measured(key) or self._meter.measure(compiled, key)
        if result.ok:
            self._learn(compiled, kernels, result)
        return _measured(result, dense)

    def _learn(self, compiled: Compiled, kernels: Sequence[KernelInfo], result: LatencyResult) -> None:
        if result.kernels:
            values = {k.key: result.kernels[k.name] / k.count for k in kernels if k.name in result.kernels}
        else:
            timed = self._meter.time_kernels(kernels, self._meter.export(compiled, "candidate"))
            values = {key: timing.value for key, timing in timed.items()}
        for kernel in kernels:
            if kernel.key in values:
                self._rows[kernel.key] = KernelRow.of(kernel, values[kernel.key])
        calls: dict[str, int] = {}
        for kernel in kernels:
            calls[kernel.key] = calls.get(kernel.key, 0) + kernel.count
        self._networks.append((calls, result.value))
        self._fit()

    def _fit(self) -> None:
        self.model.fit([self._rows[key] for key in sorted(self._rows)])
        sums, measured = [], []
        for calls, value in self._networks:
            if all(key in self._rows for key in calls):
                sums.append(sum(self._rows[key].value * count for key, count in calls.items()))
                measured.append(value)
        self.model.calibrate(sums, measured)

    def state_dict(self) -> dict[str, Any]:
        """Kernels, networks and points so far, as plain values."""
        rows = {key: [list(row.vector), row.bound, row.value] for key, row in self._rows.items()}
        return {
            "rows": rows,
            "networks": [[c, v] for c, v in self._networks],
            "points": [list(p) for p in self._points],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s values and fit the model to them."""
        self._rows = {
            key: KernelRow(tuple(vector), bound, value)
            for key, (vector, bound, value) in state["rows"].items()
        }
        self._networks = [(dict(calls), value) for calls, value in state["networks"]]
        self._points = [(accuracy, ratio) for accuracy, ratio in state["points"]]
        if self._rows:
            self._fit()
