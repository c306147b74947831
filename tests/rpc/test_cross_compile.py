"""Linking for another processor, or saying what to install."""

import platform
import shutil
import sys

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.rpc.conftest import TARGETS, Layers
from tvm_compress.errors import TargetError
from tvm_compress.rpc.cross_compile import c_compiler, cross_compile, export_fcompile
from tvm_compress.rpc.device import open_device
from tvm_compress.rpc.elf import read_code


def test_this_machine_needs_nothing():
    assert export_fcompile("") is None
    assert export_fcompile(f"{platform.machine()}-linux-gnu") is None


def test_a_library_for_aarch64_is_one(build):
    owners = {name for _, name in read_code(build("kernels", "emulated-a72")).owners}
    assert {"double", "crash"} <= owners


def test_an_unknown_processor_is_named():
    with pytest.raises(TargetError, match="'vax-dec-ultrix'"):
        export_fcompile("vax-dec-ultrix")


@pytest.fixture
def no_gnu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)


def test_a_missing_compiler_is_named_with_both_ways_to_get_one(monkeypatch, no_gnu):
    monkeypatch.setitem(sys.modules, "ziglang", None)
    other = "aarch64" if platform.machine() != "aarch64" else "x86_64"
    for triple, package in ((f"{other}-linux-gnu", "gcc-"), ("", "gcc`")):
        with pytest.raises(TargetError) as caught:
            export_fcompile(triple)
        assert f"sudo apt-get install {package}" in caught.value.hint
        assert "pip install 'tvm_compress[cross]'" in caught.value.hint


def test_gnus_compiler_comes_before_zig():
    assert c_compiler("aarch64") == (shutil.which("aarch64-linux-gnu-gcc"),)


@pytest.mark.parametrize(("device", "triple"), [("emulated-a72", "aarch64-linux-gnu"), ("local", "")])
def test_zig_links_where_gcc_is_missing(monkeypatch, tmp_path, device, triple):
    executable = relax.build(Layers, target=tvm.target.Target(TARGETS[device]))
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        patch.delenv("CXX", raising=False)
        patch.delenv("CC", raising=False)
        executable.export_library(str(tmp_path / "z.so"), fcompile=export_fcompile(triple))
    with open_device(device).open() as session:
        inputs = [np.ones((2, 8), "float32"), np.ones((8, 4), "float32")]
        np.testing.assert_array_equal(
            session.run(tmp_path / "z.so", inputs)[0], np.full((2, 4), 8, "float32")
        )
    if device == "emulated-a72":
        owners = {name for _, name in read_code(tmp_path / "z.so").owners}
        assert {"matmul", "relu"} <= owners


def test_a_failed_link_says_why_and_leaves_nothing(tmp_path):
    (tmp_path / "bad.o").write_text("no object")
    with pytest.raises(TargetError, match=r"bad\.o"):
        cross_compile("gcc")(str(tmp_path / "out.so"), [str(tmp_path / "bad.o")])
    with pytest.raises(TargetError, match="cannot link"):
        cross_compile(str(tmp_path / "no-compiler"))(str(tmp_path / "out.so"), [])
    assert [path.name for path in tmp_path.iterdir()] == ["bad.o"]


def test_options_reach_the_compiler(build, tmp_path):
    target = tvm.target.Target({"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"})
    module = tvm.compile(_add_one(), target=target)
    module.export_library(
        str(tmp_path / "a.so"),
        fcompile=export_fcompile("aarch64-linux-gnu"),
        options=["-Wl,-soname,named.so"],
    )
    assert b"named.so" in (tmp_path / "a.so").read_bytes()


def _add_one():
    a = tvm.te.placeholder((4,), "float32", name="a")
    b = tvm.te.compute((4,), lambda i: a[i] + 1.0, name="b")
    return tvm.te.create_prim_func([a, b]).with_attr("global_symbol", "add_one")
