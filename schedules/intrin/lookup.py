"""Table lookups on Arm: sums of four activations by the bits of four weights, built, looked up and added."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

# Channels of a table. Its entries, the sums of any of their activations, fill a register of 16 bytes.
GROUP = 4
ENTRIES = 2**GROUP

# Input channels of a step: two tables, two 4-bit indices to a byte of weights.
STEP = 2 * GROUP

# Output channels of a vector of 16-bit sums.
LANES = 8


@dataclass(frozen=True)
class Lookup:
    """Two tensor intrinsics: tables of two groups of channels, and the sum of one entry of each.

    `build`: `T[half, e] = +-sum(A[4 half + k] if bit k of e else cleared(A[4 half + k]))`;
    `add`: `C[lane] += T[0, low 4 bits of W[lane]] +- T[1, high 4 bits of W[lane]]` in uint16.

    Attributes
    ----------
    largest
        Activations lie in [0, largest], 2**n - 1.
    complement
        Whether a cleared bit counts as `largest - a` (weights -1 and +1), else as 0.
    """

    largest: int
    complement: bool

    @property
    def subtracts(self) -> bool:
        """Whether the second table holds negative sums, as one instruction adds |T[0] - T[1]| then.

        That needs both within int8.
        """
        return GROUP * self.largest <= 127

    @property
    def dtype(self) -> str:
        """Type of the tables."""
        return "int8" if self.subtracts else "uint8"

    @property
    def build(self) -> str:
        """Name of the intrinsic that builds tables."""
        return f"tvm_compress.lookup_build_{self.largest}{'_complement' * self.complement}"

    @property
    def add(self) -> str:
        """Name of the intrinsic that looks up and adds."""
        return f"tvm_compress.lookup_add_{self.dtype}"


@cache
def register_lookup(lookup: Lookup) -> None:
    """Make the intrinsics known to `Schedule.tensorize`; any further call does nothing."""
    TensorIntrin.register(lookup.build, *_build(lookup), override=True)
    TensorIntrin.register(lookup.add, *_add(lookup), override=True)


def entry(lookup: Lookup, values: list[Any], half: Any, index: Any) -> Any:
    """Return `T[half, index]`, the four uint8 `values` being those of that half."""
    total: Any = None
    for place, value in enumerate(values):
        cleared = value ^ T.uint8(lookup.largest) if lookup.complement else T.uint8(0)
        term = T.Select((T.shift_right(index, place) & 1) == 1, value, cleared)
        total = term if total is None else total + term
    if not lookup.subtracts:
        return total
    return T.Cast("int8", T.Select(half == 1, T.uint8(0) - total, total))


def looked_up(lookup: Lookup, weight: Any, tables: tuple[Any, Any], index: Any) -> Any:
    """Return what entry `index` of both tables adds to a sum: the lookup as a sum over all entries."""
    zero = T.Cast(lookup.dtype, T.int32(0))
    place = T.Cast("uint8", index)
    first = T.Select((weight & T.uint8(15)) == place, tables[0], zero)
    second = T.Select(T.shift_right(weight, T.uint8(4)) == place, tables[1], zero)
    if lookup.subtracts:
        return T.Cast("uint16", T.Cast("int16", first) - T.Cast("int16", second))
    return T.Cast("uint16", first) + T.Cast("uint16", second)


def _llvm(name: str, dtype: str, *args: Any) -> Any:
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *args, dtype=dtype)


def _bytes(values: Sequence[int]) -> Any:
    """Return a constant vector of 8 bytes."""
    if not any(values):
        return T.broadcast(T.int8(0), 8)  # reinterpreting takes zeros for a null pointer
    return T.reinterpret(T.int64(int.from_bytes(bytes(values), "little", signed=True)), dtype="int8x8")


def _twice(values: Any) -> Any:
    """Return 8 bytes, uint64, twice in a register of 16."""
    return T.reinterpret(T.broadcast(values, 2), dtype="int8x16")


def _table(table: Any, index: Any) -> Any:
    """Look up 8 bytes in a register of 16."""
    return _llvm("llvm.aarch64.neon.tbl1.v8i8", "int8x8", table, index)


def _pairs(lookup: Lookup, values: Any) -> Any:
    """Sum pairs of neighbours of 8 activations, uint64: with both bits set, none, the first, the second.

    The sums are those of the pairs 0 to 3 each, pairs 2 and 3 negative if the second table is.
    """
    # What a bit that is cleared makes of a byte: `a ^ largest`, which is `largest - a`, or `a & 0`.
    keep, clear = (0, lookup.largest) if lookup.complement else (255, 0)
    both, none = _bytes([keep] * 8), _bytes([clear] * 8)
    first, second = _bytes([keep, clear] * 4), _bytes([clear, keep] * 4)
    sides = []
    for masks in ((both, none), (first, second)):
        mask = T.Shuffle(list(masks), list(range(16)))
        sides.append(_twice(values) ^ mask if lookup.complement else _twice(values) & mask)
    sums = _llvm("llvm.aarch64.neon.addp.v16i8", "int8x16", *sides)
    if not lookup.subtracts:
        return sums
    sign = T.Shuffle([_bytes([0, 0, 255, 255] * 2)] * 2, list(range(16)))
    return (sums ^ sign) - sign


# Where `_pairs` has the sum of pair 0 for the bits 00, 01, 10, 11 of an entry's number.
_BY_BITS = (4, 8, 12, 0)


def _entries(pairs: Any, half: int, first: int, dtype: str) -> Any:
    """Return 8 entries of a table: sums of its first pair by bits 0 and 1, of its second by bits 2 and 3."""
    numbers = range(first, first + 8)
    low = [_BY_BITS[number & 3] + 2 * half for number in numbers]
    high = [_BY_BITS[number >> 2] + 2 * half + 1 for number in numbers]
    return T.reinterpret(_table(pairs, _bytes(low)) + _table(pairs, _bytes(high)), dtype=f"{dtype}x8")


def _build(lookup: Lookup) -> tuple[PrimFunc, PrimFunc]:
    """Sum all choices of each pair of activations (addp), then each entry from two of them (tbl)."""
    dtype = lookup.dtype

    @T.prim_func(s_tir=True)
    def desc(a: T.handle, t: T.handle) -> None:
        A = T.match_buffer(a, (8,), "uint8", offset_factor=1)
        D = T.match_buffer(t, (2, 16), dtype, offset_factor=1)
        with T.sblock("root"):
            T.reads(A[0:8])
            T.writes(D[0:2, 0:16])
            for h, e in T.grid(2, 16):
                with T.sblock("entry"):
                    vh, ve = T.axis.remap("SS", [h, e])
                    T.reads(A[vh * 4 : vh * 4 + 4])
                    T.writes(D[vh, ve])
                    D[vh, ve] = entry(
                        lookup, [A[vh * 4], A[vh * 4 + 1], A[vh * 4 + 2], A[vh * 4 + 3]], vh, ve
                    )

    @T.prim_func(s_tir=True)
    def impl(a: T.handle, t: T.handle) -> None:
        A = T.match_buffer(a, (8,), "uint8", offset_factor=1)
        D = T.match_buffer(t, (2, 16), dtype, offset_factor=1)
        with T.sblock("root"):
            T.reads(A[0:8])
            T.writes(D[0:2, 0:16])
            pairs = _pairs(lookup, T.reinterpret(A.vload([0], "uint8x8"), dtype="uint64"))
            D[0, T.ramp(T.int32(0), 1, 8)] = _entries(pairs, 0, 0, dtype)
            D[0, T.ramp(T.int32(8), 1, 8)] = _entries(pairs, 0, 8, dtype)
            D[1, T.ramp(T.int32(0), 1, 8)] = _entries(pairs, 1, 0, dtype)
            D[1, T.ramp(T.int32(8), 1, 8)] = _entries(pairs, 1, 8, dtype)

    return desc, impl


def _add(lookup: Lookup) -> tuple[PrimFunc, PrimFunc]:
    """Look up both tables and add: tbl twice, then sabal, or uaddl and add."""
    dtype = lookup.dtype

    @T.prim_func(s_tir=True)
    def desc(t: T.handle, w: T.handle, c: T.handle) -> None:
        D = T.match_buffer(t, (2, 16), dtype, offset_factor=1)
        W = T.match_buffer(w, (8,), "uint8", offset_factor=1)
        C = T.match_buffer(c, (8,), "uint16", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:8], W[0:8], D[0:2, 0:16])
            T.writes(C[0:8])
            for i, j in T.grid(8, 16):
                with T.sblock("update"):
                    vi, vj = T.axis.remap("SR", [i, j])
                    C[vi] = C[vi] + looked_up(lookup, W[vi], (D[0, vj], D[1, vj]), vj)

    @T.prim_func(s_tir=True)
    def impl(t: T.handle, w: T.handle, c: T.handle) -> None:
        D = T.match_buffer(t, (2, 16), dtype, offset_factor=1)
        W = T.match_buffer(w, (8,), "uint8", offset_factor=1)
        C = T.match_buffer(c, (8,), "uint16", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:8], W[0:8], D[0:2, 0:16])
            T.writes(C[0:8])
            C[T.ramp(T.int32(0), 1, 8)] = _added(
                lookup,
                C.vload([0], "uint16x8"),
                T.reinterpret(D.vload([0, 0], f"{dtype}x16"), dtype="int8x16"),
                T.reinterpret(D.vload([1, 0], f"{dtype}x16"), dtype="int8x16"),
                W.vload([0], "uint8x8"),
            )

    return desc, impl


def _added(lookup: Lookup, sums: Any, first: Any, second: Any, weights: Any) -> Any:
    low = T.reinterpret(weights & T.broadcast(T.uint8(15), 8), dtype="int8x8")
    high = T.reinterpret(T.shift_right(weights, T.broadcast(T.uint8(4), 8)), dtype="int8x8")
    one, other = _table(first, low), _table(second, high)
    if lookup.subtracts:
        difference = _llvm("llvm.aarch64.neon.sabd.v8i8", "int8x8", one, other)
        return sums + T.Cast("uint16x8", T.reinterpret(difference, dtype="uint8x8"))
    for part in (one, other):
        sums = sums + T.Cast("uint16x8", T.reinterpret(part, dtype="uint8x8"))
    return sums
