"""Small libraries for both devices, built once per run."""

# TVMScript: its functions have no `self`, and its annotations are calls.
# ruff: noqa: N805
# mypy: disable-error-code="valid-type"

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.rpc.tracker import Tracker
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from tvm_compress.rpc.address import Tracker as Address
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import Device, MeasurementSettings, Session, open_device
from tvm_compress.rpc.machine import own_machine

TARGETS = {
    "local": {"kind": "llvm"},
    "emulated-a72": {
        "kind": "llvm",
        "mtriple": "aarch64-linux-gnu",
        "mcpu": "cortex-a72",
        "mattr": ["+neon"],
    },
}
TRIPLES = {"local": "", "emulated-a72": "aarch64-linux-gnu"}
QUICK = MeasurementSettings(repeat=3, min_repeat_ms=1.0, timeout_s=20.0)


@dataclass
class Bench:
    """A device under test, an open session on it, and how to build for it.

    `processor` is the key in TARGETS of what its libraries are built for, `machine` its name in errors.
    """

    device: Device
    session: Session
    build: Callable[[str], Path]
    processor: str

    @property
    def machine(self) -> str:
        return own_machine() if self.processor == "local" else "aarch64"


@I.ir_module
class Layers:
    @R.function
    def main(x: R.Tensor((2, 8), "float32"), w: R.Tensor((8, 4), "float32")) -> R.Tensor((2, 4), "float32"):
        with R.dataflow():
            product = R.matmul(x, w)
            out = R.nn.relu(product)
            R.output(out)
        return out


@I.ir_module
class TwoOutputs:
    @R.function
    def main(
        x: R.Tensor((3, 5), "int8"),
    ) -> R.Tuple(R.Tensor((3, 5), "int8"), R.Tensor((3,), "int32")):
        with R.dataflow():
            top = R.clip(x, 0, 100)
            total = R.sum(R.astype(x, "int32"), axis=[1])
            out = (top, total)
            R.output(out)
        return out


@I.ir_module
class Kernels:
    @T.prim_func
    def double(a: T.Buffer((4096,), "float32"), b: T.Buffer((4096,), "float32")):
        T.func_attr({"global_symbol": "double"})
        for i in T.parallel(4096):
            b[i] = a[i] * T.float32(2)

    @T.prim_func
    def crash(a: T.Buffer((1,), "int32")):
        T.func_attr({"global_symbol": "crash"})
        a[0] = T.call_extern("int32", "raise", 11)


@I.ir_module
class Vector:
    @R.function
    def main(x: R.Tensor((65536,), "float32")) -> R.Tensor((65536,), "float32"):
        with R.dataflow():
            out = R.nn.relu(x)
            R.output(out)
        return out


@I.ir_module
class VectorKernels:
    @T.prim_func
    def twice(a: T.Buffer((65536,), "float32"), b: T.Buffer((65536,), "float32")):
        T.func_attr({"global_symbol": "twice"})
        for i in range(8192):
            for j in T.vectorized(8):
                b[i * 8 + j] = a[i * 8 + j] * T.float32(2)


def failing(function: str, *args: int) -> tvm.IRModule:
    """Make a module whose kernel calls a function of the C library that does not come back."""

    @I.ir_module
    class Failing:
        @T.prim_func
        def fail(a: T.Buffer((1,), "float32"), b: T.Buffer((1,), "float32")):
            T.func_attr({"tirx.noalias": True})
            b[0] = a[0] + T.Cast("float32", T.call_extern("int32", function, *args))

        @R.function
        def main(x: R.Tensor((1,), "float32")) -> R.Tensor((1,), "float32"):
            cls = Failing
            with R.dataflow():
                out = R.call_tir(cls.fail, (x,), out_ty=R.Tensor((1,), "float32"))
                R.output(out)
            return out

    return Failing


