"""The parts of the emulated Cortex-A72: checked, fetched and compiled on first use, kept in a cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock
import platformdirs

from tvm_compress.errors import DeviceError
from tvm_compress.rpc.cross_compile import ZIG_HINT, c_compiler

SYSROOT = Path("/usr/aarch64-linux-gnu")
#: What has to be there, by the Debian package that has it: commands, and files of the emulated system.
_COMMANDS = {
    "qemu-aarch64": "qemu-user",
    "llvm-mc-19": "llvm-19",
    "llvm-mca-19": "llvm-19",
}
#: The same of the C compilers, by processor, "" for this machine; Zig stands in for them.
_COMPILERS = {"aarch64": "gcc-aarch64-linux-gnu", "": "gcc libc6-dev"}
_SYSTEM_FILES = {
    "lib/libc.so.6": "libc6-arm64-cross",
    "lib/libstdc++.so.6": "libstdc++6-arm64-cross",
    "lib/libgcc_s.so.1": "libgcc-s1-arm64-cross",
}
_WHEELS = ("apache-tvm", "apache-tvm-ffi")
_RUNTIME_LIBRARIES = ("libtvm_ffi.so", "libtvm_runtime.so", "libtvm_runtime_extra.so")
_INCLUDE_PREFIX = "tvm_ffi/include/"
_NATIVE = Path(__file__).with_name("native")
_WORKER_SOURCES = (_NATIVE / "rpc_worker.c", _NATIVE / "data_memory.c")
_COMPILE_FLAGS = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror")
_DOWNLOAD_LIMIT_S = 900.0
_LOCK_LIMIT_S = 1200.0
_TOOL_LIMIT_S = 120.0
_COMPILE_LIMIT_S = 300.0


@dataclass(frozen=True)
class EmulationKit:
    """Where everything is.

    Parameters
    ----------
    qemu, mc, mca
        Paths of the emulator, of `llvm-mc` and of `llvm-mca`.
    runtime
        Directory of TVM's aarch64 runtime libraries.
    worker
        The RPC worker, an aarch64 program.
    plugin
        The counting plugin, a library for the emulator on this machine.
    cache
        Directory of all that is kept.
    qemu_version
        Such as "7.2.22".
    """

    qemu: str
    mc: str
    mca: str
    runtime: Path
    worker: Path
    plugin: Path
    cache: Path
    qemu_version: str


def prepare() -> EmulationKit:
    """Check, fetch and compile whatever is missing; the first use takes some seconds and downloads 98 MB.

    Several processes may call it at the same time.

    Raises
    ------
    DeviceError
        Something is missing that this cannot get; the hint is the command that installs it.
    """
    tools = _check_system()
    cache = platformdirs.user_cache_path("tvm_compress") / "emulated-a72"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        version = _qemu_version(tools.paths["qemu-aarch64"])
        runtime = _device_runtime(cache)
        native = _native_parts(cache, runtime, tools, version)
    except OSError as error:
        raise DeviceError(f"The emulated Cortex-A72 cannot be set up in {cache}: {error}.") from None
    return EmulationKit(
        qemu=tools.paths["qemu-aarch64"],
        mc=tools.paths["llvm-mc-19"],
        mca=tools.paths["llvm-mca-19"],
        runtime=runtime / "lib",
        worker=native / "rpc_worker",
        plugin=native / "counting_plugin.so",
        cache=cache,
        qemu_version=version,
    )


@dataclass(frozen=True)
class _Tools:
    """Paths of the commands by name, and the C compilers' commands by processor."""

    paths: dict[str, str]
    compilers: dict[str, tuple[str, ...]]


def _check_system() -> _Tools:
    """Find the tools; raises DeviceError naming every missing package at once."""
    found = {name: shutil.which(name) for name in _COMMANDS}
    compilers = {processor: c_compiler(processor) for processor in _COMPILERS}
    missing = [_COMMANDS[name] for name, path in found.items() if path is None]
    missing += [package for file, package in _SYSTEM_FILES.items() if not (SYSROOT / file).exists()]
    no_compiler = [_COMPILERS[processor] for processor, command in compilers.items() if command is None]
    if missing or no_compiler:
        packages = " ".join(dict.fromkeys(missing + no_compiler))
        instead = f" In place of {' '.join(no_compiler)}, {ZIG_HINT} will do." if no_compiler else ""
        raise DeviceError(
            f"The emulated Cortex-A72 needs what is not installed: {packages}.",
            f"Install it by `sudo apt-get install {packages}`.{instead}",
        )
    return _Tools(
        {name: path for name, path in found.items() if path is not None},
        {processor: command for processor, command in compilers.items() if command is not None},
    )


