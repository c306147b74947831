"""The machine itself as a device: a TVM RPC server in a process of its own, timed with a clock."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm.libinfo import find_libtvm_runtime

from tvm_compress.errors import SettingError
from tvm_compress.rpc import serve_local
from tvm_compress.rpc.device import (
    ArgumentSpecs,
    Candidate,
    Device,
    DeviceFailedError,
    LatencyResult,
    MeasurementSettings,
    Session,
)
from tvm_compress.rpc.program import Callee, Kernel, Program
from tvm_compress.rpc.worker import Worker
from tvm_compress.rpc.worker_session import WorkerSession

#: TVM has room for 32 sessions in a process, and each candidate has one while it is measured.
MOST_CANDIDATES = 24


class LocalDevice(Device):
    """The machine that this runs on.

    TVM's pool in the worker has `settings.threads` threads, which TVM itself pins to cores.
    """

    name = "local"
    unit = "seconds"

    def open(self, settings: MeasurementSettings | None = None) -> Session:
        """See `Device.open`."""
        return LocalSession(self._settings(settings))

    def describe(self) -> dict[str, Any]:
        """Name this machine, its processor, its load and the versions of TVM."""
        return {
            "device": self.name,
            "unit": self.unit,
            "machine": platform.node(),
            "architecture": platform.machine(),
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "threads": self.threads,
            "governor": _governor(),
            "load_average": os.getloadavg()[0],
            "system": platform.platform(),
            "tvm": tvm.__version__,
            "tvm_ffi": tvm_ffi.__version__,
        }


class LocalSession(WorkerSession):
    """Times each candidate in a worker of its own, so that none can spoil another."""

    def __init__(self, settings: MeasurementSettings) -> None:
        super().__init__(settings, lambda: _start_worker(settings.threads))

    def time_many(self, candidates: Mapping[str, Candidate]) -> dict[str, LatencyResult]:
        """See `Session.time_many`; raises SettingError for more than MOST_CANDIDATES."""
        if len(candidates) > MOST_CANDIDATES:
            raise SettingError(
                f"At most {MOST_CANDIDATES} libraries can be measured interleaved, not {len(candidates)}.",
                "Measure them in groups, each with the reference.",
            )
        with contextlib.ExitStack() as workers:

            def prepare(library: Path, inputs: Any) -> Callee:
                worker = self._start()
                workers.callback(worker.close)
                program = Program(worker, Path(library), self.settings.timeout_s)
                program.set_inputs(inputs)
                return program

            timings = {
                name: _Timing(lambda c=candidate: prepare(*c), self.settings)  # type: ignore[misc]
                for name, candidate in candidates.items()
            }
            return _sample_in_rounds(timings, self.settings)

    def time_kernels(self, library: Path, kernels: Mapping[str, ArgumentSpecs]) -> dict[str, LatencyResult]:
        """See `Session.time_kernels`."""
        limit = self.settings.timeout_s
        loaded: dict[str, Any] = {}

        def prepare(name: str) -> Callee:
            worker = self._ready_worker()
            if loaded.get("worker") is not worker:
                module, file = worker.load(Path(library), limit, "tvm_compress.load_kernels")
                loaded.update(worker=worker, module=module, file=file)
            return Kernel(worker, loaded["module"], loaded["file"], name, kernels[name], limit)

        # One kernel after the other: after a crash only the next one has to be loaded again.
        results: dict[str, LatencyResult] = {}
        for name in kernels:
            timing = _Timing(lambda n=name: prepare(n), self.settings)  # type: ignore[misc]
            results |= _sample_in_rounds({name: timing}, self.settings)
            if not results[name].ok:
                loaded.clear()
                self.close()
        return results


class _Timing:
    """The samples of one candidate, which is loaded when the first is taken."""

    def __init__(self, prepare: Callable[[], Callee], settings: MeasurementSettings) -> None:
        self._prepare = prepare
        self._settings = settings
        self._callee: Callee | None = None
        self._number = 0
        self.samples: list[float] = []

    def take_sample(self) -> None:
        settings = self._settings
        if self._callee is None:
            self._callee = self._prepare()
            for _ in range(settings.warmup):
                self._callee.invoke()
            seconds = self._callee.evaluate(1)
            # At least a nanosecond, for clocks that did not move.
            wanted = settings.min_repeat_ms / 1000 / max(seconds, 1e-9)
            self._number = max(settings.number, int(wanted) + 1 if settings.min_repeat_ms else 1)
        self.samples.append(self._callee.evaluate(self._number))
        time.sleep(settings.cooldown_ms / 1000)


def _sample_in_rounds(
    timings: Mapping[str, _Timing], settings: MeasurementSettings
) -> dict[str, LatencyResult]:
    """Take one sample of each per round; what fails is left out of the further rounds."""
    failed: dict[str, LatencyResult] = {}
    for _ in range(settings.repeat):
        for name, timing in timings.items():
            if name in failed:
                continue
            try:
                timing.take_sample()
            except DeviceFailedError as error:
                failed[name] = LatencyResult.failed(error.kind, str(error), "seconds", settings)
    return {
        name: failed.get(name) or LatencyResult.from_samples(timing.samples, "seconds", settings)
        for name, timing in timings.items()
    }


def _start_worker(threads: int) -> Worker:
    runtime = Path(find_libtvm_runtime())
    # What the virtual machine's optional functions need, where this build of TVM has it.
    libraries = [runtime, *runtime.parent.glob("libtvm_runtime_extra.*")]
    script = [sys.executable, "-P", serve_local.__file__, *map(str, libraries)]
    environment = os.environ | {"TVM_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    return Worker(lambda _: script, environment)


def processor_name() -> str:
    """Model name of this machine's processor, as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _governor() -> str | None:
    """Frequency governor of the first core, where the system tells."""
    with contextlib.suppress(OSError):
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    return None