def _module(name: str) -> tvm.IRModule:
    if name == "segfault":
        return failing("raise", 11)
    if name == "hang":
        return failing("pause")
    return {
        "layers": Layers,
        "two_outputs": TwoOutputs,
        "kernels": Kernels,
        "vector": Vector,
        "vector_kernels": VectorKernels,
    }[name]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Build a module by its name for a device by its name."""
    folder = tmp_path_factory.mktemp("libraries")

    def build(name: str, device: str) -> Path:
        path = folder / f"{name}-{device}.so"
        if not path.exists():
            target = tvm.target.Target(TARGETS[device])
            make = tvm.compile if name.endswith("kernels") else relax.build
            make(_module(name), target=target).export_library(
                str(path), fcompile=export_fcompile(TRIPLES[device])
            )
        return path

    return build


@pytest.fixture(scope="session")
def tracker() -> Iterator[Address]:
    """A tracker of TVM on loopback, and the key of the boards."""
    server = Tracker(host="127.0.0.1", port=9190, port_end=9990, silent=True)
    yield Address("127.0.0.1", server.port, "pi")
    server.terminate()


@dataclass(frozen=True)
class Board:
    """An emulated board that serves in a process of its own."""

    server: subprocess.Popen
    port: int

    def unplug(self) -> None:
        """Kill the worker of the session that it serves."""
        for child in Path(f"/proc/{self.server.pid}/task/{self.server.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)


@contextmanager
def emulated_boards(tracker: Address, count: int) -> Iterator[list[Board]]:
    """Announce emulated boards at a tracker as a user does, and wait until it knows them.

    Each serves in another process: TVM's client holds Python's lock while it waits for some answers.
    """
    command = [sys.executable, "-u", "-c", "from tvm_compress.cli.main import entry; entry()"]
    command += ["device", "serve", str(tracker), "--emulated-a72", "--host", "127.0.0.1"]
    with ExitStack() as stack:
        servers = [
            stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            for _ in range(count)
        ]
        for server in servers:
            stack.callback(server.kill)
        found = []
        for server in servers:
            assert server.stdout is not None
            announced = next(line for line in iter(server.stdout.readline, "") if "announced" in line)
            found.append(Board(server, int(announced.rsplit(" ", 1)[1])))
        yield found


@pytest.fixture(scope="session")
def two(tracker: Address) -> Iterator[list[Board]]:
    """Two boards, started once: each survives what the tests do to its sessions."""
    with emulated_boards(tracker, 2) as servers:
        yield servers


@dataclass(frozen=True)
class SshServer:
    """An SSH server of this very user on loopback, as a board."""

    port: int
    folder: Path
    user: str

    def address(self, python: str | Path = sys.executable) -> str:
        return f"ssh://{self.user}@127.0.0.1:{self.port}{python}"

    def client(self, known: str = "known_hosts", identity: str = "key") -> str:
        """Give what TVM_COMPRESS_SSH has to be for a client with these files, apart from the user's own."""
        config = self.folder / f"config-{known}-{identity}"
        config.write_text(
            f"IdentityFile {self.folder / identity}\nIdentitiesOnly yes\nIdentityAgent none\n"
            f"UserKnownHostsFile {self.folder / known}\nGlobalKnownHostsFile /dev/null\n"
            # The quickest to start with.
            "KexAlgorithms curve25519-sha256\n"
        )
        return f"ssh -F {config}"


@pytest.fixture(scope="session")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshServer]:
    """A real sshd with keys of its own, and the environment that leads our client to it."""
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host_key", "key", "other_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    public = (folder / "host_key.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}")
    (folder / "nobody").write_text("")
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder / 'host_key'}\nPidFile none\n"
        f"AuthorizedKeysFile {folder / 'key.pub'}\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
    )
    if os.geteuid() == 0:
        # Where sshd, started by root, locks itself in.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    assert sshd is not None, "The tests need openssh-server: run scripts/setup dev."
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        _wait_for_port(port)
        found = SshServer(port, folder, pwd.getpwuid(os.getuid()).pw_name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TVM_COMPRESS_SSH", found.client())
            yield found
    finally:
        server.kill()
        server.wait()


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


@pytest.fixture(params=["emulated-a72", "local", "ssh", "tracker"], scope="module")
def bench(request: pytest.FixtureRequest, build: Callable[[str, str], Path]) -> Iterator[Bench]:
    """One device after the other; `tracker` has two emulated boards, `ssh` is this machine."""
    name, processor = request.param, request.param
    if name == "tracker":
        request.getfixturevalue("two")
        name, processor = str(request.getfixturevalue("tracker")), "emulated-a72"
    elif name == "ssh":
        name, processor = request.getfixturevalue("ssh_server").address(), "local"
    device = open_device(name)
    with device.open(QUICK) as session:
        yield Bench(device, session, lambda module: build(module, processor), processor)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def assemble(tmp_path: Path) -> Callable[[str], Path]:
    """Make an aarch64 library with a kernel `hand` of the given assembly, free to use x9-x15 and v0-v7."""

    def assemble(body: str) -> Path:
        source, library = tmp_path / "hand.s", tmp_path / "hand.so"
        source.write_text(
            ".arch armv8.2-a+dotprod\n.text\n.globl __tvm_ffi_hand\n.type __tvm_ffi_hand, %function\n"
            f"__tvm_ffi_hand:\n{body}\nmov w0, #0\nret\n.size __tvm_ffi_hand, .-__tvm_ffi_hand\n"
        )
        command = ["aarch64-linux-gnu-gcc", "-shared", "-fPIC", "-nostdlib", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        return library

    return assemble
