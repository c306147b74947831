"""A process that serves one RPC client on loopback, in a group of its own that ends with us."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tvm_compress.rpc.device import DeviceFailedError
from tvm_compress.rpc.serve_local import RPC_MAGIC, receive

#: Seconds until a new worker has to answer; it loads TVM's runtime, on a machine that may be busy.
START_LIMIT = 60.0
#: Seconds that a worker whose connection broke gets to finish dying.
DEATH_LIMIT = 2.0
#: Bytes of the worker's own messages that an error quotes.
_QUOTED_BYTES = 1200


class WorkerProcess:
    """A process that waits on loopback for one RPC client, in a group and a directory of its own.

    The command is started with two further arguments, an inherited listening socket's number and a directory
    for its files, and with the key that the client has to greet with as TVM_COMPRESS_RPC_KEY in its
    environment. It accepts one client and serves it.

    Parameters
    ----------
    command
        Gives the program and its arguments, for the directory that the worker will use.
    environment
        The whole environment of the process.

    Raises
    ------
    DeviceFailedError
        Of kind "connection": the process cannot be started.
    """

    def __init__(self, command: Callable[[Path], Sequence[str]], environment: Mapping[str, str]) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="tvm_compress-"))
        self.log = self.directory / "worker.log"
        self.key = secrets.token_hex(16)
        try:
            with socket.create_server(("127.0.0.1", 0), backlog=1) as listening:
                self.port: int = listening.getsockname()[1]
                self._spawn(command(self.directory), environment, listening.fileno())
        except OSError as error:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise DeviceFailedError(
                "connection", f"The device's process cannot be started: {error}."
            ) from None
        # Also when nobody calls close(): at the latest when Python ends.
        self._end = weakref.finalize(self, _end, self.process, self._life_line, self.directory)

    def _spawn(self, command: Sequence[str], environment: Mapping[str, str], listening: int) -> None:
        inherited, self._life_line = os.pipe()
        try:
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(
                    [*command, str(listening), str(self.directory)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.directory,
                    env={**environment, "TVM_COMPRESS_RPC_KEY": self.key},
                    pass_fds=[listening, inherited],
                    start_new_session=True,
                )
            _kill_with_parent(self.process.pid, inherited)
        except OSError:
            os.close(self._life_line)
            raise
        finally:
            os.close(inherited)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._end.alive and self.process.poll() is None

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return not self._end.alive

    def connect(self) -> socket.socket:
        """Connect and greet as a client; for those who pass a client's bytes on. Raises OSError."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=START_LIMIT)
        said = f"client:{self.key}".encode()
        connection.sendall(struct.pack("<ii", RPC_MAGIC, len(said)) + said)
        magic, length = struct.unpack("<ii", receive(connection, 8))
        receive(connection, length)
        if magic != RPC_MAGIC:
            raise ConnectionError("the worker expected another client")
        connection.settimeout(None)
        return connection

    def exit_code(self) -> int:
        """Kill the process, if it has not ended, and give its exit code, negative for a signal's number."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(DEATH_LIMIT)
        self.kill()
        return self.process.wait()

    def last_words(self) -> str:
        """Last words of the process, or ""."""
        with contextlib.suppress(OSError):
            return self.log.read_bytes()[-_QUOTED_BYTES:].decode(errors="replace").strip()
        return ""

    def quote_log(self) -> str:
        """Last words of the process, for an error's text."""
        text = self.last_words()
        return f" It said: {text}" if text else ""

    def kill(self) -> None:
        """Kill the process with all its children."""
        _kill_group(self.process)

    def close(self) -> None:
        """Kill and remove its files; further calls do nothing."""
        self._end()


def how_ended(code: int) -> str:
    """Say an exit code, negative for a signal's number, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _kill_group(process: subprocess.Popen) -> None:
    # Once it was waited for, its number may be another's.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _end(process: subprocess.Popen, life_line: int, directory: Path) -> None:
    _kill_group(process)
    process.wait()
    os.close(life_line)
    shutil.rmtree(directory, ignore_errors=True)


def _kill_with_parent(group: int, pipe: int) -> None:
    """Have the kernel kill a process group when the writing end of `pipe` closes, however we end.

    Only Linux can; elsewhere an interrupted worker ends when it next looks at its connection.
    """
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(pipe, fcntl.F_SETOWN, -group)
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