def _qemu_version(qemu: str) -> str:
    match = re.search(r"version (\d+(\.\d+)*)", _run([qemu, "--version"], _TOOL_LIMIT_S))
    if match is None:
        raise DeviceError(f"{qemu} does not say its version.")
    return match.group(1)


def _device_runtime(cache: Path) -> Path:
    """Directory with `lib/` and `include/` from the aarch64 wheels of the installed versions of TVM."""
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in _WHEELS]

    def fetch(directory: Path) -> None:
        wheels = directory / "wheels"
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        _run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
                *("--no-deps", "--only-binary=:all:", "--platform", "manylinux_2_28_aarch64"),
                *("--python-version", python, "--dest", str(wheels), *pins),
            ],
            _DOWNLOAD_LIMIT_S,
        )
        for wheel in sorted(wheels.glob("*.whl")):
            _unpack(wheel, directory)
        shutil.rmtree(wheels)
        absent = [name for name in _RUNTIME_LIBRARIES if not (directory / "lib" / name).is_file()]
        if absent:
            raise DeviceError(f"The aarch64 wheels of {', '.join(pins)} lack {', '.join(absent)}.")

    return _once(cache, "runtime-" + "-".join(pin.split("==")[1] for pin in pins), fetch)


def _unpack(wheel: Path, directory: Path) -> None:
    """Take the runtime libraries and the C headers out of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = entry.filename
            if name.rsplit("/", 1)[-1] in _RUNTIME_LIBRARIES:
                target = directory / "lib" / name.rsplit("/", 1)[-1]
            elif name.startswith(_INCLUDE_PREFIX) and name.endswith(".h") and ".." not in name:
                target = directory / "include" / name.removeprefix(_INCLUDE_PREFIX)
            else:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)


def _native_parts(cache: Path, runtime: Path, tools: _Tools, qemu_version: str) -> Path:
    """Directory with the worker and the plugin, compiled from `native/`."""
    # QEMU 9 dropped version 1 of its plugins' interface.
    interface = 2 if int(qemu_version.split(".")[0]) >= 9 else 1
    sources = sorted(path for path in _NATIVE.iterdir() if path.suffix in (".c", ".h"))
    compilers = sorted(tools.compilers.items())
    digest = hashlib.sha256(repr((_COMPILE_FLAGS, interface, runtime.name, compilers)).encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")

    def compile_parts(directory: Path) -> None:
        libraries = [f"-l{Path(name).stem.removeprefix('lib')}" for name in _RUNTIME_LIBRARIES]
        _run(
            [
                *(*tools.compilers["aarch64"], *_COMPILE_FLAGS, "-isystem", str(runtime / "include")),
                *("-o", str(directory / "rpc_worker"), *map(str, _WORKER_SOURCES)),
                *(f"-L{runtime / 'lib'}", "-Wl,--no-as-needed", *libraries),
            ],
            _COMPILE_LIMIT_S,
        )
        _run(
            [
                *(*tools.compilers[""], *_COMPILE_FLAGS, f"-DPLUGIN_VERSION={interface}", "-shared", "-fPIC"),
                *("-o", str(directory / "counting_plugin.so"), str(_NATIVE / "counting_plugin.c")),
            ],
            _COMPILE_LIMIT_S,
        )

    return _once(cache, f"native-{digest.hexdigest()[:16]}", compile_parts)


def _once(cache: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Give the directory `name`, made by `make` where it is not there; nobody sees it half-made."""
    final = cache / name
    if final.is_dir():
        return final
    try:
        with filelock.FileLock(cache / f"{name}.lock", timeout=_LOCK_LIMIT_S):
            if not final.is_dir():
                with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as part:
                    made = Path(part) / name
                    made.mkdir()
                    make(made)
                    os.replace(made, final)
    except filelock.Timeout:
        raise DeviceError(
            f"Another process has been setting up {final} for too long.",
            f"If none does, delete {final}.lock.",
        ) from None
    return final


def _run(command: Sequence[str], limit: float) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise DeviceError(f"`{' '.join(command[:4])} ...` did not finish within {limit:g} s.") from None
    if done.returncode != 0:
        raise DeviceError(f"`{' '.join(command[:4])} ...` failed: {done.stderr.strip()[-500:]}")
    return done.stdout
