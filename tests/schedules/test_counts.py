"""What scheduled kernels execute, counted."""

# TVMScript: its functions have no `self`, and its annotations are calls.
# mypy: disable-error-code="valid-type"

from tvm import tirx
from tvm.script import tirx as T

from tvm_compress.schedules.counts import NAMES, executed


@T.prim_func(s_tir=True)
def pointwise(a: T.Buffer((4, 16), "float32"), b: T.Buffer((4, 16), "float32")):
    for i in range(4):
        for j in T.vectorized(16):
            with T.sblock("b"):
                vi, vj = T.axis.remap("SS", [i, j])
                b[vi, vj] = a[vi, vj] * T.float32(2) + T.float32(1)


@T.prim_func(s_tir=True)
def sums(a: T.Buffer((8, 32), "float32"), b: T.Buffer((8,), "float32")):
    space = T.sblock_alloc_buffer((8,), "float32")
    for i in range(8):
        for k in range(32):
            with T.sblock("sum"):
                vi, vk = T.axis.remap("SR", [i, k])
                with T.init():
                    space[vi] = T.float32(0)
                space[vi] = space[vi] + a[vi, vk]
    for i in range(8):
        with T.sblock("b"):
            vi = T.axis.spatial(8, i)
            b[vi] = space[vi]


@T.prim_func(s_tir=True)
def fused_loops(a: T.Buffer((4, 16), "float32"), b: T.Buffer((16, 4), "float32")):
    for i in range(64):
        with T.sblock("b"):
            vi = T.axis.spatial(4, i // 16)
            vj = T.axis.spatial(16, i % 16)
            b[vj, vi] = a[vi, vj]


def counted(func: tirx.PrimFunc, bits: int) -> dict[str, float]:
    found = executed(func, bits)
    assert tuple(found) == NAMES
    return {name: value for name, value in found.items() if value}


def trips(inner: int, middle: int = 1, outer: int = 1) -> dict[str, float]:
    return {"inner_trips": inner, "middle_trips": middle, "outer_trips": outer}


def test_vectors_count_by_the_targets_width():
    # 16 floats are two vectors of 256 bits, four of 128.
    assert counted(pointwise, 256) == {
        "vector_ops": 4 * 2 * 2,
        "vector_loads": 4 * 2,
        "vector_stores": 4 * 2,
        "products": 4 * 2,
        "iterations": 4,
        **trips(4),
    }
    assert counted(pointwise, 128)["vector_ops"] == 4 * 2 * 4


def test_positions_that_are_divided_count():
    loops = {"iterations": 64, "divisions": 2 * 64, **trips(64)}
    assert counted(fused_loops, 128) == {"scalar_loads": 64, "scalar_stores": 64, **loops}


def test_sums_are_told_from_what_surrounds_them():
    found = counted(sums, 128)
    assert found["sum_ops"] == 8 * 32
    assert found["sum_loads"] == 2 * 8 * 32
    assert found["sum_trips"] == 8 * 32
    # Those of the sum, not of the copy.
    assert trips(32, 8).items() <= found.items()
    assert found["workspace_bytes"] == 8 * 4
    # The init, counted as often as the sum, and the copy.
    assert found["scalar_stores"] == 8 * 32 + 8
