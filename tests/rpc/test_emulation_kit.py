"""What is missing is named with its package, and a first use by several processes makes one kit."""

import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tvm_compress.errors import DeviceError
from tvm_compress.rpc import emulation_kit
from tvm_compress.rpc.device import MeasurementSettings, open_device
from tvm_compress.rpc.emulated_a72 import EmulatedSession
from tvm_compress.rpc.emulation_kit import prepare


@pytest.fixture
def without_zig(monkeypatch):
    monkeypatch.setitem(sys.modules, "ziglang", None)


def only(folder, monkeypatch, *names):
    """Leave these commands alone on the path."""
    for name in names:
        (folder / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(folder))


def test_everything_is_there():
    kit = prepare()
    assert kit.worker.is_file()
    assert kit.plugin.is_file()
    assert (kit.runtime / "libtvm_runtime.so").is_file()
    assert prepare() == kit


@pytest.mark.parametrize(
    ("command", "package"),
    [
        ("qemu-aarch64", "qemu-user"),
        ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
        ("llvm-mca-19", "llvm-19"),
    ],
)
def test_a_missing_command_is_named_with_its_package(monkeypatch, tmp_path, without_zig, command, package):
    needed = {*emulation_kit._COMMANDS, "gcc", "aarch64-linux-gnu-gcc"}
    only(tmp_path, monkeypatch, *(needed - {command}))
    with pytest.raises(DeviceError, match=f"sudo apt-get install {package}"):
        open_device("emulated-a72").open()


def test_all_missing_packages_are_named_at_once(monkeypatch, tmp_path, without_zig):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(emulation_kit, "SYSROOT", tmp_path)
    with pytest.raises(DeviceError) as caught:
        prepare()
    wanted = {"qemu-user", "gcc-aarch64-linux-gnu", "llvm-19", "libc6-arm64-cross", "libstdc++6-arm64-cross"}
    assert wanted <= set(caught.value.hint.replace("`", " ").split())
    assert "pip install 'tvm_compress[cross]'" in caught.value.hint


def test_zig_compiles_the_parts_where_gcc_is_missing(monkeypatch, tmp_path, build):
    library, inputs = (
        build("layers", "emulated-a72"),
        [np.ones((2, 8), "float32"), np.ones((8, 4), "float32")],
    )
    kit = prepare()
    with EmulatedSession(MeasurementSettings(), kit) as session:
        expected = session.time(library, inputs)
    cache = tmp_path / "cache" / "emulated-a72"
    shutil.copytree(kit.runtime.parent, cache / kit.runtime.parent.name)
    commands = tmp_path / "commands"
    commands.mkdir()
    only(commands, monkeypatch, *emulation_kit._COMMANDS)
    monkeypatch.setattr(emulation_kit.platformdirs, "user_cache_path", lambda _: cache.parent)
    other = prepare()
    assert other.worker.is_relative_to(cache)
    with EmulatedSession(MeasurementSettings(), other) as session:
        np.testing.assert_array_equal(session.run(library, inputs)[0], np.full((2, 4), 8, "float32"))
        assert session.time(library, inputs) == expected
    assert expected.error is None


def test_processes_that_start_together_compile_once(tmp_path):
    # What was downloaded is taken over; what is compiled is made anew, by three at once.
    kit = prepare()
    cache = tmp_path / "tvm_compress" / "emulated-a72"
    shutil.copytree(kit.runtime.parent, cache / kit.runtime.parent.name)
    program = "from tvm_compress.rpc.emulation_kit import prepare; print(prepare().worker)"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(3)
    ]
    answers = {process.communicate(timeout=100)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert answers == {f"{cache / kit.worker.parent.name / 'rpc_worker'}\n"}
    assert not list(cache.glob(".native-*"))


def test_what_fails_leaves_nothing_and_can_be_tried_again(tmp_path):
    def fail(directory):
        (directory / "half").write_text("")
        raise DeviceError("no")

    with pytest.raises(DeviceError, match="no"):
        emulation_kit._once(tmp_path, "part", fail)
    assert [path.name for path in tmp_path.iterdir() if path.name != "part.lock"] == []
    made = emulation_kit._once(tmp_path, "part", lambda directory: (directory / "whole").touch())
    assert [path.name for path in made.iterdir()] == ["whole"]


def test_threads_that_start_together_make_it_once(tmp_path):
    calls: list[Path] = []
    threads = [
        threading.Thread(target=emulation_kit._once, args=(tmp_path, "part", calls.append)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_only_what_is_needed_leaves_a_wheel(tmp_path):
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("tvm/lib/libtvm_runtime.so", "tvm/lib/libtvm_compiler.so", "tvm_ffi/include/a/b.h"):
            archive.writestr(name, name)
        archive.writestr("tvm_ffi/include/../../escape.h", "no")
    emulation_kit._unpack(wheel, tmp_path / "out")
    files = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert files == ["include/a/b.h", "lib/libtvm_runtime.so"]
    assert not (tmp_path / "escape.h").exists()
