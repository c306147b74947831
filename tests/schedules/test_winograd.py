"""Winograd's kernels against numpy: shapes, paddings and channels of any kind, errors, threads, epilogues."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, tirx
from tvm.target import Target

from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import open_device
from tvm_compress.schedules import apply, kernel_tables, reference, winograd, winograd_choice
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.schedules.threads import kernel_work
from tvm_compress.schedules.winograd_algorithm import (
    ALGORITHMS,
    F2,
    F4,
    S2,
    S4,
    Algorithm,
    convolution,
    pack_weights,
    transform_weights,
)
from tvm_compress.schedules.winograd_plan import FLOATS, cuts, shares_blocks, shares_rows

RPI4 = "raspberry-pi/4b-aarch64"
SAME = (1, 1, 1, 1)
EACH = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=list(ALGORITHMS))


def output_shape(
    x_shape: Sequence[int], outs: int, padding: Sequence[int], stride: int = 1
) -> tuple[int, int, int, int]:
    rows, columns = ((x_shape[1 + a] + padding[a] + padding[a + 2] - 3) // stride + 1 for a in (0, 1))
    return x_shape[0], rows, columns, outs


def conv_module(
    x_shape: Sequence[int], weight: np.ndarray, padding: Sequence[int] = SAME, stride: int = 1
) -> tvm.IRModule:
    """Convolution, bias, the sum with a second input, ReLU: all that a residual block fuses."""
    x = relax.Var("x", relax.TensorType(tuple(x_shape), "float32"))
    shape = output_shape(x_shape, weight.shape[0], padding, stride)
    other = relax.Var("other", relax.TensorType(shape, "float32"))
    bias = np.linspace(-1, 1, weight.shape[0], dtype=np.float32)
    builder = relax.BlockBuilder()
    with builder.function("main", [x, other]):
        with builder.dataflow():
            y = relax.op.nn.conv2d(
                x, relax.const(weight), strides=stride, padding=padding,
                data_layout="NHWC", kernel_layout="OIHW",
            )  # fmt: skip
            y = builder.emit(relax.op.add(builder.emit(y), relax.const(bias)))
            y = builder.emit(relax.op.add(y, other))
            out = builder.emit_output(relax.op.nn.relu(y))
        builder.emit_func_output(out)
    return builder.get()


def error_of(
    actual: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray,
    other: np.ndarray,
    padding: Sequence[int] = SAME,
    stride: int = 1,
) -> float:
    """Largest error of what `conv_module` gives, relative to the largest value before the ReLU."""
    exact = reference.convolution(x.astype(np.float64), weight.astype(np.float64), (stride, stride), padding)
    exact += np.linspace(-1, 1, weight.shape[0]) + other
    return relative_error(actual, np.maximum(exact, 0), np.abs(exact).max())


def relative_error(actual: np.ndarray, exact: np.ndarray, scale: float) -> float:
    return float(np.abs(actual - exact).max() / scale)


def lower(module: tvm.IRModule, target: Target, algorithm: Algorithm | None) -> tvm.IRModule:
    """Lower with the algorithm, where it applies."""

    def choose(info: Any, rules: Any, operator: str, allowed: dict[str, Algorithm]) -> Algorithm | None:
        return allowed.get(algorithm.name) if algorithm else None

    with patch.object(winograd, "choose_algorithm", choose):
        return apply.lower_to_kernels(module, target)


def run(module: tvm.IRModule, target: Target, *inputs: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(relax.build(module, target=target), tvm.cpu())
    result: np.ndarray = machine["main"](*map(tvm.runtime.tensor, inputs)).numpy()
    return result


def operands(
    x_shape: Sequence[int], outs: int, padding: Sequence[int], seed: int = 0, stride: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = x_shape, (outs, x_shape[-1], 3, 3), output_shape(x_shape, outs, padding, stride)
    x, weight, other = (rng.standard_normal(s).astype(np.float32) for s in shapes)
    return x, weight, other


@EACH
def test_the_matrices_are_an_algorithm_of_convolution(algorithm: Algorithm) -> None:
    """Output a is the sum over taps k of weight k times input a + k, for all weights and inputs."""
    at, bt, g = algorithm.output_matrix, algorithm.input_matrix, algorithm.weight_matrix[algorithm.places]
    products = np.einsum("ai,ik,id->akd", at, g, bt)
    np.testing.assert_allclose(products, taps(algorithm), atol=1e-14)
    column = list(np.random.default_rng(0).standard_normal(algorithm.n))
    patch = column[: algorithm.patch]
    np.testing.assert_allclose(algorithm.transform_input(patch), bt @ patch, atol=1e-6)
    np.testing.assert_allclose(algorithm.transform_output(column), at @ column, atol=1e-6)


def taps(algorithm: Algorithm) -> np.ndarray:
    """[output, tap, input]: what each output of a column is of the taps times the inputs."""
    result = np.zeros((algorithm.m, 3, algorithm.patch))
    for output, tap in np.ndindex(algorithm.m, 3):
        result[output, tap, output * algorithm.stride + tap] = 1
    return result


@EACH
@pytest.mark.parametrize("padding", [SAME, (0, 0, 0, 0), (0, 1, 2, 3)])
def test_the_reference_computes_convolutions(algorithm: Algorithm, padding: tuple[int, ...]) -> None:
    x, weight, _ = operands((2, 6, 11, 5), 7, padding)
    strides = (algorithm.stride, algorithm.stride)
    exact = reference.convolution(x.astype(np.float64), weight.astype(np.float64), strides, padding)
    actual = convolution(x.astype(np.float64), weight, algorithm, padding)
    assert relative_error(actual, exact, np.abs(exact).max()) < 1e-6


@EACH
def test_packed_weights_are_the_transformed_ones_and_zeros(algorithm: Algorithm) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 3, 3, 3)).astype(np.float32)
    packed = pack_weights(weight, algorithm, 4, 8)
    assert packed.shape == (algorithm.weight_rows, algorithm.weight_rows, 2, 8, 4)
    np.testing.assert_array_equal(packed[:, :, 1, :3, 0], transform_weights(weight, algorithm)[:, :, 4])
    assert not packed[:, :, :, 3:].any()
    assert not packed[:, :, 1, :, 1:].any()


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    padding = draw(st.sampled_from([SAME, (0, 0, 0, 0), (0, 1, 2, 1), (2, 0, 0, 3)]))
    least = [max(1, 3 - padding[axis] - padding[axis + 2]) for axis in (0, 1)]
    height, width = (draw(st.integers(low, 18)) for low in least)
    return {
        "x_shape": (draw(st.integers(1, 3)), height, width, draw(st.sampled_from([1, 3, 8, 16, 21, 40]))),
        "outs": draw(st.sampled_from([1, 5, 8, 16, 24, 37, 67])),
        "padding": padding,
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=16, deadline=None)
@given(convolutions(), st.sampled_from(list(ALGORITHMS.values())))
def test_any_convolution_with_what_follows_it(case: dict[str, Any], algorithm: Algorithm) -> None:
    padding, stride = case["padding"], algorithm.stride
    x, weight, other = operands(**case, stride=stride)
    target = parse_target("host")
    lowered = lower(conv_module(x.shape, weight, padding, stride), target, algorithm)
    assert apply.kernel_infos(lowered, target)[0].features["backend_winograd"] == 1
    actual = run(lowered, target, x, other)
    assert error_of(actual, x, weight, other, padding, stride) < algorithm.relative_error


@EACH
@pytest.mark.parametrize(("size", "ins"), [(12, 16), (8, 512)])
def test_errors_stay_within_the_stated_bound(algorithm: Algorithm, size: int, ins: int) -> None:
    x, weight, other = operands((1, size, size, ins), 16, SAME, stride=algorithm.stride)
    target = parse_target("host")
    lowered = lower(conv_module(x.shape, weight, stride=algorithm.stride), target, algorithm)
    machine = relax.VirtualMachine(relax.build(lowered, target=target), tvm.cpu())
    # Images are not centred in general: sums then do not cancel.
    for data in (x, np.abs(x)):
        actual = machine["main"](*map(tvm.runtime.tensor, (data, other))).numpy()
        error = error_of(actual, data, weight, other, stride=algorithm.stride)
        assert error < algorithm.relative_error


@pytest.mark.parametrize("name", ["host", RPI4])
@EACH
def test_what_follows_is_fused_and_it_runs_as_one_kernel(name: str, algorithm: Algorithm) -> None:
    target = parse_target(name)
    weight = np.ones((16, 16, 3, 3), np.float32)
    extent, stride = 8 * algorithm.stride, algorithm.stride
    module = lower(conv_module((1, extent, extent, 16), weight, stride=stride), target, algorithm)
    (info,) = apply.kernel_infos(module, target)
    assert info.kind == "conv2d_fp32"
    assert info.features["backend_winograd"] == 1
    assert info.features["epilogue_ops"] == 3
    assert info.features["macs"] == 64 * 16 * 16 * 9


@EACH
def test_executed_counts_hold_the_multiplications_and_the_transforms(algorithm: Algorithm) -> None:
    target = parse_target(RPI4)
    extent, weight = 8 * algorithm.stride, np.ones((16, 16, 3, 3), np.float32)
    module = conv_module((1, extent, extent, 16), weight, stride=algorithm.stride)
    module = lower(module, target, algorithm)
    (info,) = apply.kernel_infos(module, target)
    tiles = (8 // algorithm.m) ** 2
    # One vector of 4 outputs a multiplication and an addition.
    assert info.features["sum_ops"] == 2 * tiles * algorithm.n**2 * 16 * 16 / 4
    # Each of the n * n numbers is one of n that a column gives, in each of the two passes of both transforms.
    matrices = (algorithm.input_matrix, algorithm.output_matrix)
    most = sum(np.count_nonzero(m) * 2 * sum(m.shape) for m in matrices) * tiles * 16 / 4
    assert most / 4 < info.features["vector_ops"] - 3 * 64 * 16 / 4 < most


@pytest.mark.parametrize(
    ("shape", "algorithm"), [((1, 16, 16, 64), F4), ((3, 40, 33, 16), F2), ((1, 16, 15, 64), S4)]
)
def test_results_do_not_depend_on_threads(shape: tuple[int, ...], algorithm: Algorithm) -> None:
    x, weight, other = operands(shape, 64, SAME, stride=algorithm.stride)
    module = conv_module(x.shape, weight, stride=algorithm.stride)
    results, parallel = [], []
    for threads in (1, 2, 8):
        target = parse_target(f"{_host_options()} -num-cores={threads}")
        lowered = lower(module, target, algorithm)
        parallel.append(any(_is_parallel(func) for func in lowered.functions.values()))
        results.append(run(lowered, target, x, other))
    assert parallel == [False, True, True]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def _host_options() -> str:
    attrs = parse_target("host").attrs
    features = ",".join(str(feature) for feature in attrs.get("mattr", ()))
    return f"llvm -mcpu={attrs['mcpu']} -mtriple={attrs['mtriple']}" + (
        f" -mattr={features}" if features else ""
    )


def _is_parallel(func: Any) -> bool:
    return isinstance(func, tirx.PrimFunc) and "T.parallel" in func.script()


@pytest.mark.parametrize(
    ("kernel", "attrs"),
    [
        (3, {"strides": 3}), (3, {"strides": [1, 2]}), (3, {"strides": 2, "dilation": 2}),
        (3, {"dilation": 2}), (3, {"groups": 2}), (1, {}), (5, {"strides": 2}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("algorithm", [F4, S4])
def test_other_convolutions_get_the_direct_kernel(
    algorithm: Algorithm, kernel: int, attrs: dict[str, Any]
) -> None:
    weight = np.ones((8, 8 // attrs.get("groups", 1), kernel, kernel), np.float32)
    x = relax.Var("x", relax.TensorType((1, 12, 12, 8), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(
                relax.op.nn.conv2d(x, relax.const(weight), data_layout="NHWC", kernel_layout="OIHW", **attrs)
            )
        builder.emit_func_output(out)
    target = parse_target("host")
    (info,) = apply.kernel_infos(lower(builder.get(), target, algorithm), target)
    assert info.features["backend_winograd"] == 0


@pytest.mark.parametrize("name", [RPI4, "llvm -mcpu=haswell -mtriple=x86_64-linux-gnu"])
@EACH
@pytest.mark.parametrize(("size", "channels"), [(4, 512), (7, 64), (28, 8), (32, 37), (224, 64)])
def test_blocks_cover_the_image_and_tiles_fit_the_registers(
    name: str, algorithm: Algorithm, size: int, channels: int
) -> None:
    rules = rules_for(parse_target(name))
    info = dict(N=1, OH=size, OW=size, IC=channels, OC=channels)
    tiles = -(-size // algorithm.m)
    for blocking in cuts(rules, info, algorithm, FLOATS).values():
        assert 1 <= blocking.rows <= tiles
        assert 1 <= blocking.columns <= tiles
        # Evenly cut: no block lies beyond the image, whole.
        assert -(-tiles // blocking.rows) * blocking.rows - tiles < blocking.rows
        assert blocking.vectors * blocking.tiles + blocking.vectors < rules.vector_registers
        assert 4 * algorithm.n**2 * blocking.rows * blocking.columns * 2 * channels <= 4 << 20


@pytest.mark.parametrize(("size", "channels"), [(28, 16), (32, 32)])
def test_a_small_layer_has_no_overhang_and_one_parallel_region(size: int, channels: int) -> None:
    """Blocks that threads share as they are, rather than fewer ones whose stages they would share."""
    target = parse_target(RPI4)
    weight = np.ones((channels, channels, 3, 3), np.float32)
    module = conv_module((1, size, size, channels), weight)
    (info,) = apply.kernel_infos(lower(module, target, ALGORITHMS["F4"]), target)
    regions = kernel_work(info.func, 128).regions
    # Padding, then all that is done with each of the blocks, which are rows of tiles.
    assert [region.starts for region in regions] == [1] * len(regions)
    assert regions[-1].extent == -(-size // 4)


def test_what_overhangs_is_counted_and_so_is_waiting_for_threads() -> None:
    rules = rules_for(parse_target(RPI4))
    info = dict(N=1, OH=28, OW=28, IC=16, OC=16)

    def best(cores: int) -> tuple[int, ...]:
        return next(iter(cuts(replace(rules, threads=cores), info, ALGORITHMS["F4"], FLOATS)))

    # Of 7 rows of tiles: 4 + 3 would compute an 8th one.
    assert best(4)[:2] == (1, 7)
    rows, columns = best(1)[:2]
    assert 7 % rows == 0
    assert 7 % columns == 0
    # Too small to be worth the threads: as with one core.
    info |= {"OH": 12, "OW": 12}
    assert best(4) == best(1)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8])
def test_rows_of_the_last_stage_are_shared_where_threads_get_about_as_many(rows: int) -> None:
    rules = rules_for(parse_target(RPI4))
    assert shares_rows(rules, rows) == (rows >= 7)
    assert shares_blocks(rules, rows) == (rows >= 7)
    assert shares_rows(replace(rules, threads=1), rows)


X86 = "llvm -mcpu={} -mtriple=x86_64-linux-gnu"


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        (RPI4, 1),
        (RPI4, 2),
        (X86.format("haswell"), 1),
        (X86.format("cascadelake"), 1),
        (X86.format("cascadelake"), 2),
        # Without VNNI: its fp32 kernels are the same.
        (X86.format("skylake-avx512"), 1),
    ],
)
def test_the_tables_choose_what_was_measured_as_fastest(name: str, stride: int) -> None:
    rules = rules_for(parse_target(name))
    rows = kernel_tables.load_rows(rules.isa, kernel_tables.name_of("conv2d_fp32", stride))
    assert len(rows) > 20
    chosen = set()
    for row in rows:
        info = {"OH": row["H"], "OW": row["W"], "IC": row["IC"], "OC": row["OC"], "stride": stride}
        allowed = winograd_choice.of_stride(ALGORITHMS, info)
        algorithm = winograd_choice.choose_algorithm(info, rules, "conv2d_fp32", allowed)
        kernel = algorithm.name if algorithm else "direct"
        assert row["costs"][kernel] == min(row["costs"].values())
        chosen.add(kernel)
    # Each kernel is there because it is the fastest somewhere.
    assert chosen == {"direct", *allowed}


def test_overhanging_tiles_count_in_the_costs() -> None:
    rows = [{"H": 8, "W": 8, "IC": 16, "OC": 16, "costs": {"direct": 10.0, "F4": 6.0}}]
    work = {
        "direct": lambda h, w: float(h * w),
        "F4": lambda h, w: 16.0 * -(-h // 4) * -(-w // 4),
        "F2": lambda h, w: 1.0,
    }
    shape = {"IC": 16, "OC": 16}
    assert kernel_tables.costs_at(rows, {"H": 8, "W": 8, **shape}, work) == {"direct": 10.0, "F4": 6.0}
    # 4 tiles of 16 for 25 outputs.
    costs = kernel_tables.costs_at(rows, {"H": 5, "W": 5, **shape}, work)
    assert costs == {"direct": 10.0 * 25 / 64, "F4": 6.0}
    assert kernel_tables.costs_at([], {"H": 8, "W": 8, **shape}, work) == {}


def test_targets_without_a_table_get_the_direct_kernel() -> None:
    rules = rules_for(parse_target("llvm -mcpu=apple-m1 -mtriple=aarch64-linux-gnu"))
    info = {"OH": 32, "OW": 32, "IC": 64, "OC": 64, "stride": 1}
    assert winograd_choice.choose_algorithm(info, rules, "conv2d_fp32", ALGORITHMS) is None


# (input shape, output channels, padding, algorithm).
EMULATED: list[tuple[tuple[int, ...], int, tuple[int, ...], Algorithm]] = [
    ((1, 8, 8, 16), 16, SAME, F2),
    ((1, 8, 8, 16), 16, SAME, F4),
    ((2, 7, 9, 5), 19, (0, 1, 2, 0), F2),
    ((2, 7, 9, 5), 19, (0, 1, 2, 0), F4),
    ((1, 16, 16, 16), 16, SAME, S4),
    ((2, 7, 14, 5), 19, (0, 1, 2, 0), S2),
]


def test_the_emulated_a72_computes_them_too(tmp_path: Path) -> None:
    target = parse_target(RPI4)
    with open_device("emulated-a72").open() as session:
        for index, (shape, outs, padding, algorithm) in enumerate(EMULATED):
            x, weight, other = operands(shape, outs, padding, stride=algorithm.stride)
            library = tmp_path / f"{index}.so"
            lowered = lower(conv_module(shape, weight, padding, algorithm.stride), target, algorithm)
            relax.build(lowered, target=target).export_library(
                str(library), fcompile=export_fcompile("aarch64-linux-gnu")
            )
            (actual,) = session.run(library, [x, other])
            error = error_of(actual, x, weight, other, padding, algorithm.stride)
            assert error < algorithm.relative_error
