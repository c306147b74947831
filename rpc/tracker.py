"""Boards that are announced at a tracker of TVM, as one device: each session gets one that is free.

A failure may be the library's or the board's: what fails is tried once more on another board. Where that goes
well, the first board is blamed, and one that was blamed three times is set aside.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tvm
import tvm_ffi

from tvm_compress.rpc.address import Tracker
from tvm_compress.rpc.clock import ClockSession, LoadedKernels, Timing, results_of, rounds
from tvm_compress.rpc.device import (
    Candidate,
    Device,
    DeviceFailedError,
    LatencyResult,
    MeasurementSettings,
    Session,
)
from tvm_compress.rpc.program import Program
from tvm_compress.rpc.worker import Worker
from tvm_compress.rpc.worker_process import START_LIMIT

Result = TypeVar("Result")

#: Seconds that a session waits for a board to become free.
WAIT = 60.0
#: Seconds after which a board ends a session, so that a client that vanished cannot hold it for ever.
SESSION_LIMIT = 4 * 3600.0
#: Blames after which a board is set aside.
MOST_BLAMES = 3
#: What may be the board's fault.
_BOARD_ERRORS = ("crash", "timeout", "connection")
_HINT = (
    "Start a tracker by `python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port 9190` and, on each board, "
    "`tvm-compress device serve tracker://HOST:9190/KEY`."
)


class TrackerDevice(Device):
    """The boards of one key at a tracker."""

    unit = "seconds"

    def __init__(self, tracker: Tracker, threads: int = 1, wait: float = WAIT) -> None:
        super().__init__(threads)
        self.name = str(tracker)
        self.tracker = tracker
        self.wait = wait
        #: How often each board was to blame, by its address.
        self.blames: dict[str, int] = {}

    def open(self, settings: MeasurementSettings | None = None) -> Session:
        """See `Device.open`."""
        return TrackerSession(self._settings(settings), self)

    def describe(self) -> dict[str, Any]:
        """Name the tracker, the boards that were set aside, and the versions of TVM."""
        return {
            "device": self.name,
            "unit": self.unit,
            "processor": f"boards of the key {self.tracker.key}",
            "threads": self.threads,
            "set_aside": sorted(self.set_aside),
            "tvm": tvm.__version__,
            "tvm_ffi": tvm_ffi.__version__,
        }

    @property
    def set_aside(self) -> set[str]:
        """Boards that are not asked for any more."""
        return {board for board, count in self.blames.items() if count >= MOST_BLAMES}

    def blame(self, board: str) -> None:
        """Count a failure that was the board's."""
        self.blames[board] = self.blames.get(board, 0) + 1
        if self.blames[board] == MOST_BLAMES:
            warnings.warn(
                f"The board {board} of {self.name} failed {MOST_BLAMES} times and is set aside.", stacklevel=3
            )

    def start(self, threads: int, avoid: Sequence[str] = ()) -> Worker:
        """Get a board; DeviceFailedError of kind "connection" where none is to be had."""
        tracker = self.tracker
        command = [sys.executable, "-P", "-m", "tvm_compress.rpc.relay", tracker.host, str(tracker.port)]
        command += [tracker.key, str(self.wait), str(SESSION_LIMIT)]
        command += [",".join(sorted(self.set_aside)), ",".join(avoid)]
        try:
            worker = Worker(lambda _: command, os.environ, self.wait + START_LIMIT, relay=True)
        except DeviceFailedError as error:
            raise DeviceFailedError("connection", error.message, _HINT) from None
        found = worker.call("Asking for threads", START_LIMIT, lambda: _threads_of(worker))
        if found != threads:
            worker.close()
            raise DeviceFailedError(
                "connection",
                f"The board serves with {found} threads, not {threads}.",
                f"Start it by `device serve --threads {threads}`, or measure with {found}.",
            )
        return worker


def _threads_of(worker: Worker) -> int:
    return int(worker.remote.get_function("runtime.NumThreads")())


class TrackerSession(ClockSession):
    """Measures on one board, all candidates in one session of it, so that they share its clock."""

    def __init__(self, settings: MeasurementSettings, device: TrackerDevice) -> None:
        self._device = device
        #: Addresses that this session does not want at the moment.
        self._avoid: list[str] = []
        # The list and not the session, which could not be forgotten if it were a part of itself.
        avoid = self._avoid
        super().__init__(settings, lambda: device.start(settings.threads, avoid), device.name)

    @property
    def board(self) -> str:
        """Address of the board in use."""
        return str(self._ready_worker().about["address"])

    def run_many(self, library: Path, batches: Sequence[Sequence[np.ndarray]]) -> list[list[np.ndarray]]:
        """See `Session.run_many`."""
        run = super().run_many
        return self._twice(lambda: run(library, batches))

    def _twice(self, action: Callable[[], Result]) -> Result:
        """Do something, once more if it fails by what may be the board's fault, on another if one is free."""
        board = self.board
        result, failure = self._attempt(action)
        if failure is not None and failure.kind in _BOARD_ERRORS:
            self._avoid[:] = [board]
            again = None
            try:
                result, again = self._attempt(action)
            finally:
                self._avoid.clear()
            if again is None and self.board != board:
                self._device.blame(board)
            # Where it fails again, it is not the board's fault: the first failure tells more than its echo.
            failure = failure if again is not None else None
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def _attempt(self, action: Callable[[], Result]) -> tuple[Result | None, DeviceFailedError | None]:
        try:
            return action(), None
        except DeviceFailedError as error:
            self.close()
            # Without its traceback, which keeps the board's objects and with them the session alive.
            return None, DeviceFailedError(error.kind, error.message, error.hint)

    def _time_many(self, candidates: Mapping[str, Candidate]) -> dict[str, LatencyResult]:
        """See `Session.time_many`; after a failure the others are measured anew, together on one board."""
        results: dict[str, LatencyResult] = {}
        while missing := [name for name in candidates if name not in results]:
            culprit: str | None = None

            def sample(missing: list[str] = missing) -> dict[str, LatencyResult]:
                nonlocal culprit
                timings = {name: Timing(self._prepared(*candidates[name]), self.settings) for name in missing}
                for _ in rounds(timings, self.settings):
                    for name, timing in timings.items():
                        culprit = name
                        timing.take_sample()
                return results_of(timings, self.settings)

            try:
                results |= self._twice(sample)
            except DeviceFailedError as error:
                if culprit is None:
                    raise
                results[culprit] = LatencyResult.failed(error.kind, str(error), "seconds", self.settings)
        return {name: results[name] for name in candidates}

    def _prepared(self, library: Path, inputs: Sequence[np.ndarray]) -> Callable[[], Program]:
        def prepare() -> Program:
            program = Program(self._ready_worker(), Path(library), self.settings.timeout_s)
            program.set_inputs(inputs)
            return program

        return prepare

    def _time_kernel(self, loaded: LoadedKernels, name: str) -> LatencyResult:
        """Time one kernel; if it fails, once more on another board."""
        time_kernel = super()._time_kernel

        def time() -> LatencyResult:
            result = time_kernel(loaded, name)
            if result.error is not None:
                raise DeviceFailedError(*result.error)
            return result

        try:
            return self._twice(time)
        except DeviceFailedError as error:
            return LatencyResult.failed(error.kind, str(error), "seconds", self.settings)
