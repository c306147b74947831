"""Reads an aarch64 shared library for the cost estimate: its code, and which kernel each part is of."""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tvm_compress.rpc.device import DeviceFailedError

#: The kernel that code belongs to which is of none: start-up, type conversions, error messages.
NO_KERNEL = "other"

_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_MACHINE_AARCH64, _LOAD, _EXECUTABLE, _SYMBOL_TABLE, _FUNCTION = 183, 1, 1, 2, 2
_TIR_PREFIX = "__tvm_ffi_"


@dataclass(frozen=True)
class Code:
    """The code of a library.

    Parameters
    ----------
    start
        Address of the first instruction, relative to where the library is loaded.
    words
        uint32 [number of instructions]; what stands between functions is in it too.
    owners
        By ascending start address, the name of the kernel that the code from there on is of.
    """

    start: int
    words: np.ndarray
    owners: tuple[tuple[int, str], ...]

    def owner(self, address: int) -> str:
        """Name of the kernel that an instruction is of."""
        index = bisect_right(self.owners, address, key=lambda item: item[0]) - 1
        return self.owners[index][1] if index >= 0 else NO_KERNEL


@dataclass(frozen=True)
class _Symbol:
    name: str
    start: int
    end: int


def read_code(path: Path) -> Code:
    """Read a library's executable segment and attribute its code to kernels.

    A kernel NAME is the exported function `__tvm_ffi_NAME`; it also owns `NAME_compute_` and what has no
    symbol of its own but whose address one of the two takes: the bodies of its parallel loops.

    Raises
    ------
    DeviceFailedError
        Of kind "build": not a 64-bit little-endian aarch64 library.
    """
    data = path.read_bytes()
    try:
        return _read_code(data)
    except (struct.error, ValueError, IndexError, OverflowError) as error:
        raise DeviceFailedError("build", f"{path} is not an aarch64 library: {error}.") from None


def _read_code(data: bytes) -> Code:
    header = _ELF_HEADER.unpack_from(data)
    if header[0][:6] != b"\x7fELF\x02\x01" or header[2] != _MACHINE_AARCH64:
        raise ValueError("its ELF header says otherwise")
    segments = [_PROGRAM_HEADER.unpack_from(data, header[5] + i * header[9]) for i in range(header[10])]
    executable = [s for s in segments if s[0] == _LOAD and s[1] & _EXECUTABLE]
    if len(executable) != 1:
        raise ValueError(f"it has {len(executable)} executable segments instead of 1")
    _, _, offset, start, _, size, _, _ = executable[0]
    words = np.frombuffer(data, "<u4", size // 4, offset)
    symbols = _functions(data, header)
    return Code(start, words, _owners(words, start, symbols))


def _functions(data: bytes, header: tuple) -> list[_Symbol]:
    """All functions of the symbol table, by address."""
    sections = [_SECTION_HEADER.unpack_from(data, header[6] + i * header[11]) for i in range(header[12])]
    symbols = []
    for section in sections:
        if section[1] != _SYMBOL_TABLE:
            continue
        names = sections[section[6]][4]
        for at in range(section[4], section[4] + section[5], _SYMBOL.size):
            name, info, _, index, value, size = _SYMBOL.unpack_from(data, at)
            if info & 15 == _FUNCTION and index and size:
                text = data[names + name : data.index(b"\0", names + name)].decode()
                symbols.append(_Symbol(text, value, value + size))
    return sorted(symbols, key=lambda s: (s.start, s.name))


def _owners(words: np.ndarray, start: int, symbols: list[_Symbol]) -> tuple[tuple[int, str], ...]:
    kernels = {s.name.removeprefix(_TIR_PREFIX) for s in symbols if s.name.startswith(_TIR_PREFIX)}
    owners: dict[int, str] = {}
    for symbol in symbols:
        # What follows a function without a symbol of its own is of nobody, until a reference says otherwise.
        owners.setdefault(symbol.end, NO_KERNEL)
        owners[symbol.start] = _kernel_of(symbol.name, kernels)
    named = [(s.start, s.end) for s in symbols]
    for symbol in symbols:
        kernel = owners[symbol.start]
        if kernel == NO_KERNEL:
            continue
        first, last = (symbol.start - start) // 4, (symbol.end - start) // 4
        for target in _addresses_taken(words[first:last], symbol.start):
            outside = all(not low <= target < high for low, high in named)
            if outside and 0 <= target - start < 4 * len(words):
                owners[target] = kernel
    return tuple(sorted(owners.items()))


def _kernel_of(symbol: str, kernels: set[str]) -> str:
    name = re.sub(r"_compute_(\.\d+)?$", "", symbol.removeprefix(_TIR_PREFIX))
    return name if name in kernels else NO_KERNEL


def _addresses_taken(words: np.ndarray, start: int) -> list[int]:
    """Addresses that code makes by ADR, or by ADRP and ADD with an immediate."""
    pages: dict[int, int] = {}
    targets = []
    for index, word in enumerate(words.tolist()):
        if word & 0x1F000000 == 0x10000000:  # ADR, ADRP: 21-bit signed immediate in two parts
            immediate = (word >> 3 & 0x1FFFFC) | (word >> 29 & 3)
            immediate -= (immediate & 1 << 20) << 1
            address = start + 4 * index
            if word >> 31:
                pages[word & 31] = (address & ~0xFFF) + (immediate << 12)
            else:
                targets.append(address + immediate)
        elif word & 0xFFC00000 == 0x91000000:  # ADD Xd, Xn, #immediate
            page = pages.get(word >> 5 & 31)
            if page is not None:
                targets.append(page + (word >> 10 & 0xFFF))
    return targets
