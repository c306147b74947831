"""Linking for another processor, or saying what to install."""

import platform

import pytest
import tvm

from tvm_compress.errors import TargetError
from tvm_compress.rpc.cross_compile import cross_compile, export_fcompile
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


def test_a_missing_compiler_is_named_with_its_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    other = "aarch64" if platform.machine() != "aarch64" else "x86_64"
    with pytest.raises(TargetError, match="sudo apt-get install gcc-"):
        export_fcompile(f"{other}-linux-gnu")


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
