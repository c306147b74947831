"""What runs on a worker: the `main` of a Relax library, or one TIR function of any library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import tvm
from tvm import relax

from tvm_compress.rpc.device import ArgumentSpecs
from tvm_compress.rpc.worker import Worker, as_build_error

Result = TypeVar("Result")

#: Bytes that are walked to flush the caches of a worker that does not know their size.
UNKNOWN_CACHES = 16 << 20


class Callee(Protocol):
    """Something loaded on a worker, with its arguments."""

    #: Name of the library's file on the device.
    file: str

    def invoke(self) -> None:
        """Call it once."""

    def flush_caches(self, size: bool | int) -> int:
        """Have the caches flushed before every call that `evaluate` times; gives the bytes walked for it.

        Parameters
        ----------
        size
            As `MeasurementSettings.cache_flush`, not False.
        """

    def evaluate(self, number: int) -> float:
        """Mean seconds of `number` calls on the worker's clock, after one call that does not count."""


@dataclass(frozen=True)
class CacheFlush:
    """How a worker flushes its caches: bytes that are walked, and options of TVM's time evaluator."""

    size: int
    options: Mapping[str, Any]

    @classmethod
    def prepare(cls, worker: Worker, size: bool | int) -> CacheFlush:
        """Ask the worker's own function, or where it has none, let TVM copy one array over another.

        TVM's copy works on every server, but makes new arrays for each sample, which takes some 15 times as
        long, and does not know how large the caches are. To be called within `Worker.call`.
        """
        try:
            prepare = worker.remote.get_function("tvm_compress.prepare_flush")
        except AttributeError:
            known = UNKNOWN_CACHES if size is True else int(size)
            return cls(known, {"cache_flush_bytes": known})
        return cls(int(prepare(0 if size is True else size)), {"f_preproc": "tvm_compress.flush_caches"})


class _Evaluator:
    """Times calls of one function of a module on a worker."""

    def __init__(self, worker: Worker, module: tvm.runtime.Module, name: str) -> None:
        self._worker = worker
        self._module = module
        self._name = name
        self._flush: CacheFlush | None = None
        # By the number of calls: making one takes a round trip.
        self._evaluators: dict[int, Callable[..., Any]] = {}

    def flush_caches(self, size: bool | int) -> int:
        self._flush = CacheFlush.prepare(self._worker, size)
        self._evaluators.clear()
        return self._flush.size

    def mean(self, number: int, arguments: Sequence[Any]) -> float:
        if number not in self._evaluators:
            self._evaluators[number] = self._make(number)
        return float(self._evaluators[number](*arguments).mean)

    def _make(self, number: int) -> Callable[..., Any]:
        # The evaluator flushes before each repeat, not before each call of one.
        options = {"number": number} if self._flush is None else {"repeat": number, "number": 1}
        options |= self._flush.options if self._flush is not None else {}
        return self._module.time_evaluator(self._name, self._worker.remote.cpu(0), **options)


class Program:
    """The `main` of a library from `relax.build`, called through Relax's virtual machine.

    Parameters
    ----------
    worker
        Where it runs.
    library
        The shared library's path on this machine.
    limit
        Seconds that any one call may take.

    Raises
    ------
    DeviceFailedError
        Of kind "build" where the library cannot be used; from every method, else as `Worker.call`.
    """

    def __init__(self, worker: Worker, library: Path, limit: float) -> None:
        self._worker = worker
        self._name = library.name
        self._limit = limit
        module, self.file = worker.load(library, limit)
        with as_build_error("Is it a library from `relax.build`?"):
            self._machine = self._call("Starting", relax.VirtualMachine, module, worker.remote.cpu(0))
        self._evaluator = _Evaluator(worker, self._machine.module, "invoke_stateful")

    def _call(self, verb: str, function: Callable[..., Result], *args: Any) -> Result:
        return self._worker.call(f"{verb} {self._name}", self._limit, function, *args)

    def set_inputs(self, inputs: Sequence[np.ndarray]) -> None:
        """Send the arguments of `main`."""

        def send() -> None:
            self._machine.set_input("main", *[self._worker.tensor(array) for array in inputs])

        self._call("Giving inputs to", send)

    def invoke(self) -> None:
        """Call `main` once with the inputs that were set."""
        self._call("Running", self._machine.invoke_stateful, "main")

    def outputs(self) -> list[np.ndarray]:
        """Fetch what the last call gave, the fields of a tuple (or of tuples in it) in order."""
        return self._call("Reading the outputs of", self._fetch)

    def _fetch(self, *place: int) -> list[np.ndarray]:
        # A direct call would give a tuple as a reference that cannot be read over RPC, and TVM's own
        # `get_outputs` leaves a reference cycle that keeps the session open.
        fields = self._machine.module["get_output_arity"]("main", *place)
        if fields < 0:
            return [self._machine.module["get_output"]("main", *place).numpy()]
        return [value for field in range(fields) for value in self._fetch(*place, field)]

    def flush_caches(self, size: bool | int) -> int:
        """See `Callee.flush_caches`."""
        return self._call("Flushing the caches for", self._evaluator.flush_caches, size)

    def evaluate(self, number: int) -> float:
        """See `Callee.evaluate`."""
        return self._call("Timing", self._evaluator.mean, number, ["main"])


class Kernel:
    """One TIR function of a loaded library, called in destination-passing style with small values.

    Parameters
    ----------
    worker, limit
        As of `Program`.
    module, file
        The library, loaded by `Worker.load`.
    name
        The function's name.
    specs
        Shape and dtype of each argument.
    """

    def __init__(
        self,
        worker: Worker,
        module: tvm.runtime.Module,
        file: str,
        name: str,
        specs: ArgumentSpecs,
        limit: float,
    ) -> None:
        self._worker = worker
        self._name = name
        self._limit = limit
        self.file = file
        with as_build_error("Does the library export it?"):
            self._function = self._call("Finding", module.get_function, name)
        self._arguments = self._call("Giving arguments to", self._send, specs)
        self._evaluator = _Evaluator(worker, module, name)

    def _call(self, verb: str, function: Callable[..., Result], *args: Any) -> Result:
        return self._worker.call(f"{verb} kernel {self._name}", self._limit, function, *args)

    def _send(self, specs: ArgumentSpecs) -> list[tvm.runtime.Tensor]:
        return [self._worker.tensor(small_values(shape, dtype)) for shape, dtype in specs]

    def invoke(self) -> None:
        """See `Callee.invoke`."""
        self._call("Running", self._function, *self._arguments)

    def flush_caches(self, size: bool | int) -> int:
        """See `Callee.flush_caches`."""
        return self._call("Flushing the caches for", self._evaluator.flush_caches, size)

    def evaluate(self, number: int) -> float:
        """See `Callee.evaluate`."""
        return self._call("Timing", self._evaluator.mean, number, self._arguments)


def small_values(shape: Sequence[int], dtype: str) -> np.ndarray:
    """Fill an array with the values 0 to 3 in turn, which no kernel overflows on and no float makes slow."""
    size = int(np.prod(shape, dtype=np.int64))
    return (np.arange(size) % 4).astype(dtype).reshape([int(extent) for extent in shape])
