"""What a board reached by SSH runs: one worker, whose bytes pass through this program's input and output.

`ssh_relay` sends this file with those that it imports, so that nothing of ours needs to be on the board: only
Python 3.10 or later and TVM's runtime, from the packages `apache-tvm` and `apache-tvm-ffi`. It says who it is
(MARK, then a chunk of JSON), starts `serve_local` in a process of its own and passes bytes on, cut as
`last_words` has it. It ends with its input: when the connection breaks, nothing is left on the board.

Only the standard library is used.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import secrets
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time

from tvm_compress.rpc import serve_local
from tvm_compress.rpc.last_words import chunk, ending, hello
from tvm_compress.rpc.machine import own_machine

#: Stands before all that this program says: what the board's login scripts print is skipped.
MARK = b"\0tvm_compress\0"
PACKAGES = ("apache-tvm", "apache-tvm-ffi")
LIBRARIES = ("libtvm_runtime.so", "libtvm_runtime_extra.so")
# Seconds that a worker gets to load TVM's runtime and answer, to take what it was sent, and to finish dying.
START, STUCK, DEATH = 50.0, 60.0, 2.0
# Seconds between looks at the clock.
LOOK = 5.0
PIECE = 1 << 16


def versions() -> dict[str, str]:
    """Versions of TVM's packages that are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def runtime_libraries() -> list[str]:
    """Paths of TVM's runtime, found without importing TVM, which would take seconds."""
    spec = importlib.util.find_spec("tvm")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    paths = [os.path.join(place, "lib", name) for place in places for name in LIBRARIES]
    return [path for path in paths if os.path.exists(path)]


def main(directory: str, wanted: dict[str, str], threads: int, limit: float) -> None:
    """Serve one session with a worker that has `directory` for its files, for at most `limit` seconds."""
    # A closed output is an error like others.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    libraries = runtime_libraries()
    about = {
        "versions": versions(),
        "libraries": libraries,
        "machine": own_machine(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "pid": os.getpid(),
        "error": "",
    }
    if about["versions"] != wanted or not libraries:
        # The other end says what to install.
        _write(MARK + hello(about))
        return
    files = os.path.join(directory, "files")
    os.mkdir(files)
    process, port, key = _start(files, libraries, threads)
    try:
        try:
            worker = _connect(port, key)
        except (OSError, struct.error) as error:
            said = _quote(files)
            _write(MARK + hello({**about, "error": f"TVM's runtime does not start there: {error}. {said}"}))
            return
        _write(MARK + hello(about))
        _serve(worker, process, files, limit)
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _start(files: str, libraries: list[str], threads: int) -> tuple[subprocess.Popen, int, str]:
    key = secrets.token_hex(16)
    environment = {**os.environ, "TVM_COMPRESS_RPC_KEY": key}
    environment.update(TVM_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads))
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listening:
        command = [sys.executable, serve_local.__file__, *libraries, str(listening.fileno()), files]
        with open(os.path.join(files, "worker.log"), "wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=files,
                env=environment,
                pass_fds=[listening.fileno()],
                start_new_session=True,
            )
        return process, listening.getsockname()[1], key


def _connect(port: int, key: str) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=START)
    said = f"client:{key}".encode()
    connection.sendall(struct.pack("<ii", serve_local.RPC_MAGIC, len(said)) + said)
    _, length = struct.unpack("<ii", serve_local.receive(connection, 8))
    serve_local.receive(connection, length)
    connection.settimeout(None)
    return connection


def _serve(worker: socket.socket, process: subprocess.Popen, files: str, limit: float) -> None:
    """Pass bytes on until the other end is gone, or the worker, or the time is up."""
    worker.settimeout(STUCK)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        ready = select.select([0, worker.fileno()], [], [], LOOK)[0]
        try:
            if 0 in ready:
                data = os.read(0, PIECE)
                if not data:
                    return
                worker.sendall(data)
            if worker.fileno() in ready:
                data = worker.recv(PIECE)
                if not data:
                    break
                _write(chunk(data))
        except OSError:
            # The worker died, or takes nothing; or the output is closed, and nobody hears the last words.
            break
    else:
        _write(ending("its time was up"))
        return
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(DEATH)
    with contextlib.suppress(OSError):
        _write(ending(f"its process {_how(process.returncode)}. {_quote(files)}".rstrip(" .")))


def _how(code: int | None) -> str:
    if code is None:
        return "closed its connection"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _quote(files: str) -> str:
    with open(os.path.join(files, "worker.log"), "rb") as log:
        text = log.read()[-600:].decode(errors="replace").strip()
    return f"It said: {text}" if text else ""


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def processor() -> str:
    """Name of the machine, such as "Raspberry Pi 4 Model B Rev 1.4", or of its processor."""
    with contextlib.suppress(OSError), open("/proc/device-tree/model", "rb") as model:
        return model.read().rstrip(b"\0").decode(errors="replace")
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def run(directory: str, wanted: dict[str, str], threads: int, limit: float) -> None:
    """Do `main`, and leave no files behind."""
    try:
        main(directory, wanted, threads, limit)
    except BrokenPipeError:
        # The client is gone.
        os._exit(1)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
