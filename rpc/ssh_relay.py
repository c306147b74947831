"""Stands between a session and a board reached by SSH: starts the worker there, then passes bytes on.

Run by `Worker` as `python -m tvm_compress.rpc.ssh_relay ADDRESS THREADS SESSION_LIMIT LISTENING_FD
DIRECTORY`. It starts the system's `ssh`, sends the program `ssh_board` through it, which serves on its input
and output: no port of the board is opened, and when this process or `ssh` ends, the program there ends too.
What is known of the board goes into DIRECTORY/board. TVM_COMPRESS_SSH may name another command than `ssh`,
with options.

Only the standard library is used: the process starts at once.
"""

import base64
import contextlib
import importlib.metadata
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

from tvm_compress.rpc.address import SshAddress
from tvm_compress.rpc.last_words import Chunks
from tvm_compress.rpc.relay import CHUNK, LOST, announce, end, serve
from tvm_compress.rpc.ssh_board import MARK, PACKAGES

#: Seconds until a board has to have started TVM's worker.
ANSWER_LIMIT = 60.0
# Seconds that `ssh` gets to end once its connection is gone.
END_LIMIT = 5.0
# Bytes that a board's login scripts may print.
MOST_NOISE = 1 << 16
OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "10",
    "ServerAliveCountMax": "3",
    # A connection of its own, without what the user's settings forward.
    "ControlPath": "none",
    "ClearAllForwardings": "yes",
    "EscapeChar": "none",
}
FILES = ("serve_local", "last_words", "machine", "ssh_board")
# What the board's Python is started with: it reads LENGTH bytes of JSON and runs the program in it.
BOOT = """
import json, os, sys, tempfile
if sys.version_info < (3, 10):
    sys.exit("Python 3.10 or later is needed, not " + sys.version.split()[0] + ".")
left, data = int(sys.argv[1]), b""
while left:
    part = os.read(0, left)
    if not part:
        sys.exit(1)
    data, left = data + part, left - len(part)
sent = json.loads(data.decode())
place = tempfile.mkdtemp(prefix="tvm_compress-")
for name, text in sent["files"].items():
    path = os.path.join(place, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
sys.path.insert(0, place)
from tvm_compress.rpc.ssh_board import run
run(place, **sent["arguments"])
"""
#: Of each failure of `ssh`: what it says, what it means, and what to do. {0} is user@host, {1} the options.
FAILURES = (
    (
        "Permission denied",
        "refused the login",
        "Let it know your key by `ssh-copy-id {1}{0}`; `ssh -o BatchMode=yes {1}{0} true` has to work.",
    ),
    (
        "IDENTIFICATION HAS CHANGED",
        "is not the machine that it was: its key has changed",
        "If it was set up anew, forget the old key by `ssh-keygen -R HOST` and connect once by `ssh {1}{0}`.",
    ),
    (
        "Host key verification failed",
        "is not known yet",
        "Connect once by `ssh {1}{0}` and confirm its key.",
    ),
    ("Could not resolve", "is not found by its name", "Is it spelt right? Try the board's address."),
    (
        "Connection refused",
        "takes no SSH connections",
        "Start its SSH server: `sudo systemctl enable --now ssh` on the board, or name its port.",
    ),
    ("timed out", "is not reachable", "Is it switched on, and in this network?"),
    ("No route to host", "is not reachable", "Is it switched on, and in this network?"),
    ("Network is unreachable", "is not reachable", "Is it switched on, and in this network?"),
)


def ssh_command() -> list[str]:
    """Give the command that TVM_COMPRESS_SSH names, or `ssh`."""
    return shlex.split(os.environ.get("TVM_COMPRESS_SSH", "")) or ["ssh"]


def connect(address: SshAddress, log: Path, length: int) -> tuple[subprocess.Popen, socket.socket]:
    """Start `ssh`, and with it Python on the board; gives the process and the other end of its pipes."""
    options = [text for name, value in OPTIONS.items() for text in ("-o", f"{name}={value}")]
    # In letters that no shell changes.
    boot = base64.b64encode(BOOT.encode()).decode()
    remote = f'{shlex.quote(address.python)} -c \'exec(__import__("base64").b64decode("{boot}"))\' {length}'
    command = [*ssh_command(), "-T", "-x", *options, *address.options(), "--", address.login, remote]
    ours, theirs = socket.socketpair()
    with theirs, log.open("wb") as errors:
        ssh = subprocess.Popen(
            command,
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=errors,
            env={**os.environ, "LC_ALL": "C"},
        )
    return ssh, ours


