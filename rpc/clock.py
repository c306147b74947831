"""Timing with the clock of the machine that a library runs on."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import tvm

from tvm_compress.rpc.device import (
    ArgumentSpecs,
    Candidate,
    DeviceFailedError,
    LatencyResult,
    MeasurementSettings,
    StoppedBy,
    median_and_spread,
)
from tvm_compress.rpc.health import find_problems, warn_once
from tvm_compress.rpc.program import Callee, Kernel
from tvm_compress.rpc.worker import WITHOUT_NETWORK, Worker
from tvm_compress.rpc.worker_session import WorkerSession

KERNEL_LOADER = "tvm_compress.load_kernels"


class ClockSession(WorkerSession):
    """A session that times with a clock: networks in turns, kernels one after the other."""

    def __init__(
        self, settings: MeasurementSettings, start: Callable[[], Worker], device: str = "This machine"
    ) -> None:
        super().__init__(settings, start)
        self._called = device
        # Causes of which the user was told.
        self._warned: set[str] = set()

    def time_many(self, candidates: Mapping[str, Candidate]) -> dict[str, LatencyResult]:
        """See `Session.time_many`; the state of the device is read before and after."""
        # A worker that has to be started first could make the user wait twice for a board.
        worker = self._worker
        before = self.health() if worker is not None and worker.alive else {}
        results = self._time_many(candidates)
        if self._worker is None or not self._worker.alive:
            return results
        # Another worker may be on another board.
        before = before if self._worker is worker else {}
        after = self.health()
        if not after:
            return results
        problems = find_problems(before, after)
        warn_once(problems, self._warned, self._called)
        health = {"before": before, "after": after, "warnings": list(problems.values())}
        return {name: replace(result, health=health) for name, result in results.items()}

    @abstractmethod
    def _time_many(self, candidates: Mapping[str, Candidate]) -> dict[str, LatencyResult]:
        """Do what `time_many` promises."""

    def time_kernels(
        self, library: Path, kernels: Mapping[str, ArgumentSpecs], passes: int = 1
    ) -> dict[str, LatencyResult]:
        """See `Session.time_kernels`."""
        loaded = LoadedKernels(Path(library), kernels)
        results: dict[str, LatencyResult] = {}
        for _ in range(passes):
            # One kernel after the other: after a crash only the next one has to be loaded again.
            for name in kernels:
                best = results.get(name)
                if best is not None and not best.ok:
                    continue
                result = self._time_kernel(loaded, name)
                if best is None or not result.ok or result.value < best.value:
                    results[name] = result
        return results

    def _time_kernel(self, loaded: LoadedKernels, name: str) -> LatencyResult:
        """Take the samples of one kernel, in one pass."""

        def prepare() -> Callee:
            worker = self._ready_worker()
            if loaded.worker is not worker:
                loaded.load(worker, self.settings.timeout_s, self._kernel_loader(worker))
            return loaded.kernel(name, self.settings.timeout_s)

        result = sample_in_rounds({name: Timing(prepare, self.settings)}, self.settings)[name]
        if not result.ok:
            loaded.clear()
            self.close()
        return result

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


class LoadedKernels:
    """A library of kernels on a worker, loaded once for all of them and all passes over them.

    Parameters
    ----------
    library, specs
        As `Session.time_kernels` has them.
    """

    def __init__(self, library: Path, specs: Mapping[str, ArgumentSpecs]) -> None:
        self._library = library
        self._specs = specs
        self._module: tvm.runtime.Module | None = None
        self._file = ""
        self.worker: Worker | None = None

    def load(self, worker: Worker, limit: float, loader: str) -> None:
        """Load the library on a worker by its function `loader`, in place of wherever it was loaded."""
        self.clear()
        self._module, self._file = worker.load(self._library, limit, loader)
        self.worker = worker

    def kernel(self, name: str, limit: float) -> Kernel:
        """Give a function with new arguments: all at once could be more than a board holds."""
        assert self.worker is not None
        assert self._module is not None
        return Kernel(self.worker, self._module, self._file, name, self._specs[name], limit)

    def clear(self) -> None:
        """Forget the worker, which may have died, and all that is on it."""
        self._module = self.worker = None


class Timing:
    """The samples of one candidate, which is loaded when the first is taken."""

    def __init__(self, prepare: Callable[[], Callee], settings: MeasurementSettings) -> None:
        self._prepare = prepare
        self._settings = settings
        self._callee: Callee | None = None
        self._number = 0
        self._flushed = 0
        self.samples: list[float] = []

    def take_sample(self) -> None:
        """Take one; the first is preceded by loading, warming up and finding the number of calls."""
        if self._callee is None:
            self._callee = self._prepare()
            self._begin(self._callee)
        self.samples.append(self._callee.evaluate(self._number))
        time.sleep(self._settings.cooldown_ms / 1000)

    def _begin(self, callee: Callee) -> None:
        settings = self._settings
        for _ in range(settings.warmup):
            callee.invoke()
        self._number = settings.number
        if settings.cache_flush:
            self._flushed = callee.flush_caches(settings.cache_flush)
        elif settings.min_repeat_ms:
            seconds = callee.evaluate(1)
            # At least a nanosecond, for clocks that did not move.
            wanted = settings.min_repeat_ms / 1000 / max(seconds, 1e-9)
            self._number = max(settings.number, int(wanted) + 1)

    @property
    def steady(self) -> bool:
        """Whether the spread of the samples is as small as the settings want it."""
        median, spread = median_and_spread(self.samples)
        return self._settings.max_spread is None or spread <= self._settings.max_spread * median

    def result(self, stopped_by: StoppedBy) -> LatencyResult:
        """Summary of the samples."""
        counters = {"calls_per_sample": float(self._number)}
        if self._flushed:
            counters["cache_flush_bytes"] = float(self._flushed)
        return LatencyResult.from_samples(
            self.samples, "seconds", self._settings, counters=counters, stopped_by=stopped_by
        )


def rounds(timings: Mapping[str, Timing], settings: MeasurementSettings) -> Iterator[int]:
    """Count the rounds to take: `repeat`, then until all are steady, at most `max_repeat`.

    All candidates get the same rounds, so that their ratios within each stay paired. Who fails may be taken
    out of `timings` meanwhile.
    """
    yield from range(settings.repeat)
    for number in range(settings.repeat, settings.max_repeat):
        if stop_reason(timings, settings) != "limit":
            return
        yield number


def stop_reason(timings: Mapping[str, Timing], settings: MeasurementSettings) -> StoppedBy:
    """Say why the rounds so far are all; "limit" where only `max_repeat` can end them."""
    if settings.max_spread is None:
        return "repeat"
    return "spread" if all(timing.steady for timing in timings.values()) else "limit"


def results_of(timings: Mapping[str, Timing], settings: MeasurementSettings) -> dict[str, LatencyResult]:
    """Summaries of candidates that went through all `rounds`."""
    stopped_by = stop_reason(timings, settings)
    return {name: timing.result(stopped_by) for name, timing in timings.items()}


def sample_in_rounds(
    timings: Mapping[str, Timing], settings: MeasurementSettings
) -> dict[str, LatencyResult]:
    """Take one sample of each per round; what fails is left out of the further rounds."""
    failed: dict[str, LatencyResult] = {}
    going = dict(timings)
    for _ in rounds(going, settings):
        for name, timing in list(going.items()):
            try:
                timing.take_sample()
            except DeviceFailedError as error:
                failed[name] = LatencyResult.failed(error.kind, str(error), "seconds", settings)
                del going[name]
    results = failed | results_of(going, settings)
    return {name: results[name] for name in timings}
