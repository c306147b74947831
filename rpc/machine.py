"""Processors by the names that errors use, from libraries and from triples; standard library only."""

import platform
import struct
from pathlib import Path

#: By `e_machine` of an ELF header.
_ELF_MACHINES = {3: "x86", 8: "mips", 21: "ppc64", 40: "arm", 62: "x86-64", 183: "aarch64", 243: "riscv64"}
_NAMES = {"x86_64": "x86-64", "amd64": "x86-64", "arm64": "aarch64"}


def elf_machine(path: str | Path) -> str:
    """Processor that an ELF file was built for, or "" where the file is none or cannot be read."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(20)
    except OSError:
        return ""
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return ""
    (number,) = struct.unpack_from("<H" if head[5] == 1 else ">H", head, 18)
    return _ELF_MACHINES.get(number, f"ELF machine {number}")


def own_machine() -> str:
    """Processor that this very program was built for: a 64-bit kernel may run a 32-bit system."""
    return elf_machine("/proc/self/exe") or machine_of_triple(platform.machine())


def machine_of_triple(triple: str) -> str:
    """Processor of a triple such as "aarch64-unknown-linux-gnu"."""
    name = triple.split("-")[0].lower()
    if name.startswith(("arm", "thumb")) and name != "arm64":
        return "arm"
    return _NAMES.get(name, name)
