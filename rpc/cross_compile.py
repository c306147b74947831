"""Compiling and linking for another processor, or saying what to install where that cannot be."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tvm.support import cc

from tvm_compress.errors import TargetError

#: By the processor of a triple: GNU's C compiler for it, and the Debian package that has it.
_GNU_COMPILERS = {
    "aarch64": ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
    "x86_64": ("x86_64-linux-gnu-gcc", "gcc-x86-64-linux-gnu"),
}
_ALIASES = {"arm64": "aarch64", "amd64": "x86_64"}
#: Of the C library that Zig links with: what TVM's own wheels ask for.
_GLIBC = "2.28"
#: How to get Zig, the compiler of all processors that needs no root.
ZIG_HINT = "`pip install 'tvm_compress[cross]'`"
#: Seconds; Zig makes its C library when it is first used for a processor.
_LINK_LIMIT_S = 300.0


def c_compiler(processor: str = "") -> tuple[str, ...] | None:
    """Command of a C compiler for a processor, "" for this machine: GNU's if it is installed, else Zig's.

    None where there is neither.
    """
    name = _GNU_COMPILERS[processor][0] if processor else "gcc"
    path = shutil.which(name)
    if path is not None:
        return (path,)
    if importlib.util.find_spec("ziglang") is None:
        return None
    target = ("-target", f"{processor}-linux-gnu.{_GLIBC}") if processor else ()
    return (sys.executable, "-m", "ziglang", "cc", *target)


def export_fcompile(target_triple: str) -> Callable[..., None] | None:
    """Give what `export_library(path, fcompile=...)` takes, to link for a target.

    Parameters
    ----------
    target_triple
        An LLVM triple such as "aarch64-linux-gnu"; "" is this machine.

    Returns
    -------
    None for this machine itself if TVM finds a compiler, else a function of (output, objects, options).

    Raises
    ------
    TargetError
        No compiler for that processor is known, or none is installed: the message names both ways to get one.
    """
    processor = _processor(target_triple.split("-")[0])
    if not target_triple or processor == _processor(platform.machine()):
        if cc.get_cc() is not None:
            return None
        processor, package = "", "gcc"
    elif processor in _GNU_COMPILERS:
        package = _GNU_COMPILERS[processor][1]
    else:
        raise TargetError(
            f"No linker for {target_triple!r} is known.", f"Known: {', '.join(_GNU_COMPILERS)}."
        )
    command = c_compiler(processor)
    if command is None:
        raise TargetError(
            f"Linking for {target_triple or 'this machine'} needs a C compiler, and none is installed.",
            f"Install one by `sudo apt-get install {package}`, or by {ZIG_HINT}.",
        )
    return cross_compile(*command)


def cross_compile(*compiler: str) -> Callable[..., None]:
    """Make a function that links objects to a shared library with a C compiler, given as its command's words.

    Its parameters are (output, objects, options=None), as `export_library` calls it; it raises TargetError
    where the compiler fails, and leaves nothing half-written.
    """
    name = Path(compiler[0]).name if len(compiler) == 1 else "Zig"

    def link(
        output: str | Path, objects: str | Sequence[str], options: Sequence[str] | None = None, **_: object
    ) -> None:
        inputs = [objects] if isinstance(objects, str) else list(objects)
        part = Path(f"{output}.part")
        command = [*compiler, "-shared", "-fPIC", "-o", str(part), *inputs, *(options or []), "-lm"]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=_LINK_LIMIT_S,
                check=False,
                stdin=subprocess.DEVNULL,
            )
            if done.returncode != 0:
                raise TargetError(f"{name} cannot link {output}: {done.stderr.strip()[-500:]}")
            part.replace(output)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise TargetError(f"{name} cannot link {output}: {error}.") from None
        finally:
            part.unlink(missing_ok=True)

    # export_library asks for these: the ending of what is linked.
    link.output_format = "so"  # type: ignore[attr-defined]
    return link


def _processor(name: str) -> str:
    return _ALIASES.get(name.lower(), name.lower())
