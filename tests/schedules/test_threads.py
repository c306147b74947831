"""How threads share the work of kernels: even parts, lines of their own, the same results."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, s_tir, te, tirx
from tvm.target import Target

from tests.schedules.test_int8 import make_site, random_site
from tests.schedules.test_winograd_int8 import SAME
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import open_device
from tvm_compress.schedules import ops
from tvm_compress.schedules.apply import kernel_infos, lower_to_kernels
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.schedules.threads import (
    Lines,
    Region,
    Work,
    imbalance,
    kernel_work,
    largest_part,
    written_lines,
)

RPI4 = parse_target("raspberry-pi/4b-aarch64")
# Whatever this machine is.
AVX2 = parse_target("llvm -mcpu=haswell -mtriple=x86_64-linux-gnu -num-cores=4")
AVX512 = parse_target("llvm -mcpu=cascadelake -mtriple=x86_64-linux-gnu -num-cores=4")
FOUR_CORES = parse_target(dict(parse_target("host").export()) | {"num-cores": 4})


def parallel_copy(rows: int, columns: int, axis: int) -> tirx.PrimFunc:
    """A kernel that adds 1 to float32 [rows, columns], parallel over one of the axes."""
    x = te.placeholder((rows, columns), "float32", name="x")
    y = te.compute((rows, columns), lambda i, j: x[i, j] + tirx.const(1, "float32"), name="y")
    sch = s_tir.Schedule(te.create_prim_func([x, y]))
    loops = list(sch.get_loops(sch.get_sblock("y")))
    first = loops.pop(axis)
    sch.reorder(first, *loops)
    sch.parallel(first)
    return sch.mod["main"]


@given(extent=st.integers(1, 500), threads=st.integers(1, 8))
@settings(max_examples=50, deadline=None)
def test_parts_are_those_of_tvm(extent: int, threads: int) -> None:
    """Runs of ceil(extent / threads) iterations, the last ones shorter or empty."""
    part = largest_part(extent, threads)
    parts = [max(0, min(extent, (t + 1) * part) - t * part) for t in range(threads)]
    assert sum(parts) == extent
    assert max(parts) == part
    assert imbalance(extent, threads) == pytest.approx(max(parts) / np.mean(parts))


def test_lines_that_rows_of_whole_lines_share_and_columns_do() -> None:
    whole = parallel_copy(8, 16, 0)
    assert written_lines(whole, 2) == [Lines(8, 0, 0)]
    half = parallel_copy(6, 24, 0)  # a row is a line and a half
    assert written_lines(half, 2) == [Lines(9, 1, 0)]
    columns = parallel_copy(8, 16, 1)
    assert written_lines(columns, 2) == [Lines(8, 8, 8)]
    # Two lines a row, and each thread has its own.
    assert written_lines(parallel_copy(8, 32, 1), 2) == [Lines(16, 0, 0)]
    assert written_lines(parallel_copy(8, 32, 1), 1) == [Lines(16, 0, 0)]


def test_work_is_that_of_the_busiest_thread() -> None:
    work = kernel_work(parallel_copy(5, 16, 0), 256)
    assert [region.extent for region in work.regions] == [5]
    assert work.regions[0].work == work.total
    assert work.largest_share(1) == work.total
    assert work.largest_share(4) == pytest.approx(work.total * 2 / 5)
    half = Work(2 * work.total, (Region(work.regions[0].loop, 1, work.total),))
    assert half.largest_share(4) == pytest.approx(work.total * 1.4)


def float_site(shape: tuple[int, ...], out: int, kernel: int, stride: int, groups: int = 1) -> tvm.IRModule:
    weight = np.random.default_rng(0).standard_normal((out, shape[3] // groups, kernel, kernel))
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(
                relax.op.nn.conv2d(
                    x, relax.const(weight.astype(np.float32)), strides=stride, padding=kernel // 2,
                    groups=groups, data_layout="NHWC", kernel_layout="OIHW",
                )
            )  # fmt: skip
            out_var = builder.emit_output(relax.op.nn.relu(y))
        builder.emit_func_output(out_var)
    return builder.get()


def integer_site(shape: tuple[int, ...], out: int, kernel: int, stride: int, **attrs: Any) -> tvm.IRModule:
    rng = np.random.default_rng(0)
    x, w, b = random_site(rng, shape, (out, shape[3], kernel, kernel), attrs.pop("dtype", "int8"))
    bits = attrs.get("weight_bits", 8)
    w = (
        np.where(w > 0, 1, -1).astype(np.int8)
        if bits == 1
        else np.clip(w, -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
    )
    padding = [kernel // 2] * 4
    return make_site(x, w, b, strides=[stride, stride], padding=padding, **attrs)


# Convolutions of ResNets, of widths as pruning leaves them, and a depthwise one.
SITES = {
    "fp32 stem": lambda: float_site((1, 32, 32, 3), 32, 3, 1),
    "fp32 3x3": lambda: float_site((1, 32, 32, 32), 32, 3, 1),
    "fp32 strided": lambda: float_site((1, 32, 32, 32), 64, 3, 2),
    "fp32 narrow": lambda: float_site((1, 32, 32, 16), 24, 3, 2),
    "fp32 wide": lambda: float_site((1, 4, 4, 256), 256, 3, 1),
    "fp32 depthwise": lambda: float_site((1, 56, 56, 96), 96, 3, 1, groups=96),
    "int8 3x3": lambda: integer_site((1, 32, 32, 32), 32, 3, 1),
    "int8 strided": lambda: integer_site((1, 32, 32, 32), 64, 3, 2),
    "int8 wide": lambda: integer_site((1, 4, 4, 256), 256, 3, 1),
    "bits": lambda: integer_site(
        (1, 16, 16, 64), 64, 3, 1, dtype="uint8", scheme="bitserial", activation_bits=2, weight_bits=1
    ),
}


@pytest.mark.parametrize("target", [AVX2, AVX512, RPI4], ids=["avx2", "avx512", "rpi4"])
@pytest.mark.parametrize("name", SITES)
def test_threads_have_as_much_to_do_and_write_lines_of_their_own(name: str, target: Target) -> None:
    infos = kernel_infos(lower_to_kernels(SITES[name](), target), target)
    works = [kernel_work(info.func, rules_for(target).vector_bits) for info in infos]
    total = sum(work.total for work in works)
    # Three threads take 8 blocks as 3, 3 and 2: better than to wait for each other at each stage of two.
    # With vectors of 16, copying the stem's image of three channels, which stays serial, is 8 % of its work.
    four = 1.25 if (name, target) == ("fp32 stem", AVX512) else 1.2
    for threads, most in ((2, 1.15), (3, 1.25), (4, four)):
        assert sum(work.largest_share(threads) for work in works) * threads / total < most
        for info in infos:
            assert all(lines.contested == 0 for lines in written_lines(info.func, threads))


@pytest.mark.parametrize(
    ("site", "parallel"),
    [
        (float_site((1, 8, 8, 16), 16, 3, 1), False),
        (float_site((1, 32, 32, 16), 16, 3, 2), True),
        (integer_site((1, 16, 16, 16), 16, 3, 2), False),
        (integer_site((1, 32, 32, 32), 32, 3, 2), True),
    ],
)
def test_small_layers_stay_serial(site: tvm.IRModule, parallel: bool) -> None:
    (info,) = kernel_infos(lower_to_kernels(site, FOUR_CORES), FOUR_CORES)
    assert bool(kernel_work(info.func, 256).regions) == parallel


def test_counted_bits_are_small_layers_longer_than_floats() -> None:
    def regions(bits: int) -> int:
        module = integer_site(
            (1, 16, 16, 32),
            32,
            3,
            1,
            dtype="uint8",
            scheme="bitserial",
            activation_bits=bits,
            weight_bits=bits,
        )
        infos = kernel_infos(lower_to_kernels(module, RPI4), RPI4)
        (info,) = (info for info in infos if info.features["is_conv2d"])
        return len(kernel_work(info.func, 128).regions)

    # 2.4 M multiply-accumulates: of 1 bit as long as 0.3 M of INT8.
    assert regions(1) == 0
    assert regions(6) > 0


def test_results_are_the_same_with_any_number_of_threads(tmp_path: Path) -> None:
    """One library of fp32 and integer kernels, built for four cores, with 1 to 4 threads."""
    rng = np.random.default_rng(3)
    x = relax.Var("x", relax.TensorType((1, 33, 33, 32), "float32"))
    weights = [
        rng.standard_normal(shape).astype(np.float32) / 12 for shape in ((40, 32, 3, 3), (40, 40, 3, 3))
    ]
    integers = rng.integers(-127, 128, (24, 40, 3, 3)).astype(np.int8)
    layout = {"data_layout": "NHWC", "kernel_layout": "OIHW", "padding": 1}
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.nn.conv2d(x, relax.const(weights[0]), **layout))
            y = builder.emit(
                relax.op.nn.relu(builder.emit(relax.op.nn.conv2d(y, relax.const(weights[1]), **layout)))
            )
            quantization = {"zero_point": -128, "qmin": -128, "qmax": 127, "dtype": "int8"}
            y = builder.emit(ops.call("quantize", [y], scale=0.02, **quantization))
            bias = relax.const(np.zeros(24, np.int32))
            attrs = {"scheme": "int8", "activation_bits": 8, "weight_bits": 8, "zero_point": -128}
            geometry = {"strides": [2, 2], "padding": SAME, "dilation": [1, 1], "groups": 1}
            y = builder.emit(ops.call("conv2d", [y, relax.const(integers), bias], **attrs, **geometry))
            out = builder.emit_output(y)
        builder.emit_func_output(out)
    lowered = lower_to_kernels(builder.get(), FOUR_CORES)
    works = [kernel_work(info.func, 256) for info in kernel_infos(lowered, FOUR_CORES)]
    assert sum(bool(work.regions) for work in works) >= 3
    library = tmp_path / "model.so"
    compiler = export_fcompile(str(FOUR_CORES.attrs["mtriple"]))
    relax.build(lowered, FOUR_CORES).export_library(str(library), fcompile=compiler)
    data = rng.standard_normal((1, 33, 33, 32)).astype(np.float32)
    found = []
    for threads in (1, 2, 3, 4):
        with open_device("local", threads).open() as session:
            found.append(session.run(library, [data])[0])
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
