"""Dot products of bytes whose sums stay in 16 bits for several steps: twice the products of int16 pairs."""

from dataclasses import dataclass
from functools import cache

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

INT16_MAX = 2**15 - 1

# Input channels of a step: four bytes, one 32-bit broadcast.
DEPTH = 4


@dataclass(frozen=True)
class NarrowDot:
    """Two tensor intrinsics over `lanes` output channels by four input channels.

    `multiply`: `P[lane, half] += sum(A[2 half + k] * B[lane, 2 half + k])` in int16, exact only while the
    caller keeps every partial sum within int16 (vpmaddubsw saturates); `widen`: `S[lane] += P[lane, 0] +
    P[lane, 1]` in int32.

    Attributes
    ----------
    lanes
        Output channels of a vector.
    registers
        Vector registers that the 16-bit sums of a tile may take.
    """

    lanes: int
    registers: int

    @property
    def multiply(self) -> str:
        """Name of the multiplying intrinsic."""
        return f"tvm_compress.narrow_multiply_{self.lanes}"

    @property
    def widen(self) -> str:
        """Name of the widening intrinsic."""
        return f"tvm_compress.narrow_widen_{self.lanes}"


_AVX2 = NarrowDot(8, registers=10)
_AVX512 = NarrowDot(16, registers=20)
_INSTRUCTIONS = {
    8: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
    16: ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
}


def narrow_dot_for(isa: str, out_channels: int) -> NarrowDot | None:
    """Return the registered dot product of an instruction set (TargetRules.isa), or None.

    AVX-512 VNNI sums four products in 32 bits at once and Arm pairs within 16 bits: they gain nothing.
    """
    if isa not in ("avx2", "avx512") or out_channels % 8:
        return None
    dot = _AVX512 if isa == "avx512" and out_channels % 16 == 0 else _AVX2
    register_narrow_dot(dot)
    return dot


@cache
def register_narrow_dot(dot: NarrowDot) -> None:
    """Make the intrinsics known to `Schedule.tensorize`; any further call does nothing."""
    TensorIntrin.register(dot.multiply, *_multiply(dot.lanes), override=True)
    TensorIntrin.register(dot.widen, *_widen(dot.lanes), override=True)


def _multiply(lanes: int) -> tuple[PrimFunc, PrimFunc]:
    """Multiply uint8 by int8, add pairs of products in int16: vpmaddubsw, vpaddw."""
    instruction = _INSTRUCTIONS[lanes][0]
    bytes_wide, sums = f"int8x{4 * lanes}", f"int16x{2 * lanes}"

    @T.prim_func(s_tir=True)
    def desc(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (4,), "uint8", offset_factor=1)
        B = T.match_buffer(b, (lanes, 4), "int8", offset_factor=1)
        C = T.match_buffer(c, (lanes, 2), "int16", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:lanes, 0:2], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes, 0:2])
            for i, half, k in T.grid(lanes, 2, 2):
                with T.sblock("update"):
                    vi, vh, vk = T.axis.remap("SSR", [i, half, k])
                    C[vi, vh] = C[vi, vh] + T.cast(A[vh * 2 + vk], "int16") * T.cast(
                        B[vi, vh * 2 + vk], "int16"
                    )

    @T.prim_func(s_tir=True)
    def impl(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (4,), "uint8", offset_factor=1)
        B = T.match_buffer(b, (lanes, 4), "int8", offset_factor=1)
        C = T.match_buffer(c, (lanes, 2), "int16", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:lanes, 0:2], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes, 0:2])
            C.vstore(
                [0, 0],
                C.vload([0, 0], sums)
                + T.call_llvm_pure_intrin(
                    T.llvm_lookup_intrinsic_id(instruction),
                    T.reinterpret(
                        T.broadcast(T.reinterpret(A.vload([0], "uint8x4"), dtype="int32"), lanes),
                        dtype=bytes_wide,
                    ),
                    B.vload([0, 0], bytes_wide),
                    dtype=sums,
                ),
            )

    return desc, impl


def _widen(lanes: int) -> tuple[PrimFunc, PrimFunc]:
    """Add pairs of int16 to int32: vpmaddwd by ones, vpaddd."""
    instruction = _INSTRUCTIONS[lanes][1]
    sums, result = f"int16x{2 * lanes}", f"int32x{lanes}"

    @T.prim_func(s_tir=True)
    def desc(p: T.handle, c: T.handle) -> None:
        P = T.match_buffer(p, (lanes, 2), "int16", offset_factor=1, scope="local")
        C = T.match_buffer(c, (lanes,), "int32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:lanes], P[0:lanes, 0:2])
            T.writes(C[0:lanes])
            for i, half in T.grid(lanes, 2):
                with T.sblock("update"):
                    vi, vh = T.axis.remap("SR", [i, half])
                    C[vi] = C[vi] + T.cast(P[vi, vh], "int32")

    @T.prim_func(s_tir=True)
    def impl(p: T.handle, c: T.handle) -> None:
        P = T.match_buffer(p, (lanes, 2), "int16", offset_factor=1, scope="local")
        C = T.match_buffer(c, (lanes,), "int32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:lanes], P[0:lanes, 0:2])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = C.vload([0], result) + T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(instruction),
                P.vload([0, 0], sums),
                T.broadcast(T.int16(1), 2 * lanes),
                dtype=result,
            )

    return desc, impl
