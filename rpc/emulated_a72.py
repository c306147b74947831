"""An emulated Cortex-A72 as a device: TVM RPC to a worker under QEMU, measured in estimated cycles."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tvm
import tvm_ffi

from tvm_compress.errors import DeviceError, SettingError
from tvm_compress.rpc.block_model import BlockModel
from tvm_compress.rpc.cost_a72 import (
    L1_MISS_CYCLES,
    L2_BYTES,
    L2_MISS_CYCLES,
    LINE_BYTES,
    Cost,
    Counts,
    estimate,
    hot_blocks,
    read_counts,
)
from tvm_compress.rpc.device import (
    ArgumentSpecs,
    Candidate,
    Device,
    DeviceFailedError,
    LastCache,
    LatencyResult,
    MeasurementSettings,
    Session,
)
from tvm_compress.rpc.elf import Code, read_code
from tvm_compress.rpc.emulation_kit import SYSROOT, EmulationKit, prepare
from tvm_compress.rpc.known_results import KnownResults
from tvm_compress.rpc.program import Callee, Kernel, Program
from tvm_compress.rpc.worker import Worker
from tvm_compress.rpc.worker_session import WorkerSession

Command = Callable[[Path], Sequence[str]]
Result = TypeVar("Result")

# By the emulator's names.
_PROCESSOR = "cortex-a72"
_COUNTS = "counts"


class EmulatedA72(Device):
    """One core of a Cortex-A72, emulated: it runs aarch64 libraries and refuses what the real core lacks.

    Its unit is "estimated_cycles" (see `cost_a72`), never seconds: how long emulation takes says nothing.

    Parameters
    ----------
    threads
        Only 1.
    remember
        Whether figures are kept on disk, and taken from there where the same library was counted before.

    Raises
    ------
    SettingError
        More than one thread: threads that wait for each other would be counted while they wait.
    """

    name = "emulated-a72"
    unit = "estimated_cycles"
    target_triple = "aarch64-linux-gnu"
    definition = f"max(compute, memory of {L1_MISS_CYCLES} + {L2_MISS_CYCLES} cycles a line)"
    last_cache = LastCache(L2_BYTES, (L1_MISS_CYCLES + L2_MISS_CYCLES) / LINE_BYTES)

    def __init__(self, threads: int = 1, remember: bool = True) -> None:
        _check_threads(threads)
        super().__init__(threads)
        self._remember = remember

    def open(self, settings: MeasurementSettings | None = None) -> Session:
        """See `Device.open`; the first use fetches and compiles its parts (see `emulation_kit.prepare`)."""
        kit = prepare()
        return EmulatedSession(self._settings(settings), kit, _known_results(kit) if self._remember else None)

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
            "caches": "L1D 32 KB 2-way, L2 1 MB 16-way, 64-byte lines, LRU, warm",
            "definition": self.definition,
            "tvm": tvm.__version__,
            "tvm_ffi": tvm_ffi.__version__,
        }


@dataclass(frozen=True)
class _Counted:
    """What a library executed, and the key of its figure."""

    key: str | None
    code: Code
    counts: Counts


class EmulatedSession(WorkerSession):
    """Counts what libraries execute; `warmup`, `number`, `repeat` and the pauses have no meaning here."""

    def __init__(
        self, settings: MeasurementSettings, kit: EmulationKit, known: KnownResults | None = None
    ) -> None:
        _check_threads(settings.threads)
        super().__init__(settings, lambda: _start_worker(kit, counting=False))
        self._kit = kit
        self._model = _block_model(kit)
        self._known = known
        # Counts kernels: no figure of one depends on what ran before it (see counting_plugin.c).
        self._counter: Worker | None = None
        self._counts = 0

    def close(self) -> None:
        """See `Session.close`."""
        super().close()
        self._close_counter()

    def _close_counter(self) -> None:
        if self._counter is not None:
            self._counter.close()
            self._counter = None

    def time_many(self, candidates: Mapping[str, Candidate]) -> dict[str, LatencyResult]:
        """See `Session.time_many`; counts do not drift, so each is measured once."""
        return {
            name: self._as_value(lambda c=candidate: self._count_main(Path(c[0]), c[1]))  # type: ignore[misc]
            for name, candidate in candidates.items()
        }

    def _count_main(self, library: Path, inputs: Sequence[np.ndarray]) -> LatencyResult:
        key, found = self._recall(library, "main", inputs)
        if found is not None:
            return found
        # A fresh process each, so that no figure can depend on what ran before it.
        with contextlib.closing(_start_worker(self._kit, counting=True)) as worker:
            program = Program(worker, library, self.settings.timeout_s)
            program.set_inputs(inputs)
            code = read_code(library)
            return self._judge(_Counted(key, code, self._count(worker, program, code)))

    def time_kernels(
        self, library: Path, kernels: Mapping[str, ArgumentSpecs], passes: int = 1
    ) -> dict[str, LatencyResult]:
        """See `Session.time_kernels`; counts do not drift, so one pass is enough."""
        del passes
        limit, path = self.settings.timeout_s, Path(library)
        results: dict[str, LatencyResult] = {}
        counted: dict[str, _Counted] = {}
        loaded: list[tuple[Worker, tvm.runtime.Module, str, Code]] = []

        def count(name: str) -> LatencyResult | None:
            specs = [(list(shape), dtype) for shape, dtype in kernels[name]]
            key, found = self._recall(path, f"kernel {name} {specs}")
            if found is not None:
                return found
            if not loaded:
                if self._counter is None or not self._counter.alive:
                    self._close_counter()
                    self._counter = _start_worker(self._kit, counting=True)
                loaded.append((self._counter, *self._counter.load(path, limit), read_code(path)))
            worker, module, file, code = loaded[0]
            kernel = Kernel(worker, module, file, name, kernels[name], limit)
            counted[name] = _Counted(key, code, self._count(worker, kernel, code))
            return None

        for name in kernels:
            result = self._as_value(lambda n=name: count(n))  # type: ignore[misc]
            if result is None:
                continue
            results[name] = result
            if not result.ok:
                loaded.clear()
                self._close_counter()
        # For all at once, as starting llvm-mca takes as long as its work; what it refuses, each says below.
        with contextlib.suppress(DeviceError):
            self._model.cycles({w for one in counted.values() for w in hot_blocks(one.code, one.counts)})
        for name, one in counted.items():
            results[name] = self._as_value(lambda c=one: self._judge(c))  # type: ignore[misc]
        return {name: results[name] for name in kernels}

    def _recall(
        self, library: Path, what: str, inputs: Sequence[np.ndarray] = ()
    ) -> tuple[str | None, LatencyResult | None]:
        """Give the key of a question, and the figure that was found before, if there is one."""
        if self._known is None:
            return None, None
        key = self._known.key(library, what, inputs)
        return key, self._known.get(key, self.settings)

    def _count(self, worker: Worker, callee: Callee, code: Code) -> Counts:
        limit, index = self.settings.timeout_s, self._counts
        self._counts += 1
        base = worker.call("Finding the code", limit, _remote(worker, "base_address"), callee.file)
        worker.call("Counting", limit, _remote(worker, "count_begin"))
        # An inference that does not count leaves the caches as the one before leaves them on a board.
        callee.invoke()
        worker.call("Counting", limit, _remote(worker, "count_warm"))
        callee.invoke()
        worker.call("Counting", limit, _remote(worker, "count_end"), index)
        return read_counts(worker.directory / f"{_COUNTS}.{index}", code, int(base))

    def _judge(self, counted: _Counted) -> LatencyResult:
        """Make a result of counts, and keep it."""
        result = self._result(estimate(counted.code, counted.counts, self._model))
        if self._known is not None:
            self._known.put(counted.key, result)
        return result

    def _result(self, cost: Cost) -> LatencyResult:
        result = LatencyResult.from_samples(
            [cost.cycles],
            "estimated_cycles",
            self.settings,
            {name: float(kernel.cycles) for name, kernel in cost.kernels.items()},
            {
                "instructions": cost.total("instructions"),
                "covered_instructions": cost.covered,
                "l1_misses": cost.total("l1_misses"),
                "l2_misses": cost.total("l2_misses"),
            },
        )
        breakdown = {name: kernel.to_dict() for name, kernel in cost.kernels.items()}
        return replace(result, breakdown=breakdown)

    def _as_value(self, measure: Callable[[], Result]) -> Result | LatencyResult:
        """Give what a measurement gives, or its failure."""
        try:
            return measure()
        except DeviceFailedError as error:
            return LatencyResult.failed(error.kind, str(error), "estimated_cycles", self.settings)
        except DeviceError as error:
            return LatencyResult.failed("unsupported", str(error), "estimated_cycles", self.settings)


def _remote(worker: Worker, name: str) -> Any:
    return worker.remote.get_function(f"tvm_compress.{name}")


def _block_model(kit: EmulationKit) -> BlockModel:
    return BlockModel(kit.mc, kit.mca, kit.cache)


def _known_results(kit: EmulationKit) -> KnownResults:
    tools = (
        kit.qemu_version,
        kit.worker.parent.name,
        kit.runtime.parent.name,
        str(_block_model(kit).path.name),
    )
    return KnownResults(kit.cache / "results", tools)


def _check_threads(threads: int) -> None:
    if threads != 1:
        raise SettingError(f"The emulated Cortex-A72 has 1 thread, not {threads}.")


def worker_command(kit: EmulationKit, counting: bool) -> tuple[Command, dict[str, str]]:
    """Command and environment of a worker under emulation, as `WorkerProcess` takes them."""

    def command(directory: Path) -> list[str]:
        plugin = ["-plugin", f"{kit.plugin},out={directory / _COUNTS}"] if counting else []
        return [kit.qemu, "-cpu", _PROCESSOR, "-L", str(SYSROOT), *plugin, str(kit.worker)]

    # Nothing of our own environment: what is meant for this machine's programs would reach the emulated one.
    environment = {"PATH": os.defpath, "LD_LIBRARY_PATH": str(kit.runtime), "TVM_NUM_THREADS": "1"}
    return command, environment


class _EmulatedWorker(Worker):
    """A worker whose directory is at hand: bytes through its socket are copied by the emulated processor."""

    def _send(self, content: bytearray, name: str) -> None:
        try:
            (self.directory / name).write_bytes(content)
        except OSError as error:
            raise DeviceFailedError("connection", f"{name} cannot be written: {error}.") from None


def _start_worker(kit: EmulationKit, counting: bool) -> Worker:
    return _EmulatedWorker(*worker_command(kit, counting), machine="aarch64")
