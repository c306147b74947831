"""The client's end of one TVM RPC session with a process of its own, every wait with a limit."""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import tvm
from tvm import rpc

from tvm_compress.rpc.device import DeviceFailedError
from tvm_compress.rpc.machine import elf_machine, machine_of_triple
from tvm_compress.rpc.relay import LOST
from tvm_compress.rpc.watchdog import after
from tvm_compress.rpc.worker_process import DEATH_LIMIT, START_LIMIT, WorkerProcess, how_ended

Result = TypeVar("Result")

#: Seconds that a worker gets to show that it is alive after an error.
_ANSWER_LIMIT = 5.0
#: Seconds between looks whether a relay has its board.
_LOOK = 0.02
#: A loader's name: makes a module of a library whose name it is given.
LOADER = "tvm.rpc.server.load_module"
#: Instead of one: load a library as if it held kernels only, which TVM's time evaluator then finds.
WITHOUT_NETWORK = ""
#: Where a library with a network says so; a changed name is not found by who looks for it.
_NETWORK, _NO_NETWORK = b"__tvm_ffi__library_bin\0", b"__tvm_ffi__library_bi_\0"


class Worker:
    """A process that serves one RPC session, and the client's end of that session.

    Parameters
    ----------
    command, environment
        Of the process, see `WorkerProcess`.
    limit
        Seconds until it has to answer.
    machine
        Processor that it runs libraries of, by the names of `machine`; "" is not known.
    relay
        The process passes bytes on to a board, and announces it by `relay.announce` once it has one.

    Raises
    ------
    DeviceFailedError
        Of kind "connection": the process cannot be started or does not answer, or the relay gets no board.
    """

    def __init__(
        self,
        command: Callable[[Path], Sequence[str]],
        environment: Mapping[str, str],
        limit: float = START_LIMIT,
        machine: str = "",
        relay: bool = False,
    ) -> None:
        #: What a relay tells of its board.
        self.about: dict[str, Any] = {"machine": machine}
        self._relay = relay
        self._asked_machine = False
        self._expired = False
        self._failed = False
        self._server = WorkerProcess(command, environment)
        self._process = self._server.process
        self.directory = self._server.directory
        self._uploads = 0
        self.remote: Any = None
        try:
            if relay:
                # In Python: TVM's own client would wait where nothing can interrupt it.
                self.about = self._wait_for_board(limit)
            connect = ("127.0.0.1", self._server.port, self._server.key)
            self.remote = self.call("the connection", limit, rpc.connect, *connect)
        except DeviceFailedError as error:
            self.close()
            raise DeviceFailedError("connection", error.message, error.hint) from None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._server.alive

    def _wait_for_board(self, limit: float) -> dict[str, Any]:
        deadline = time.monotonic() + limit
        announced = self.directory / "board"
        while not announced.exists():
            if not self._server.alive:
                raise DeviceFailedError("connection", self._server.last_words() or "The relay died.")
            if time.monotonic() > deadline:
                raise DeviceFailedError("connection", f"There was no board within {limit:g} s.")
            time.sleep(_LOOK)
        return json.loads(announced.read_text(encoding="utf-8"))

    @property
    def machine(self) -> str:
        """Processor that the worker runs libraries of; "" where it does not say."""
        if not self.about["machine"] and not self._asked_machine:
            self._asked_machine = True
            # TVM's own server knows it where it runs with all of TVM.
            with contextlib.suppress(DeviceFailedError):
                self.about["machine"] = self.call("Asking for the processor", START_LIMIT, self._triple)
        return self.about["machine"]

    def _triple(self) -> str:
        try:
            return machine_of_triple(str(self.remote.get_function("target.llvm_get_system_triple")()))
        except AttributeError:
            return ""

    def call(self, what: str, limit: float, function: Callable[..., Result], *args: Any) -> Result:
        """Call something that waits for the worker; kill the worker if it takes longer than `limit` seconds.

        Raises
        ------
        DeviceFailedError
            Of kind "timeout", "crash" (the process died), or "unsupported" (the worker raised an error).
        """
        try:
            with after(limit, self._expire):
                return function(*args)
        except Exception as error:  # TVM raises whatever class the remote error names
            # The traceback would keep remote objects, and with them the session, alive.
            text = _last_words(str(error))
        raise self._failure(what, limit, text)

    def _expire(self) -> None:
        self._expired = True
        self._kill()

    def _failure(self, what: str, limit: float, text: str) -> DeviceFailedError:
        self._failed = True
        if not self._expired and self._answers():
            return DeviceFailedError("unsupported", f"{what} failed: {text}")
        self._kill()
        code = self._process.wait()
        if self._expired:
            return DeviceFailedError("timeout", f"{what} did not finish within {limit:g} s.")
        words = self._server.last_words()
        if self._relay and code > 0 and words:
            return DeviceFailedError("connection" if code == LOST else "crash", f"{what}: {words}")
        return DeviceFailedError(
            "crash", f"{what}: the device's process {how_ended(code)}.{self._server.quote_log()}"
        )

    def _answers(self) -> bool:
        """Whether the worker outlived an error: then it was its answer, else its last sign."""
        if self.remote is not None:
            with contextlib.suppress(Exception), after(_ANSWER_LIMIT, self._kill):
                self.remote.get_function("tvm.rpc.server.workpath")("alive")
                return True
        # A dying process closes its sockets before it can be waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(DEATH_LIMIT)
        return False

    def load(self, library: Path, limit: float, loader: str = LOADER) -> tuple[tvm.runtime.Module, str]:
        """Send a library and load it; gives the remote module and its file's name on the device.

        Parameters
        ----------
        library
            The shared library's path on this machine.
        limit
            Seconds that each of the two steps may take.
        loader
            The worker's function that makes a module of a file's name, or WITHOUT_NETWORK.

        Raises
        ------
        DeviceFailedError
            Of kind "build" where the file is missing, is built for another processor, or cannot be loaded on
            the device, else as `call`.
        """
        if not library.is_file():
            raise DeviceFailedError("build", f"There is no library {library}.")
        built_for = self._check_machine(library)
        self._uploads += 1
        name = f"library{self._uploads}.so"

        def load() -> tvm.runtime.Module:
            return self.remote.get_function(loader or LOADER)(name)

        try:
            content = bytearray(library.read_bytes())
        except OSError as error:
            raise DeviceFailedError("build", f"{library} cannot be read: {error}.") from None
        if loader == WITHOUT_NETWORK:
            content = content.replace(_NETWORK, _NO_NETWORK)
        self.call(f"Sending {library.name}", limit, self._send, content, name)
        built = f"It was built for {built_for}: is that the device's processor?" if built_for else ""
        with as_build_error(built or "Is it a shared library for this device?"):
            return self.call(f"Loading {library.name}", limit, load), name

    def _check_machine(self, library: Path) -> str:
        """Processor that a library is built for; what a loader says of a wrong one misleads."""
        built_for = elf_machine(library)
        if built_for and self.machine and built_for != self.machine:
            raise DeviceFailedError(
                "build",
                f"{library.name} is built for {built_for}, but the device is {self.machine}.",
                "Build it for the device's target (`--target`).",
            )
        return built_for

    def _send(self, content: bytearray, name: str) -> None:
        self.remote.upload(content, name)

    def tensor(self, array: np.ndarray) -> tvm.runtime.Tensor:
        """Copy an array to the device; to be called within `call`."""
        # Not `ascontiguousarray`, which gives an array without dimensions one.
        return tvm.runtime.tensor(np.asarray(array, order="C"), self.remote.cpu(0))

    def close(self) -> None:
        """Kill the process with all its children and remove its files; further calls do nothing."""
        if self._server.closed:
            return
        self._server.close()
        self.remote = None
        if self._failed:
            # What an exception left in reference cycles would keep the session's place in TVM's table of 32.
            gc.collect()

    def _kill(self) -> None:
        self._server.kill()


@contextlib.contextmanager
def as_build_error(hint: str) -> Iterator[None]:
    """Turn an error that the worker raised into one of kind "build", with a hint."""
    try:
        yield
    except DeviceFailedError as error:
        if error.kind != "unsupported":
            raise
        raise DeviceFailedError("build", error.message, hint) from None


def _last_words(text: str) -> str:
    """Take the message of a remote error, without the C++ stack trace that stands before it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "no message"
    return last if last.endswith(".") else f"{last}."
