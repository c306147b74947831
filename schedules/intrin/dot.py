"""Integer dot products of a few input channels with a vector of output channels, for each instruction set."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.tirx import PrimFunc


@dataclass(frozen=True)
class Dot:
    """A tensor intrinsic `C[lane] += sum(A[k] * B[lane, k])`, exact in 32 bits, with C a local accumulator.

    Attributes
    ----------
    name
        Name that `tensorize` finds it by, once `register_dot` was called.
    lanes
        Output channels of one accumulator vector.
    depth
        Input channels that one step consumes.
    data_dtype, weight_dtype
        What A and B hold.
    inner_shape
        Shape of one step's weights in memory: (lanes, depth), or (2, lanes, 2) for Arm's pairs.
    registers
        Vector registers that the accumulators of a tile may take, so that none is spilled.
    vector_cost
        What loading one vector of weights costs, in broadcasts of one step's activations.
    sum_dtype
        What C holds: int32, or uint32 where sums may wrap around.
    int8_offset, uint8_offset
        What is added to int8 or uint8 activations so that they fit data_dtype.
    """

    name: str
    lanes: int
    depth: int
    data_dtype: str
    weight_dtype: str
    inner_shape: tuple[int, ...]
    registers: int
    vector_cost: float = 1.0
    sum_dtype: str = "int32"
    int8_offset: int = 0
    uint8_offset: int = 0

    def offset(self, dtype: str) -> int:
        """Return what is added to activations of this dtype when they are stored for the dot product."""
        return self.int8_offset if dtype == "int8" else self.uint8_offset

    def inner_index(self, lane: Any, k: Any) -> tuple[Any, ...]:
        """Return the index of lane's weight for channel k within inner_shape."""
        if len(self.inner_shape) == 2:
            return (lane, k)
        return (k // 2, lane, k % 2)

    def pack(self, weights: np.ndarray) -> np.ndarray:
        """Bring weights [..., block, depth] into the form [..., block / lanes, *inner_shape]."""
        *outer, block, depth = weights.shape
        vectors = weights.reshape(*outer, block // self.lanes, self.lanes, depth)
        if len(self.inner_shape) == 3:  # [lanes, depth] -> [depth / 2, lanes, 2]
            vectors = vectors.reshape(*vectors.shape[:-1], depth // 2, 2).swapaxes(-3, -2)
        return np.ascontiguousarray(vectors).astype(self.weight_dtype, copy=False)


# vpmaddubsw would take bytes, but it saturates at int16: pairs of int16 are the widest exact step of AVX2.
_AVX2 = Dot("tvm_compress.dot_avx2", 8, 2, "int16", "int8", (8, 2), registers=10, vector_cost=1.5)
# Widening weights on load takes two instructions without SSE4.1, so they are stored as int16.
_SSE2 = Dot("tvm_compress.dot_sse2", 4, 2, "int16", "int16", (4, 2), registers=8)
_AVX512 = Dot("tvm_compress.dot_avx512", 16, 2, "int16", "int8", (16, 2), registers=20, vector_cost=1.5)
_VNNI = Dot("tvm_compress.dot_vnni", 16, 4, "uint8", "int8", (16, 4), registers=20, int8_offset=128)
_NEON = Dot(
    "tvm_compress.dot_neon", 4, 4, "int8", "int8", (2, 4, 2), registers=16, vector_cost=0.5, uint8_offset=-128
)
# Half of the 32 registers hide the latency of the accumulation on all cores that have it.
_SDOT = Dot(
    "tvm_compress.dot_sdot", 4, 4, "int8", "int8", (4, 4), registers=16, vector_cost=0.5, uint8_offset=-128
)

# Of int16 by int16, for sums that wrap around (Winograd's).
_WRAPPING = {
    16: Dot("tvm_compress.dot_avx512_wrapping", 16, 2, "int16", "int16", (16, 2), 20, sum_dtype="uint32"),
    8: Dot("tvm_compress.dot_avx2_wrapping", 8, 2, "int16", "int16", (8, 2), 10, sum_dtype="uint32"),
    4: Dot("tvm_compress.dot_sse2_wrapping", 4, 2, "int16", "int16", (4, 2), 8, sum_dtype="uint32"),
}

_BY_ISA = {"avx512vnni": _VNNI, "avx512": _AVX512, "avx2": _AVX2, "x86": _SSE2, "neon_dot": _SDOT}
_MULTIPLY_PAIRS = {
    8: "llvm.x86.avx2.pmadd.wd",
    4: "llvm.x86.sse2.pmadd.wd",
    16: "llvm.x86.avx512.pmaddw.d.512",
}
_MULTIPLY_QUADS = {
    _VNNI.name: "llvm.x86.avx512.vpdpbusd.512",
    _SDOT.name: "llvm.aarch64.neon.sdot.v4i32.v16i8",
}


def dot_for(isa: str) -> Dot:
    """Return the dot product that an instruction set (TargetRules.isa) does best, registered."""
    dot = _BY_ISA.get(isa, _NEON)
    register_dot(dot)
    return dot


def wrapping_dot_for(isa: str) -> Dot | None:
    """Return the dot product of int16 by int16 whose sums may wrap around, registered.

    None on Arm, where LLVM makes it (smlal) of plain vectors.
    """
    lanes = {"avx512vnni": 16, "avx512": 16, "avx2": 8, "x86": 4}.get(isa)
    if lanes is None:
        return None
    register_dot(_WRAPPING[lanes])
    return _WRAPPING[lanes]


@cache
def register_dot(dot: Dot) -> None:
    """Make a dot product known to `Schedule.tensorize`; any further call does nothing."""
    make: Callable[[Dot], tuple] = _pairs
    if dot.name in _MULTIPLY_QUADS:
        make = _quads
    elif dot is _NEON:
        make = _neon
    TensorIntrin.register(dot.name, *make(dot), override=True)


def _desc(dot: Dot) -> PrimFunc:
    lanes, depth = dot.lanes, dot.depth
    data_dtype, weight_dtype, sum_dtype = dot.data_dtype, dot.weight_dtype, dot.sum_dtype

    @T.prim_func(s_tir=True)
    def desc(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (depth,), data_dtype, offset_factor=1)
        B = T.match_buffer(b, (lanes, depth), weight_dtype, offset_factor=1)
        C = T.match_buffer(c, (lanes,), sum_dtype, offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:depth], B[0:lanes, 0:depth])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, depth):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(T.cast(A[vk], "int32") * T.cast(B[vi, vk], "int32"), sum_dtype)

    return desc


def _pairs(dot: Dot) -> tuple[PrimFunc, PrimFunc]:
    """Multiply pairs of int16 and add each pair's products: (v)pmaddwd, then (v)paddd."""
    lanes, weight_dtype, instruction = dot.lanes, dot.weight_dtype, _MULTIPLY_PAIRS[dot.lanes]
    wide = f"int16x{2 * lanes}"
    loaded, result = f"{weight_dtype}x{2 * lanes}", f"{dot.sum_dtype}x{lanes}"
    sum_dtype = dot.sum_dtype

    @T.prim_func(s_tir=True)
    def impl(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (2,), "int16", offset_factor=1)
        B = T.match_buffer(b, (lanes, 2), weight_dtype, offset_factor=1)
        C = T.match_buffer(c, (lanes,), sum_dtype, offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:2], B[0:lanes, 0:2])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = C.vload([0], result) + T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(instruction),
                T.reinterpret(
                    T.broadcast(T.reinterpret(A.vload([0], "int16x2"), dtype="int32"), lanes), dtype=wide
                ),
                T.Cast(wide, B.vload([0, 0], loaded)),
                dtype=result,
            )

    return _desc(dot), impl


