"""Winograd's kernels against numpy: shapes, paddings and channels of any kind, errors, threads, epilogues."""

from collections.abc import Sequence
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
from tvm_compress.schedules import apply, kernel_tables, reference, winograd
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.schedules.winograd_algorithm import (
    ALGORITHMS,
    F2,
    F4,
    Algorithm,
    convolution,
    pack_weights,
    transform_weights,
)
from tvm_compress.schedules.winograd_plan import FLOATS, cuts

RPI4 = "raspberry-pi/4b-aarch64"
SAME = (1, 1, 1, 1)


def conv_module(
    x_shape: Sequence[int], weight: np.ndarray, padding: Sequence[int] = SAME, **attrs: Any
) -> tvm.IRModule:
    """Convolution, bias, the sum with a second input, ReLU: all that a residual block fuses."""
    rows, columns = (x_shape[1 + a] + padding[a] + padding[a + 2] - 2 for a in (0, 1))
    x = relax.Var("x", relax.TensorType(tuple(x_shape), "float32"))
    other = relax.Var("other", relax.TensorType((x_shape[0], rows, columns, weight.shape[0]), "float32"))
    bias = np.linspace(-1, 1, weight.shape[0], dtype=np.float32)
    builder = relax.BlockBuilder()
    with builder.function("main", [x, other]):
        with builder.dataflow():
            y = relax.op.nn.conv2d(
                x, relax.const(weight), padding=padding, data_layout="NHWC", kernel_layout="OIHW", **attrs
            )
            y = builder.emit(relax.op.add(builder.emit(y), relax.const(bias)))
            y = builder.emit(relax.op.add(y, other))
            out = builder.emit_output(relax.op.nn.relu(y))
        builder.emit_func_output(out)
    return builder.get()


def error_of(
    actual: np.ndarray, x: np.ndarray, weight: np.ndarray, other: np.ndarray, padding: Sequence[int] = SAME
) -> float:
    """Largest error of what `conv_module` gives, relative to the largest value before the ReLU."""
    exact = reference.convolution(x.astype(np.float64), weight.astype(np.float64), padding=padding)
    exact += np.linspace(-1, 1, weight.shape[0]) + other
    return relative_error(actual, np.maximum(exact, 0), np.abs(exact).max())


def relative_error(actual: np.ndarray, exact: np.ndarray, scale: float) -> float:
    return float(np.abs(actual - exact).max() / scale)


def lower(module: tvm.IRModule, target: Target, algorithm: Algorithm | None) -> tvm.IRModule:
    with patch.object(winograd, "choose_algorithm", lambda *arguments: algorithm):
        return apply.lower_to_kernels(module, target)


def run(module: tvm.IRModule, target: Target, *inputs: np.ndarray) -> np.ndarray:
    machine = relax.VirtualMachine(relax.build(module, target=target), tvm.cpu())
    result: np.ndarray = machine["main"](*map(tvm.runtime.tensor, inputs)).numpy()
    return result


