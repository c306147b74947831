"""Bit-serial steps: counted products of bit planes, their weighted sums, and the packing of activations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

# Input channels of a step: four bytes, one 32-bit broadcast.
WORD_CHANNELS = 32

# Steps that may be counted in 8 bits: each adds at most 8 to a byte.
MAX_STEPS = 255 // 8


@dataclass(frozen=True)
class BitDot:
    """Two tensor intrinsics over `lanes` output channels by the four bytes of a word of input channels.

    `count`: `C[lane, byte] += popcount(A[byte] op B[lane, byte])` in uint8, at most MAX_STEPS times from 0;
    `weigh`: `S[lane] += sum(C[lane, byte]) * coefficient` in int32.

    Attributes
    ----------
    count, weigh
        Names that `tensorize` finds them by, once `register_bit_dot` was called.
    lanes
        Output channels of a vector.
    operation
        "and", or "xor" for weights that are -1 and +1.
    registers
        Vector registers that the counts of a tile may take.
    """

    isa: str
    lanes: int
    operation: str
    registers: int

    @property
    def count(self) -> str:
        """Name of the counting intrinsic."""
        return f"tvm_compress.count_{self.operation}_{self.lanes}"

    @property
    def weigh(self) -> str:
        """Name of the weighing intrinsic."""
        return f"tvm_compress.weigh_{_weigh_kind(self.isa)}_{self.lanes}"


def bit_dot_for(isa: str, operation: str, out_channels: int) -> BitDot:
    """Return the registered bit-serial step of an instruction set (TargetRules.isa).

    out_channels must be a multiple of 8; vectors are as wide as divides them.
    """
    if isa.startswith("avx512") and out_channels % 16 == 0:
        dot = BitDot("avx512", 16, operation, registers=16)
    elif isa.startswith("avx"):
        dot = BitDot("avx2", 8, operation, registers=8)
    elif isa == "x86":
        dot = BitDot("x86", 4, operation, registers=4)
    else:
        dot = BitDot("neon", 4, operation, registers=16)
    register_bit_dot(dot)
    return dot


@cache
def register_bit_dot(dot: BitDot) -> None:
    """Make the intrinsics known to `Schedule.tensorize`; any further call does nothing."""
    TensorIntrin.register(dot.count, *_count(dot), override=True)
    TensorIntrin.register(dot.weigh, _weigh_desc(dot.lanes), _weigh_impl(dot), override=True)


def combine(operation: str, a: Any, b: Any) -> Any:
    """Return `a & b` or `a ^ b`."""
    return a & b if operation == "and" else a ^ b


def _count(dot: BitDot) -> tuple[PrimFunc, PrimFunc]:
    lanes, operation = dot.lanes, dot.operation
    size = 4 * lanes
    dtype = f"uint8x{size}"

    @T.prim_func(s_tir=True)
    def desc(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (4,), "uint8", offset_factor=1)
        B = T.match_buffer(b, (lanes, 4), "uint8", offset_factor=1)
        C = T.match_buffer(c, (lanes, 4), "uint8", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:lanes, 0:4], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes, 0:4])
            for i, j in T.grid(lanes, 4):
                with T.sblock("update"):
                    vi, vj = T.axis.remap("SS", [i, j])
                    C[vi, vj] = C[vi, vj] + T.popcount(combine(operation, A[vj], B[vi, vj]))

    @T.prim_func(s_tir=True)
    def impl(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (4,), "uint8", offset_factor=1)
        B = T.match_buffer(b, (lanes, 4), "uint8", offset_factor=1)
        C = T.match_buffer(c, (lanes, 4), "uint8", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:lanes, 0:4], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes, 0:4])
            C[0, T.ramp(T.int32(0), 1, size)] = C.vload([0, 0], dtype) + T.popcount(
                combine(
                    operation,
                    T.reinterpret(
                        T.broadcast(T.reinterpret(A.vload([0], "uint8x4"), dtype="uint32"), lanes),
                        dtype=dtype,
                    ),
                    B.vload([0, 0], dtype),
                )
            )

    return desc, impl


def _weigh_desc(lanes: int) -> PrimFunc:
    @T.prim_func(s_tir=True)
    def desc(d: T.handle, k: T.handle, c: T.handle) -> None:
        D = T.match_buffer(d, (lanes, 4), "uint8", offset_factor=1, scope="local")
        K = T.match_buffer(k, (1,), "int32", offset_factor=1)
        C = T.match_buffer(c, (lanes,), "int32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:lanes], D[0:lanes, 0:4], K[0])
            T.writes(C[0:lanes])
            for i, j in T.grid(lanes, 4):
                with T.sblock("update"):
                    vi, vj = T.axis.remap("SR", [i, j])
                    C[vi] = C[vi] + T.cast(D[vi, vj], "int32") * K[0]

    return desc


def _weigh_kind(isa: str) -> str:
    return "neon" if isa == "neon" else isa


def _weigh_impl(dot: BitDot) -> PrimFunc:
    lanes = dot.lanes
    weigh = {"avx512": _weigh_avx512, "avx2": _weigh_avx2, "x86": _weigh_sse2, "neon": _weigh_neon}[dot.isa]

    @T.prim_func(s_tir=True)
    def impl(d: T.handle, k: T.handle, c: T.handle) -> None:
        D = T.match_buffer(d, (lanes, 4), "uint8", offset_factor=1, scope="local")
        K = T.match_buffer(k, (1,), "int32", offset_factor=1)
        C = T.match_buffer(c, (lanes,), "int32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:lanes], D[0:lanes, 0:4], K[0])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = C.vload([0], f"int32x{lanes}") + weigh(
                D.vload([0, 0], f"uint8x{4 * lanes}"), K[0]
            )

    return impl


def _llvm(name: str, dtype: str, *args: Any) -> Any:
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(name), *args, dtype=dtype)


def _weigh_avx512(counts: Any, coefficient: Any) -> Any:
    pairs = _llvm("llvm.x86.avx512.pmaddubs.w.512", "int16x32", counts, T.broadcast(T.int8(1), 64))
    return _llvm(
        "llvm.x86.avx512.pmaddw.d.512", "int32x16", pairs, T.broadcast(T.Cast("int16", coefficient), 32)
    )


def _weigh_avx2(counts: Any, coefficient: Any) -> Any:
    # Two counts reach 510 at most, so that vpmaddubsw cannot saturate; coefficients fit int16.
    pairs = _llvm("llvm.x86.avx2.pmadd.ub.sw", "int16x16", counts, T.broadcast(T.int8(1), 32))
    return _llvm("llvm.x86.avx2.pmadd.wd", "int32x8", pairs, T.broadcast(T.Cast("int16", coefficient), 16))


def _weigh_sse2(counts: Any, coefficient: Any) -> Any:
    words = T.reinterpret(counts, dtype="uint16x8")
    pairs = (words & T.broadcast(T.uint16(255), 8)) + T.shift_right(words, T.broadcast(T.uint16(8), 8))
    signed = T.reinterpret(pairs, dtype="int16x8")
    return _llvm("llvm.x86.sse2.pmadd.wd", "int32x4", signed, T.broadcast(T.Cast("int16", coefficient), 8))


def _weigh_neon(counts: Any, coefficient: Any) -> Any:
    pairs = _llvm("llvm.aarch64.neon.uaddlp.v8i16.v16i8", "uint16x8", counts)
    sums = _llvm("llvm.aarch64.neon.uaddlp.v4i32.v8i16", "uint32x4", pairs)
    return T.reinterpret(sums, dtype="int32x4") * T.broadcast(coefficient, 4)


def word_packer(isa: str) -> Callable[[Any, Sequence[Any], Any], Any]:
    """Return a function of (buffer, index of 32 contiguous uint8, bit) that gives their bits as uint8x4.

    Channel c is bit c % 8 of byte c / 8.
    """
    if isa.startswith("avx"):
        return _pack_avx2
    if isa == "x86":
        return _pack_sse2
    return _pack_portable


def _pack_avx2(data: Any, index: Sequence[Any], bit: Any) -> Any:
    # The bit goes to the top of its byte, whence vpmovmskb collects it; what is pushed out does not matter.
    top = T.shift_left(data.vload(index, "uint8x32"), T.broadcast(T.Cast("uint8", 7 - bit), 32))
    return T.reinterpret(_llvm("llvm.x86.avx2.pmovmskb", "int32", top), dtype="uint8x4")


def _pack_sse2(data: Any, index: Sequence[Any], bit: Any) -> Any:
    *outer, c = index
    words = []
    for half in range(2):
        values = data.vload([*outer, c + 16 * half], "uint8x16")
        top = T.shift_left(values, T.broadcast(T.Cast("uint8", 7 - bit), 16))
        words.append(T.reinterpret(_llvm("llvm.x86.sse2.pmovmskb.128", "int32", top), dtype="uint32"))
    return T.reinterpret(words[0] | T.shift_left(words[1], T.uint32(16)), dtype="uint8x4")


def _pack_portable(data: Any, index: Sequence[Any], bit: Any) -> Any:
    """Collect the bits of 8 bytes by one multiplication (the products' columns do not overlap)."""
    *outer, c = index
    word = T.uint32(0)
    for byte in range(4):
        values = T.reinterpret(data.vload([*outer, c + 8 * byte], "uint8x8"), dtype="uint64")
        bits = T.shift_right(values, T.Cast("uint64", bit)) & T.uint64(0x0101010101010101)
        code = T.shift_right(bits * T.uint64(0x0102040810204080), T.uint64(56))
        word = word | T.shift_left(T.Cast("uint32", code), T.uint32(8 * byte))
    return T.reinterpret(word, dtype="uint8x4")
