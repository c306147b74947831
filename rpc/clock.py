"""Timing with the clock of the machine that a library runs on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tvm_compress.rpc.device import (
    ArgumentSpecs,
    DeviceFailedError,
    LatencyResult,
    MeasurementSettings,
)
from tvm_compress.rpc.program import Callee, Kernel
from tvm_compress.rpc.worker import WITHOUT_NETWORK, Worker
from tvm_compress.rpc.worker_session import WorkerSession

KERNEL_LOADER = "tvm_compress.load_kernels"


class ClockSession(WorkerSession):
    """A session that times kernels with a clock, one after the other."""

    def time_kernels(self, library: Path, kernels: Mapping[str, ArgumentSpecs]) -> dict[str, LatencyResult]:
        """See `Session.time_kernels`."""
        limit = self.settings.timeout_s
        loaded: dict[str, Any] = {}

        def prepare(name: str) -> Callee:
            worker = self._ready_worker()
            if loaded.get("worker") is not worker:
                module, file = worker.load(Path(library), limit, self._kernel_loader(worker))
                loaded.update(worker=worker, module=module, file=file)
            return Kernel(worker, loaded["module"], loaded["file"], name, kernels[name], limit)

        # One kernel after the other: after a crash only the next one has to be loaded again.
        results: dict[str, LatencyResult] = {}
        for name in kernels:
            timing = Timing(lambda n=name: prepare(n), self.settings)  # type: ignore[misc]
            results |= sample_in_rounds({name: timing}, self.settings)
            if not results[name].ok:
                loaded.clear()
                self.close()
        return results

    def _kernel_loader(self, worker: Worker) -> str:
        """Name of the worker's function that loads a library for its kernels.

        Only our own has one; the C worker and TVM's servers get the library without its network.
        """

        def known() -> bool:
            try:
                worker.remote.get_function(KERNEL_LOADER)
            except AttributeError:
                return False
            return True

        found = worker.call("Asking for functions", self.settings.timeout_s, known)
        return KERNEL_LOADER if found else WITHOUT_NETWORK


class Timing:
    """The samples of one candidate, which is loaded when the first is taken."""

    def __init__(self, prepare: Callable[[], Callee], settings: MeasurementSettings) -> None:
        self._prepare = prepare
        self._settings = settings
        self._callee: Callee | None = None
        self._number = 0
        self.samples: list[float] = []

    def take_sample(self) -> None:
        """Take one; the first is preceded by loading, warming up and finding the number of calls."""
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


def sample_in_rounds(
    timings: Mapping[str, Timing], settings: MeasurementSettings
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
