"""Products of pairs: an int32 holds two int16, each lane has its own weights ((v)pmaddwd, (v)paddd)."""

from dataclasses import dataclass
from functools import cache

from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.tirx import PrimFunc


@dataclass(frozen=True)
class PairDot:
    """A tensor intrinsic `C[lane] += low(A[lane]) * B[lane, 0] + high(A[lane]) * B[lane, 1]`, exact in int32.

    Attributes
    ----------
    lanes
        int32 values of a vector.
    """

    lanes: int

    @property
    def name(self) -> str:
        """Name that `tensorize` finds it by."""
        return f"tvm_compress.pair_dot_{self.lanes}"


_INSTRUCTIONS = {
    4: "llvm.x86.sse2.pmadd.wd",
    8: "llvm.x86.avx2.pmadd.wd",
    16: "llvm.x86.avx512.pmaddw.d.512",
}


@cache
def pair_dot_for(lanes: int) -> PairDot:
    """Return the registered intrinsic of a vector of `lanes` int32 values on x86."""
    dot = PairDot(lanes)
    TensorIntrin.register(dot.name, *_pair_dot(lanes), override=True)
    return dot


def _pair_dot(lanes: int) -> tuple[PrimFunc, PrimFunc]:
    instruction = _INSTRUCTIONS[lanes]
    loaded, wide, result = f"int32x{lanes}", f"int16x{2 * lanes}", f"int32x{lanes}"

    @T.prim_func(s_tir=True)
    def desc(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (lanes,), "int32", offset_factor=1)
        B = T.match_buffer(b, (lanes, 2), "int16", offset_factor=1)
        C = T.match_buffer(c, (lanes,), "int32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:lanes], B[0:lanes, 0:2])
            T.writes(C[0:lanes])
            for i, half in T.grid(T.int64(lanes), T.int64(2)):
                with T.sblock("update"):
                    vi, vh = T.axis.remap("SR", [i, half])
                    C[vi] = C[vi] + T.cast(
                        T.Select(
                            vh == T.int64(0),
                            T.cast(A[vi], "int16"),
                            T.cast(T.shift_right(A[vi], T.int32(16)), "int16"),
                        ),
                        "int32",
                    ) * T.cast(B[vi, vh], "int32")

    @T.prim_func(s_tir=True)
    def impl(a: T.handle, b: T.handle, c: T.handle) -> None:
        A = T.match_buffer(a, (lanes,), "int32", offset_factor=1)
        B = T.match_buffer(b, (lanes, 2), "int16", offset_factor=1)
        C = T.match_buffer(c, (lanes,), "int32", offset_factor=1, scope="local")
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:lanes], B[0:lanes, 0:2])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = C.vload([0], result) + T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(instruction),
                T.reinterpret(A.vload([0], loaded), dtype=wide),
                B.vload([0, 0], wide),
                dtype=result,
            )

    return desc, impl
