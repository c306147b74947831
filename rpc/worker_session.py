"""A session whose libraries run in worker processes, replaced when they die."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tvm_compress.rpc.device import DeviceFailedError, MeasurementSettings, Session
from tvm_compress.rpc.health import read_health
from tvm_compress.rpc.program import Program
from tvm_compress.rpc.worker import Worker


class WorkerSession(Session):
    """Runs libraries on a worker that stays until it fails; how to time them is the subclass's.

    Parameters
    ----------
    settings
        Of all measurements in this session.
    start
        Starts a worker; raises DeviceError where it cannot.
    """

    def __init__(self, settings: MeasurementSettings, start: Callable[[], Worker]) -> None:
        super().__init__(settings)
        self._start = start
        # Started now, so that a device that cannot work says so when it is opened.
        self._worker: Worker | None = start()

    def run_many(self, library: Path, batches: Sequence[Sequence[np.ndarray]]) -> list[list[np.ndarray]]:
        """See `Session.run_many`."""
        worker = self._ready_worker()
        try:
            program = Program(worker, Path(library), self.settings.timeout_s)
            return [_run(program, inputs) for inputs in batches]
        except DeviceFailedError:
            worker.close()
            raise

    def health(self) -> dict[str, Any]:
        """See `Session.health`; the worker reads it, where it can."""
        try:
            return read_health(self._ready_worker(), self.settings.timeout_s)
        except (DeviceFailedError, ValueError):
            return {}

    def _ready_worker(self) -> Worker:
        if self._worker is None or not self._worker.alive:
            self.close()
            self._worker = self._start()
        return self._worker

    def close(self) -> None:
        """See `Session.close`."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def _run(program: Program, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    program.set_inputs(inputs)
    program.invoke()
    return program.outputs()
