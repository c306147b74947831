"""An emulated Cortex-A72 as a device: TVM RPC to a worker under QEMU, measured in estimated cycles."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from tvm_compress.errors import DeviceError, SettingError
from tvm_compress.rpc.cost_a72 import BlockModel, estimate, read_counts
from tvm_compress.rpc.device import (
    ArgumentSpecs,
    Candidate,
    Device,
    DeviceFailedError,
    LatencyResult,
    MeasurementSettings,
    Session,
)
from tvm_compress.rpc.elf import Code, read_code
from tvm_compress.rpc.emulation_kit import SYSROOT, EmulationKit, prepare
from tvm_compress.rpc.program import Callee, Kernel, Program
from tvm_compress.rpc.worker import Worker
from tvm_compress.rpc.worker_session import WorkerSession

Command = Callable[[Path], Sequence[str]]

_COUNTS = "counts"


class EmulatedA72(Device):
    """One core of a Cortex-A72, emulated: it runs aarch64 libraries and refuses what the real core lacks.

    Its unit is "estimated_cycles" (see `cost_a72`), never seconds: how long emulation takes says nothing.

    Raises
    ------
    SettingError
        More than one thread: threads that wait for each other would be counted while they wait.
    """

    name = "emulated-a72"
    unit = "estimated_cycles"
    target_triple = "aarch64-linux-gnu"

    def __init__(self, threads: int = 1) -> None:
        _check_threads(threads)
        super().__init__(threads)

    def open(self, settings: MeasurementSettings | None = None) -> Session:
        """See `Device.open`; the first use fetches and compiles its parts (see `emulation_kit.prepare`)."""
        return EmulatedSession(self._settings(settings), prepare())

    def describe(self) -> dict[str, Any]:
        """Name the emulated core and the tools that its figures come from."""
        kit = prepare()
        return {
            "device": self.name,
            "unit": self.unit,
            "processor": "Cortex-A72 (emulated)",
            "architecture": "aarch64",
            "threads": self.threads,
            "qemu": kit.qemu_version,
            "llvm_mca": _block_model(kit).version,
            "tvm": tvm.__version__,
            "tvm_ffi": tvm_ffi.__version__,
        }


class EmulatedSession(WorkerSession):
    """Counts what libraries execute; `warmup`, `number`, `repeat` and the pauses have no meaning here."""

    def __init__(self, settings: MeasurementSettings, kit: EmulationKit) -> None:
        _check_threads(settings.threads)
        super().__init__(settings, lambda: _start_worker(kit, counting=False))
        self._kit = kit
        self._model = _block_model(kit)

    def time_many(self, candidates: Mapping[str, Candidate]) -> dict[str, LatencyResult]:
        """See `Session.time_many`; counts do not drift, so each is measured once."""
        return {
            name: self._as_value(lambda c=candidate: self._count_main(Path(c[0]), c[1]))  # type: ignore[misc]
            for name, candidate in candidates.items()
        }

    def _count_main(self, library: Path, inputs: Sequence[np.ndarray]) -> LatencyResult:
        # A fresh process each, so that no figure can depend on what ran before it.
        with _counting_worker(self._kit) as worker:
            program = Program(worker, library, self.settings.timeout_s)
            program.set_inputs(inputs)
            return self._count(worker, program, read_code(library), 0)

    def time_kernels(self, library: Path, kernels: Mapping[str, ArgumentSpecs]) -> dict[str, LatencyResult]:
        """See `Session.time_kernels`."""
        limit, path = self.settings.timeout_s, Path(library)
        results: dict[str, LatencyResult] = {}
        with contextlib.ExitStack() as stack:
            loaded: list[tuple[Worker, tvm.runtime.Module, str, Code]] = []

            def count(name: str) -> LatencyResult:
                if not loaded:
                    worker = stack.enter_context(_counting_worker(self._kit))
                    loaded.append((worker, *worker.load(path, limit), read_code(path)))
                worker, module, file, code = loaded[0]
                kernel = Kernel(worker, module, file, name, kernels[name], limit)
                return self._count(worker, kernel, code, len(results))

            for name in kernels:
                results[name] = self._as_value(lambda n=name: count(n))  # type: ignore[misc]
                if not results[name].ok:
                    loaded.clear()
                    stack.close()
        return results

    def _count(self, worker: Worker, callee: Callee, code: Code, index: int) -> LatencyResult:
        limit = self.settings.timeout_s
        base = worker.call("Finding the code", limit, _remote(worker, "base_address"), callee.file)
        worker.call("Counting", limit, _remote(worker, "count_begin"))
        callee.invoke()
        worker.call("Counting", limit, _remote(worker, "count_end"), index)
        counts = read_counts(worker.directory / f"{_COUNTS}.{index}", code, int(base))
        cost = estimate(code, counts, self._model)
        return LatencyResult.from_samples(
            [cost.cycles],
            "estimated_cycles",
            self.settings,
            cost.kernels,
            {"instructions": cost.instructions, "covered_instructions": cost.covered},
        )

    def _as_value(self, measure: Callable[[], LatencyResult]) -> LatencyResult:
        try:
            return measure()
        except DeviceFailedError as error:
            return LatencyResult.failed(error.kind, str(error), "estimated_cycles", self.settings)
        except DeviceError as error:
            return LatencyResult.failed("unsupported", str(error), "estimated_cycles", self.settings)


@contextlib.contextmanager
def _counting_worker(kit: EmulationKit) -> Iterator[Worker]:
    worker = _start_worker(kit, counting=True)
    try:
        yield worker
    finally:
        worker.close()


def _remote(worker: Worker, name: str) -> Any:
    return worker.remote.get_function(f"tvm_compress.{name}")


def _block_model(kit: EmulationKit) -> BlockModel:
    return BlockModel(kit.mc, kit.mca, kit.cache)


def _check_threads(threads: int) -> None:
    if threads != 1:
        raise SettingError(f"The emulated Cortex-A72 has 1 thread, not {threads}.")


def worker_command(kit: EmulationKit, counting: bool) -> tuple[Command, dict[str, str]]:
    """Command and environment of a worker under emulation, as `WorkerProcess` takes them."""

    def command(directory: Path) -> list[str]:
        plugin = ["-plugin", f"{kit.plugin},out={directory / _COUNTS}"] if counting else []
        return [kit.qemu, "-cpu", "cortex-a72", "-L", str(SYSROOT), *plugin, str(kit.worker)]

    # Nothing of our own environment: what is meant for this machine's programs would reach the emulated one.
    environment = {"PATH": os.defpath, "LD_LIBRARY_PATH": str(kit.runtime), "TVM_NUM_THREADS": "1"}
    return command, environment


def _start_worker(kit: EmulationKit, counting: bool) -> Worker:
    return Worker(*worker_command(kit, counting), machine="aarch64")
