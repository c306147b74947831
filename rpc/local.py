"""The machine itself as a device: a TVM RPC server in a process of its own, timed with a clock."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm.libinfo import find_libtvm_runtime

from tvm_compress.errors import SettingError
from tvm_compress.rpc import serve_local
from tvm_compress.rpc.clock import ClockSession, Timing, sample_in_rounds
from tvm_compress.rpc.device import Candidate, Device, LatencyResult, MeasurementSettings, Session
from tvm_compress.rpc.machine import own_machine
from tvm_compress.rpc.program import Callee, Program
from tvm_compress.rpc.worker import Worker

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


class LocalSession(ClockSession):
    """Times each candidate in a worker of its own, so that none can spoil another."""

    def __init__(self, settings: MeasurementSettings, start: Callable[[], Worker] | None = None) -> None:
        super().__init__(settings, start or (lambda: _start_worker(settings.threads)))

    def _time_many(self, candidates: Mapping[str, Candidate]) -> dict[str, LatencyResult]:
        """See `Session.time_many`; raises SettingError for more than MOST_CANDIDATES."""
        if len(candidates) > MOST_CANDIDATES:
            raise SettingError(
                f"At most {MOST_CANDIDATES} libraries can be measured interleaved, not {len(candidates)}.",
                "Measure them in groups, each with the reference.",
            )
        # Side by side: starting takes a worker longer than a small network takes to be timed.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            starts = {name: pool.submit(self._start) for name in candidates}

        def prepare(name: str) -> Callee:
            library, inputs = candidates[name]
            program = Program(starts[name].result(), Path(library), self.settings.timeout_s)
            program.set_inputs(inputs)
            return program

        try:
            timings = {name: Timing(partial(prepare, name), self.settings) for name in candidates}
            return sample_in_rounds(timings, self.settings)
        finally:
            for start in starts.values():
                if start.exception() is None:
                    start.result().close()


def worker_command(threads: int) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a worker on this machine, as `WorkerProcess` takes them."""
    runtime = Path(find_libtvm_runtime())
    # What the virtual machine's optional functions need, where this build of TVM has it.
    libraries = [runtime, *runtime.parent.glob("libtvm_runtime_extra.*")]
    script = [sys.executable, "-P", serve_local.__file__, *map(str, libraries)]
    return script, os.environ | {"TVM_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}


def _start_worker(threads: int) -> Worker:
    script, environment = worker_command(threads)
    return Worker(lambda _: script, environment, machine=own_machine())


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
