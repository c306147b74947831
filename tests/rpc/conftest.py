"""Small libraries for both devices, built once per run."""

# TVMScript: its functions have no `self`, and its annotations are calls.
# ruff: noqa: N805
# mypy: disable-error-code="valid-type"

import os
import signal
import subprocess
import sys
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
    """A device under test, an open session on it, and how to build for it."""

    device: Device
    session: Session
    build: Callable[[str], Path]


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


@pytest.fixture(scope="module")
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


@pytest.fixture(params=sorted(TARGETS), scope="module")
def bench(request: pytest.FixtureRequest, build: Callable[[str, str], Path]) -> Iterator[Bench]:
    device = open_device(request.param)
    with device.open(QUICK) as session:
        yield Bench(device, session, lambda name: build(name, request.param))


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