def _quads(dot: Dot) -> tuple[PrimFunc, PrimFunc]:
    """Multiply four bytes by four and accumulate the sum, exactly: vpdpbusd, or sdot on Arm."""
    lanes, data_dtype, instruction = dot.lanes, dot.data_dtype, _MULTIPLY_QUADS[dot.name]
    loaded, result = f"{data_dtype}x4", f"int32x{lanes}"
    wide, weights = f"{data_dtype}x{4 * lanes}", f"int8x{4 * lanes}"

    @T.prim_func(s_tir=True)
    def impl(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (4,), data_dtype, offset_factor=1)
        B = T.match_buffer(b, (lanes, 4), "int8", offset_factor=1)
        C = T.match_buffer(c, (lanes,), "int32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(instruction),
                C.vload([0], result),
                T.reinterpret(
                    T.broadcast(T.reinterpret(A.vload([0], loaded), dtype="int32"), lanes), dtype=wide
                ),
                B.vload([0, 0], dtype=weights),
                dtype=result,
            )

    return _desc(dot), impl


def _neon(dot: Dot) -> tuple[PrimFunc, PrimFunc]:
    """Multiply bytes to int16, add two products, then pairs of sums to int32: smull, smlal, sadalp.

    Two products of weights in [-127, 127] and any int8 stay within int16.
    """

    @T.prim_func(s_tir=True)
    def desc(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (4,), "int8", offset_factor=1)
        B = T.match_buffer(b, (2, 4, 2), "int8", offset_factor=1)
        C = T.match_buffer(c, (4,), "int32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:4], A[0:4], B[0:2, 0:4, 0:2])
            T.writes(C[0:4])
            for i in T.serial(0, 4):
                for k in T.serial(0, 4):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vk // 2, vi, vk % 2], "int32")

    @T.prim_func(s_tir=True)
    def impl(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (4,), "int8", offset_factor=1)
        B = T.match_buffer(b, (2, 4, 2), "int8", offset_factor=1)
        C = T.match_buffer(c, (4,), "int32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:4], A[0:4], B[0:2, 0:4, 0:2])
            T.writes(C[0:4])
            first = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.aarch64.neon.smull.v8i16"),
                T.reinterpret(
                    T.broadcast(T.reinterpret(A.vload([0], "int8x2"), dtype="int16"), 4), dtype="int8x8"
                ),
                B.vload([0, 0, 0], dtype="int8x8"),
                dtype="int16x8",
            )
            second = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.aarch64.neon.smull.v8i16"),
                T.reinterpret(
                    T.broadcast(T.reinterpret(A.vload([2], "int8x2"), dtype="int16"), 4), dtype="int8x8"
                ),
                B.vload([1, 0, 0], dtype="int8x8"),
                dtype="int16x8",
            )
            C[T.ramp(T.int32(0), 1, 4)] = C.vload([0], "int32x4") + T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.aarch64.neon.saddlp.v4i32.v8i16"),
                first + second,
                dtype="int32x4",
            )

    return desc, impl