def payload(threads: int, limit: float) -> bytes:
    """Give what the board's Python is sent: the program's files and its arguments."""
    here = Path(__file__).parent
    files = {f"tvm_compress/rpc/{name}.py": (here / f"{name}.py").read_text("utf-8") for name in FILES}
    files |= {"tvm_compress/__init__.py": "", "tvm_compress/rpc/__init__.py": ""}
    arguments = {"wanted": wanted(), "threads": threads, "limit": limit}
    return json.dumps({"files": files, "arguments": arguments}).encode()


def wanted() -> dict[str, str]:
    """Versions of TVM's packages that the board must have: those of this machine."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def hear_hello(board: socket.socket, chunks: Chunks) -> dict:
    """Wait for what the program says of the board; OSError where it ends, ValueError for too much noise."""
    limit = time.monotonic() + ANSWER_LIMIT
    data = b""
    while True:
        if MARK in data:
            chunks.add(data.split(MARK, 1)[1])
            data = b""
            break
        if len(data) > MOST_NOISE:
            raise ValueError("its login scripts print too much")
        data += _receive(board, limit)
    while (said := chunks.next()) is None:
        chunks.add(_receive(board, limit))
    return json.loads(said)


def _receive(board: socket.socket, limit: float) -> bytes:
    board.settimeout(max(0.1, limit - time.monotonic()))
    data = board.recv(CHUNK)
    if not data:
        raise ConnectionError("the program ended")
    return data


def why_not(address: SshAddress, code: int, errors: str) -> str:
    """Say why there is no connection, and what to do, from the exit code and the words of `ssh`."""
    last = (errors.strip().splitlines() or ["nothing"])[-1].strip()
    options = "".join(f"{option} " for option in address.options())
    if code == 255:
        for words, meaning, hint in FAILURES:
            if words in errors:
                return f"{address} {meaning} ({last}). {hint.format(address.login, options)}"
        return f"{address}: ssh failed and said: {last}."
    if code in (126, 127):
        return (
            f"{address} has no `{address.python}` ({last}). Install it there by `sudo apt-get install "
            f"python3-venv`, or name the board's Python: ssh://USER@HOST/home/USER/venv/bin/python."
        )
    return (
        f"{address}: the program on the board ended with exit code {code} and said: {errors.strip()[-400:]}"
    )


def check(address: SshAddress, about: dict) -> None:
    """End with what to install where the board lacks TVM, or has another version of it."""
    needed, found = wanted(), about["versions"]
    if about["error"]:
        end(f"{address}: {about['error']}", LOST)
    if found == needed and about["libraries"]:
        return
    has = ", ".join(f"{name} {version}" for name, version in found.items()) or "no TVM"
    pins = " ".join(f"{name}=={version}" for name, version in needed.items())
    install = f"`{address.python} -m pip install {pins}`"
    if address.python == "python3":
        install = (
            f"`python3 -m venv ~/tvm && ~/tvm/bin/pip install {pins}`, and name it: "
            f"{address}/home/USER/tvm/bin/python"
        )
    end(f"{address} has {has} for `{address.python}`. Install on the board: {install}.", LOST)


def main(arguments: list[str]) -> None:
    """Start a worker on the board, then serve one client with it."""
    text, threads, limit, descriptor, directory = arguments
    address = SshAddress.parse(text)
    sent = payload(int(threads), float(limit))
    log = Path(directory, "ssh.log")
    try:
        ssh, board = connect(address, log, len(sent))
    except OSError as error:
        end(
            f"`{ssh_command()[0]}` cannot be started: {error}. "
            "Install it by `sudo apt-get install openssh-client`.",
            LOST,
        )
    chunks = Chunks()
    try:
        board.settimeout(ANSWER_LIMIT)
        board.sendall(sent)
        about = hear_hello(board, chunks)
    except TimeoutError:
        ssh.kill()
        end(f"{address} did not start TVM's worker within {ANSWER_LIMIT:g} s.", LOST)
    except ValueError as error:
        ssh.kill()
        end(f"{address} cannot be used: {error}.", LOST)
    except OSError:
        code = _exit_code(ssh)
        end(why_not(address, code, log.read_text(errors="replace")), LOST)
    check(address, about)
    announce(directory, {"address": str(address), **about})
    serve(int(descriptor), board, chunks, f"the board {address}", lambda: _last_line(log))


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f" ssh said: {lines[-1]}" if lines else ""


def _exit_code(ssh: subprocess.Popen) -> int:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return ssh.wait(END_LIMIT)
    ssh.kill()
    return ssh.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