def operands(
    x_shape: Sequence[int], outs: int, padding: Sequence[int], seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    count, height, width, ins = x_shape
    shape = (count, height + padding[0] + padding[2] - 2, width + padding[1] + padding[3] - 2, outs)
    x, weight, other = (
        rng.standard_normal(s).astype(np.float32) for s in (x_shape, (outs, ins, 3, 3), shape)
    )
    return x, weight, other


@pytest.mark.parametrize("algorithm", [F2, F4])
def test_the_matrices_are_an_algorithm_of_convolution(algorithm: Algorithm) -> None:
    """Output a is the sum over taps k of weight k times input a + k, for all weights and inputs."""
    at, bt, g = algorithm.output_matrix, algorithm.input_matrix, algorithm.weight_matrix
    products = np.einsum("ai,ik,id->akd", at, g, bt)
    taps = [[[float(d == a + k) for d in range(algorithm.n)] for k in range(3)] for a in range(algorithm.m)]
    np.testing.assert_allclose(products, taps, atol=1e-14)
    column = list(np.random.default_rng(0).standard_normal(algorithm.n))
    np.testing.assert_allclose(algorithm.transform_input(column), bt @ column, atol=1e-6)
    np.testing.assert_allclose(algorithm.transform_output(column), at @ column, atol=1e-6)


@pytest.mark.parametrize("algorithm", [F2, F4])
@pytest.mark.parametrize("padding", [SAME, (0, 0, 0, 0), (0, 1, 2, 3)])
def test_the_reference_computes_convolutions(algorithm: Algorithm, padding: tuple[int, ...]) -> None:
    x, weight, _ = operands((2, 6, 11, 5), 7, padding)
    exact = reference.convolution(x.astype(np.float64), weight.astype(np.float64), padding=padding)
    actual = convolution(x.astype(np.float64), weight, algorithm, padding)
    assert relative_error(actual, exact, np.abs(exact).max()) < 1e-6


@pytest.mark.parametrize("algorithm", [F2, F4])
def test_packed_weights_are_the_transformed_ones_and_zeros(algorithm: Algorithm) -> None:
    weight = np.random.default_rng(0).standard_normal((5, 3, 3, 3)).astype(np.float32)
    packed = pack_weights(weight, algorithm, 4, 8)
    assert packed.shape == (algorithm.n, algorithm.n, 2, 8, 4)
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


@settings(max_examples=10, deadline=None)
@given(convolutions(), st.sampled_from([F2, F4]))
def test_any_convolution_with_what_follows_it(case: dict[str, Any], algorithm: Algorithm) -> None:
    x, weight, other = operands(**case)
    target = parse_target("host")
    module = lower(conv_module(x.shape, weight, case["padding"]), target, algorithm)
    actual = run(module, target, x, other)
    assert error_of(actual, x, weight, other, case["padding"]) < algorithm.relative_error


@pytest.mark.parametrize("algorithm", [F2, F4])
@pytest.mark.parametrize(("size", "ins"), [(12, 16), (8, 512)])
def test_errors_stay_within_the_stated_bound(algorithm: Algorithm, size: int, ins: int) -> None:
    x, weight, other = operands((1, size, size, ins), 16, SAME)
    target = parse_target("host")
    lowered = lower(conv_module(x.shape, weight), target, algorithm)
    machine = relax.VirtualMachine(relax.build(lowered, target=target), tvm.cpu())
    # Images are not centred in general: sums then do not cancel.
    for data in (x, np.abs(x)):
        actual = machine["main"](*map(tvm.runtime.tensor, (data, other))).numpy()
        assert error_of(actual, data, weight, other) < algorithm.relative_error


@pytest.mark.parametrize("name", ["host", RPI4])
@pytest.mark.parametrize("algorithm", [F2, F4])
def test_what_follows_is_fused_and_it_runs_as_one_kernel(name: str, algorithm: Algorithm) -> None:
    target = parse_target(name)
    weight = np.ones((16, 16, 3, 3), np.float32)
    module = lower(conv_module((1, 8, 8, 16), weight), target, algorithm)
    (info,) = apply.kernel_infos(module, target)
    assert info.kind == "conv2d_fp32"
    assert info.features["backend_winograd"] == 1
    assert info.features["epilogue_ops"] == 3
    assert info.features["macs"] == 64 * 16 * 16 * 9


@pytest.mark.parametrize("algorithm", [F2, F4])
def test_executed_counts_hold_the_multiplications_and_the_transforms(algorithm: Algorithm) -> None:
    target = parse_target(RPI4)
    module = lower(conv_module((1, 8, 8, 16), np.ones((16, 16, 3, 3), np.float32)), target, algorithm)
    (info,) = apply.kernel_infos(module, target)
    tiles = (8 // algorithm.m) ** 2
    # One vector of 4 outputs a multiplication and an addition.
    assert info.features["sum_ops"] == 2 * tiles * algorithm.n**2 * 16 * 16 / 4
    # Each of the n * n numbers is one of n that a column gives, in each of the two passes of both transforms.
    matrices = (algorithm.input_matrix, algorithm.output_matrix)
    most = sum(np.count_nonzero(m) * 2 * (len(m) + algorithm.n) for m in matrices) * tiles * 16 / 4
    assert most / 4 < info.features["vector_ops"] - 3 * 64 * 16 / 4 < most


@pytest.mark.parametrize(("shape", "algorithm"), [((1, 16, 16, 64), F4), ((3, 40, 33, 16), F2)])
def test_results_do_not_depend_on_threads(shape: tuple[int, ...], algorithm: Algorithm) -> None:
    x, weight, other = operands(shape, 64, SAME)
    module = conv_module(x.shape, weight)
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
    [(3, {"strides": 2}), (3, {"dilation": 2}), (3, {"groups": 2}), (1, {}), (5, {})],
)
def test_other_convolutions_get_the_direct_kernel(kernel: int, attrs: dict[str, int]) -> None:
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
    (info,) = apply.kernel_infos(lower(builder.get(), target, F4), target)
    assert info.features["backend_winograd"] == 0


@pytest.mark.parametrize("name", [RPI4, "llvm -mcpu=haswell -mtriple=x86_64-linux-gnu"])
@pytest.mark.parametrize("algorithm", [F2, F4])
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


@pytest.mark.parametrize("name", [RPI4, "llvm -mcpu=haswell -mtriple=x86_64-linux-gnu"])
def test_the_tables_choose_what_was_measured_as_fastest(name: str) -> None:
    rules = rules_for(parse_target(name))
    rows = kernel_tables.load_rows(rules.isa, "conv2d_fp32")
    assert len(rows) > 20
    chosen = set()
    for row in rows:
        info = {"OH": row["H"], "OW": row["W"], "IC": row["IC"], "OC": row["OC"]}
        algorithm = winograd.choose_algorithm(info, rules, "conv2d_fp32", ALGORITHMS)
        kernel = algorithm.name if algorithm else "direct"
        assert row["costs"][kernel] == min(row["costs"].values())
        chosen.add(kernel)
    # Each kernel is there because it is the fastest somewhere.
    assert chosen == {"direct", *ALGORITHMS}


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
    info = {"OH": 32, "OW": 32, "IC": 64, "OC": 64}
    assert winograd.choose_algorithm(info, rules, "conv2d_fp32", ALGORITHMS) is None


# (input shape, output channels, padding, algorithm).
EMULATED: list[tuple[tuple[int, ...], int, tuple[int, ...], Algorithm]] = [
    ((1, 8, 8, 16), 16, SAME, F2),
    ((1, 8, 8, 16), 16, SAME, F4),
    ((2, 7, 9, 5), 19, (0, 1, 2, 0), F2),
    ((2, 7, 9, 5), 19, (0, 1, 2, 0), F4),
]


def test_the_emulated_a72_computes_them_too(tmp_path: Path) -> None:
    target = parse_target(RPI4)
    with open_device("emulated-a72").open() as session:
        for index, (shape, outs, padding, algorithm) in enumerate(EMULATED):
            x, weight, other = operands(shape, outs, padding)
            library = tmp_path / f"{index}.so"
            lowered = lower(conv_module(shape, weight, padding), target, algorithm)
            relax.build(lowered, target=target).export_library(
                str(library), fcompile=export_fcompile("aarch64-linux-gnu")
            )
            (actual,) = session.run(library, [x, other])
            assert error_of(actual, x, weight, other, padding) < algorithm.relative_error
