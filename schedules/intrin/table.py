"""Lookups of bytes in a table of 256 bytes, many at once: `tbl` on Arm, `vpshufb` on x86."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script import tirx as T

# Bytes of a table that one register, or one lane of it, holds.
PART = 16


@dataclass(frozen=True)
class ByteTable:
    """A way to look up vectors of bytes.

    Attributes
    ----------
    lanes
        Bytes of a vector.
    prepare
        Makes of the 256 values, int8 or uint8 by byte, the uint8 array whose head they are and that
        `look_up` reads.
    look_up
        Function of (buffer of what `prepare` made, uint8 vector of `lanes`) that gives their values, uint8.
    """

    lanes: int
    prepare: Callable[[np.ndarray], np.ndarray]
    look_up: Callable[[Any, Any], Any]


def byte_table_for(isa: str) -> ByteTable | None:
    """Return the lookup of an instruction set (TargetRules.isa); None where it has none (SSE2)."""
    if isa.startswith("avx"):
        return ByteTable(32, _with_differences, _look_up_avx2)
    if isa == "x86":
        return None
    return ByteTable(16, lambda values: values.view(np.uint8), _look_up_neon)


def _llvm(name: str, dtype: str, *args: Any) -> Any:
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *args, dtype=dtype)


def _look_up_neon(table: Any, index: Any) -> Any:
    """Look up four registers at a time: an index beyond them gives 0 (tbl) or keeps what was found (tbx)."""
    found: Any = None
    for first in range(0, 256, 4 * PART):
        parts = [table.vload([first + PART * k], "uint8x16") for k in range(4)]
        place = index - T.broadcast(T.uint8(first), 16) if first else index
        if found is None:
            found = _llvm("llvm.aarch64.neon.tbl4.v16i8", "uint8x16", *parts, place)
        else:
            found = _llvm("llvm.aarch64.neon.tbx4.v16i8", "uint8x16", found, *parts, place)
    return found


def _with_differences(values: np.ndarray) -> np.ndarray:
    """Append how each 16 values differ (xor) from the 16 before them; 0 and 128 begin anew."""
    parts = values.view(np.uint8).reshape(2, 8, PART)
    differences = parts.copy()
    differences[:, 1:] ^= parts[:, :-1]
    return np.concatenate([parts.ravel(), differences.ravel()])


def _look_up_avx2(table: Any, index: Any) -> Any:
    """Look up in each 16 values' differences, and combine those up to the index.

    `vpshufb` gives 0 where the index is negative, which it is once 16 too many were taken from it. So that
    it is not before, bit 7 is left out: both halves of the table are looked up, and bit 7 selects one.
    """
    low = T.reinterpret(index & T.broadcast(T.uint8(127), 32), dtype="int8x32")
    halves: list[Any] = [None, None]
    for step in range(8):
        place = low - T.broadcast(T.int8(PART * step), 32) if step else low
        for half in range(2):
            part = table.vload([256 + 128 * half + PART * step], "uint8x16")
            both = T.Shuffle([part, part], list(range(2 * PART)))
            found = _llvm("llvm.x86.avx2.pshuf.b", "uint8x32", both, place)
            halves[half] = found if step == 0 else halves[half] ^ found
    return _llvm("llvm.x86.avx2.pblendvb", "uint8x32", *halves, index)
