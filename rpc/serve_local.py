"""The local device's worker process: serves one TVM RPC session with TVM's runtime alone.

Run as a script, `python -P serve_local.py RUNTIME... LISTENING_FD DIRECTORY`, with the paths of TVM's runtime
libraries: importing TVM itself would take seconds, and the runtime is all that a session needs. The key that
the client must say is in the environment, because everybody on a machine can read the arguments.
"""

import ctypes
import os
import socket
import struct
import sys

RPC_MAGIC = 0xFF271
RPC_MISMATCH = RPC_MAGIC + 2
MAX_KEY = 1024


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

    tvm_ffi.register_global_func("tvm_compress.load_kernels", load_kernels, override=True)
    tvm_ffi.register_global_func("tvm.rpc.server.workpath", work_path, override=True)
    tvm_ffi.register_global_func("tvm.rpc.server.load_module", load_module, override=True)
    with socket.socket(fileno=int(descriptor)) as listening:
        connection = greet(listening, os.environ["TVM_COMPRESS_RPC_KEY"])
    tvm_ffi.get_global_func("rpc.ServerLoop")(connection.detach())


if __name__ == "__main__":
    main(sys.argv[1:])
