"""The local device's worker process: serves one TVM RPC session with TVM's runtime alone.

Run as a script, `python -P serve_local.py RUNTIME... LISTENING_FD DIRECTORY`, with the paths of TVM's runtime
libraries: importing TVM itself would take seconds, and the runtime is all that a session needs. The key that
the client must say is in the environment, because everybody on a machine can read the arguments.
"""

import ctypes
import glob
import json
import os
import shutil
import socket
import struct
import subprocess
import sys

RPC_MAGIC = 0xFF271
RPC_MISMATCH = RPC_MAGIC + 2
MAX_KEY = 1024
# Bytes that are walked to flush small or unknown caches.
LEAST_FLUSH = 16 << 20
# Where a system tells of its clock, governor, heat, throttling and load.
ROOT = "/"
MACHINE_FILES = (
    "proc/loadavg",
    "sys/devices/system/cpu/cpufreq/policy*/scaling_cur_freq",
    "sys/devices/system/cpu/cpufreq/policy*/cpuinfo_max_freq",
    "sys/devices/system/cpu/cpufreq/policy*/scaling_governor",
    "sys/class/thermal/thermal_zone*/type",
    "sys/class/thermal/thermal_zone*/temp",
    "sys/devices/platform/soc/soc:firmware/get_throttled",
)
# Machines with very many cores or zones: so many of each tell enough.
MOST_FILES = 16
MOST_BYTES = 1 << 16
# Seconds that the Raspberry Pi's own tool may take.
TOOL_LIMIT = 1.0


def receive(connection: socket.socket, size: int) -> bytes:
    """Receive exactly `size` bytes; raises ConnectionError where the client goes away."""
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("The client went away while greeting.")
        data += part
    return data


def greet(listening: socket.socket, key: str) -> socket.socket:
    """Accept clients until one says the key; TVM's greeting is (magic, length, "client:KEY options")."""
    answer = b"server:"
    while True:
        connection, _ = listening.accept()
        magic, length = struct.unpack("<ii", receive(connection, 8))
        if magic == RPC_MAGIC and 0 <= length <= MAX_KEY:
            said = receive(connection, length).decode(errors="replace").split(" ")[0]
            if said == f"client:{key}":
                connection.sendall(struct.pack("<ii", RPC_MAGIC, len(answer)) + answer)
                return connection
            connection.sendall(struct.pack("<i", RPC_MISMATCH))
        connection.close()


class CacheFlush:
    """Pushes everything else out of the caches, by reading a large buffer."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def prepare(self, size: int) -> int:
        """Make the buffer of `size` bytes, or 0 for one larger than the last cache; gives its bytes."""
        # Caches that replace lines at random keep some of them through one pass over their own size.
        size = size or max(2 * last_cache_bytes(), LEAST_FLUSH)
        if len(self._buffer) != size:
            # Not `bytearray(size)`: memory that nobody wrote to is one page of zeros, again and again.
            self._buffer = bytearray(b"\x01") * size
        return size

    def flush(self, *_: object) -> None:
        """Read the whole buffer, in search of what it does not hold."""
        self._buffer.find(b"\x02")


def last_cache_bytes() -> int:
    """Size of the first core's last cache, 0 where the system does not tell."""
    sizes = [0]
    for path in glob.glob("/sys/devices/system/cpu/cpu0/cache/index*/size"):
        try:
            with open(path, encoding="ascii") as file:
                sizes.append(int(file.read().strip().removesuffix("K")) * 1024)
        except (OSError, ValueError):
            continue
    return max(sizes)


def read_machine() -> str:
    """JSON of what the system tells of its state: path -> text; what cannot be read is left out."""
    found: dict[str, str] = {}
    for pattern in MACHINE_FILES:
        for path in sorted(glob.glob(ROOT + pattern))[:MOST_FILES]:
            read_into(found, path)
    if not any(path.endswith("scaling_cur_freq") for path in found):
        read_into(found, ROOT + "proc/cpuinfo")
    if not any(path.endswith("get_throttled") for path in found):
        tool = shutil.which("vcgencmd")
        if tool:
            try:
                command = [tool, "get_throttled"]
                answer = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_LIMIT)
                found[ROOT + "vcgencmd/get_throttled"] = answer.stdout
            except (OSError, subprocess.TimeoutExpired):
                pass
    return json.dumps({"/" + path.removeprefix(ROOT): text for path, text in found.items()})


def read_into(found: dict[str, str], path: str) -> None:
    """Add the text of a file, unless it cannot be read: a zone of heat that is off gives an error."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            found[path] = file.read(MOST_BYTES)
    except OSError:
        pass


def main(arguments: list[str]) -> None:
    """Serve one session and return when the client ends it."""
    *runtimes, descriptor, directory = arguments
    # tvm_ffi imports torch where there is one, which takes seconds and is of no use here.
    sys.modules["torch"] = None  # type: ignore[assignment]
    import tvm_ffi

    for path in runtimes:
        ctypes.CDLL(path, ctypes.RTLD_GLOBAL)

    def work_path(name: str) -> str:
        if os.sep in name or "\0" in name:
            raise ValueError("The name of a file may hold no slash and no zero byte.")
        return os.path.join(directory, name)

    def load_module(name: str) -> tvm_ffi.Module:
        return tvm_ffi.load_module(work_path(name))

    def load_kernels(name: str) -> tvm_ffi.Module:
        # TVM's time evaluator does not look for functions in what a Relax executable imports.
        module = load_module(name)
        return module.imports[0] if module.kind == "relax.VMExecutable" else module

    tvm_ffi.register_global_func("tvm_compress.read_machine", read_machine, override=True)
    flush = CacheFlush()
    tvm_ffi.register_global_func("tvm_compress.prepare_flush", flush.prepare, override=True)
    tvm_ffi.register_global_func("tvm_compress.flush_caches", flush.flush, override=True)
    tvm_ffi.register_global_func("tvm_compress.load_kernels", load_kernels, override=True)
    tvm_ffi.register_global_func("tvm.rpc.server.workpath", work_path, override=True)
    tvm_ffi.register_global_func("tvm.rpc.server.load_module", load_module, override=True)
    with socket.socket(fileno=int(descriptor)) as listening:
        connection = greet(listening, os.environ["TVM_COMPRESS_RPC_KEY"])
    tvm_ffi.get_global_func("rpc.ServerLoop")(connection.detach())


if __name__ == "__main__":
    main(sys.argv[1:])
