"""Linking libraries for another processor, or saying what to install where that cannot be."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from tvm_compress.errors import TargetError

#: By the processor of a triple: the C compiler that links for it, and the Debian package that has it.
_LINKERS = {
    "aarch64": ("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu"),
    "x86_64": ("x86_64-linux-gnu-gcc", "gcc-x86-64-linux-gnu"),
}
_ALIASES = {"arm64": "aarch64", "amd64": "x86_64"}
_LINK_LIMIT_S = 300.0


def export_fcompile(target_triple: str) -> Callable[..., None] | None:
    """Give what `export_library(path, fcompile=...)` takes, to link for a target.

    Parameters
    ----------
    target_triple
        An LLVM triple such as "aarch64-linux-gnu"; "" is this machine.

    Returns
    -------
    None for this machine itself (TVM chooses a compiler), else a function of (output, objects, options).

    Raises
    ------
    TargetError
        No compiler for that processor is known, or it is not installed: the message names the package.
    """
    processor = _processor(target_triple.split("-")[0])
    if not target_triple or processor == _processor(platform.machine()):
        return None
    if processor not in _LINKERS:
        raise TargetError(f"No linker for {target_triple!r} is known.", f"Known: {', '.join(_LINKERS)}.")
    name, package = _LINKERS[processor]
    path = shutil.which(name)
    if path is None:
        raise TargetError(
            f"Linking for {target_triple} needs `{name}`, which is not installed.",
            f"Install it by `sudo apt-get install {package}`.",
        )
    return cross_compile(path)


def cross_compile(compiler: str) -> Callable[..., None]:
    """Make a function that links objects to a shared library with a given C compiler.

    Its parameters are (output, objects, options=None), as `export_library` calls it; it raises TargetError
    where the compiler fails, and leaves nothing half-written.
    """

    def link(
        output: str | Path, objects: str | Sequence[str], options: Sequence[str] | None = None, **_: object
    ) -> None:
        inputs = [objects] if isinstance(objects, str) else list(objects)
        part = Path(f"{output}.part")
        command = [compiler, "-shared", "-fPIC", "-o", str(part), *inputs, *(options or []), "-lm"]
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
                raise TargetError(f"{compiler} cannot link {output}: {done.stderr.strip()[-500:]}")
            part.replace(output)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise TargetError(f"{compiler} cannot link {output}: {error}.") from None
        finally:
            part.unlink(missing_ok=True)

    # export_library asks for these: the ending of what is linked.
    link.output_format = "so"  # type: ignore[attr-defined]
    return link


def _processor(name: str) -> str:
    return _ALIASES.get(name.lower(), name.lower())
