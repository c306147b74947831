"""Integer Winograd kernels against the integer reference, to the last bit, wherever sums wrap around."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.target import Target

from tests.schedules.test_int8 import A72, HOST, make_site, random_site
from tests.schedules.test_winograd import taps
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import open_device
from tvm_compress.schedules import apply, kernel_tables, ops, reference, winograd, winograd_choice
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.schedules.winograd_algorithm import (
    INTEGER_ALGORITHMS,
    IntegerAlgorithm,
    fits,
    pack_weights,
    transform_weights,
)

SAME = [1, 1, 1, 1]
F2, F4 = INTEGER_ALGORITHMS["F2"], INTEGER_ALGORITHMS["F4"]
S2, S4 = INTEGER_ALGORITHMS["S2"], INTEGER_ALGORITHMS["S4"]
WIDE = [algorithm for algorithm in INTEGER_ALGORITHMS.values() if algorithm.data == "int16"]
BYTES = [algorithm for algorithm in INTEGER_ALGORITHMS.values() if algorithm.data == "int8"]
EACH = pytest.mark.parametrize("algorithm", WIDE, ids=lambda algorithm: algorithm.name)


def lower(module: tvm.IRModule, target: Target, algorithm: IntegerAlgorithm) -> tvm.IRModule:
    """Lower with the algorithm, where it may be taken."""
    name = algorithm.name
    with patch.object(winograd, "choose_algorithm", lambda info, rules, table, allowed: allowed.get(name)):
        return apply.lower_to_kernels(module, target)


def run(module: tvm.IRModule, x: np.ndarray, algorithm: IntegerAlgorithm, target: str = HOST) -> np.ndarray:
    """Run the module by the algorithm, which must have been taken."""
    parsed = parse_target(target)
    lowered = lower(module, parsed, algorithm)
    assert any(info.features["backend_winograd"] for info in apply.kernel_infos(lowered, parsed))
    machine = relax.VirtualMachine(relax.build(lowered, target=parsed), tvm.cpu())
    result: np.ndarray = machine["main"](tvm.runtime.tensor(x)).numpy()
    return result


@EACH
def test_the_matrices_are_an_algorithm_of_convolution(algorithm: IntegerAlgorithm) -> None:
    """Output a is the sum over taps k of weight k times input a + k, times the factor of row a."""
    # In this order: what scales the outputs shall not depend on which matrix was asked for first.
    factors, at = algorithm.row_factors, algorithm.output_matrix
    bt, g = algorithm.input_matrix, algorithm.weight_matrix[algorithm.places]
    assert all(matrix.dtype == np.int64 for matrix in (at, bt, g))
    products = np.einsum("ai,ik,id->akd", at, g, bt)
    np.testing.assert_array_equal(products, taps(algorithm) * factors[:, None, None])
    column = list(np.random.default_rng(0).integers(-99, 99, algorithm.n))
    patch = column[: algorithm.patch]
    assert algorithm.transform_input(patch, int) == list(bt @ patch)
    assert algorithm.transform_output(column, int) == list(at @ column)


@EACH
@given(value=st.integers(-(2**29), 2**29))
@settings(max_examples=50, deadline=None)
def test_factors_are_undone_modulo_32_bits(algorithm: IntegerAlgorithm, value: int) -> None:
    value %= 1 << algorithm.bits
    value -= (1 << algorithm.bits) * (value % 2)
    for first, shift in zip(algorithm.row_factors, algorithm.shifts, strict=True):
        for second, other in zip(algorithm.row_factors, algorithm.shifts, strict=True):
            wrapped = value * int(first) * int(second) * algorithm.inverse % (1 << 32)
            signed = wrapped - (1 << 32) * (wrapped >> 31)
            assert signed >> (shift + other) == value


@EACH
def test_transformed_numbers_fit_16_bits(algorithm: IntegerAlgorithm) -> None:
    assert max(map(abs, algorithm.input_range(0, 255))) < 2**15
    for sign in np.ndindex(2, 2, 2):
        weight = (127 * np.array([-1, 1])[np.add.outer(sign, sign) % 2]).astype(np.int8)
        packed = pack_weights(weight[None, None], algorithm, 1, 2, 2)
        assert packed.dtype == np.int16
        np.testing.assert_array_equal(
            packed[:, :, 0, 0, 0, 0], transform_weights(weight[None, None], algorithm)[:, :, 0, 0]
        )


@EACH
def test_pairs_of_channels_stand_together(algorithm: IntegerAlgorithm) -> None:
    weight = np.random.default_rng(0).integers(-127, 128, (5, 3, 3, 3)).astype(np.int8)
    packed = pack_weights(weight, algorithm, 4, 8, 2)
    assert packed.shape == (algorithm.weight_rows, algorithm.weight_rows, 2, 4, 4, 2)
    transformed = transform_weights(weight, algorithm)
    np.testing.assert_array_equal(packed[:, :, 1, 0, 0, :], transformed[:, :, 4, :2])
    np.testing.assert_array_equal(packed[:, :, 1, 1, 0, 0], transformed[:, :, 4, 2])
    assert not packed[:, :, :, 1, :, 1].any()
    assert not packed[:, :, :, 2:].any()


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    padding = draw(st.sampled_from([SAME, [0, 0, 0, 0], [0, 1, 2, 1], [2, 0, 0, 3]]))
    least = [max(1, 3 - padding[axis] - padding[axis + 2]) for axis in (0, 1)]
    dtype = draw(st.sampled_from(["int8", "uint8"]))
    return {
        "shape": (
            draw(st.integers(1, 2)), *(draw(st.integers(low, 18)) for low in least),
            draw(st.sampled_from([1, 3, 8, 12, 16, 21, 40])),
        ),
        "outs": draw(st.sampled_from([1, 5, 8, 16, 24, 37, 67])),
        "padding": padding,
        "dtype": dtype,
        "zero_point": draw(st.sampled_from([0, -128, 3, 127] if dtype == "int8" else [0, 128, 255])),
        "seed": draw(st.integers(0, 99)),
    }  # fmt: skip


@given(convolutions(), st.sampled_from(WIDE))
@settings(max_examples=16, deadline=None)
def test_any_convolution_is_exact(site: dict[str, Any], algorithm: IntegerAlgorithm) -> None:
    rng = np.random.default_rng(site["seed"])
    x, w, b = random_site(rng, site["shape"], (site["outs"], site["shape"][-1], 3, 3), site["dtype"])
    geometry = {key: site[key] for key in ("padding", "zero_point")} | {"strides": [algorithm.stride] * 2}
    np.testing.assert_array_equal(
        run(make_site(x, w, b, **geometry), x, algorithm), reference.conv2d(x, w, b, **geometry)
    )


@EACH
@pytest.mark.parametrize("target", ["llvm -mcpu=x86-64", HOST])
@pytest.mark.parametrize(("dtype", "value"), [("int8", -128), ("int8", 127), ("uint8", 255)])
@pytest.mark.parametrize("weight", [-127, 127])
def test_the_largest_sums_are_exact(
    algorithm: IntegerAlgorithm, dtype: str, value: int, weight: int, target: str
) -> None:
    if "x86" in target and not parse_target(HOST).attrs["mtriple"].startswith("x86"):
        target = HOST
    largest = max(abs(limit) for limit in (np.iinfo(dtype).min, np.iinfo(dtype).max))
    # As many channels as the 32 bits of F4 hold.
    channels = (2**F4.bits - 1) // (9 * 127 * largest)
    x = np.full((1, 6, 6, channels), value, dtype)
    w = np.full((9, channels, 3, 3), weight, np.int8)
    b = np.zeros(9, np.int32)
    geometry: dict[str, Any] = {
        "padding": SAME, "zero_point": int(np.iinfo(dtype).min), "strides": [algorithm.stride] * 2,
    }  # fmt: skip
    np.testing.assert_array_equal(
        run(make_site(x, w, b, **geometry), x, algorithm, target), reference.conv2d(x, w, b, **geometry)
    )


def test_weights_whose_sums_may_not_fit_get_another_algorithm() -> None:
    channels = 2**F4.bits // (9 * 127 * 128) + 1
    x, w, b = (
        np.ones(shape, dtype)
        for shape, dtype in (((1, 6, 6, channels), "int8"), ((8, channels, 3, 3), "int8"), (8, "int32"))
    )
    allowed: list[list[str]] = []

    def choose(info: Any, rules: Any, table: str, algorithms: dict[str, Any]) -> None:
        assert table == "conv2d_int8"
        allowed.append(sorted(algorithms))

    with patch.object(winograd, "choose_algorithm", choose):
        for weight in (w, 127 * w):
            apply.lower_to_kernels(make_site(x, weight, b, padding=SAME), parse_target(HOST))
    assert list(dict.fromkeys(map(tuple, allowed))) == [("F2", "F4"), ("F2",)]


def few_bits(
    shape: tuple[int, ...], outs: int, bits: tuple[int, int], algorithm: IntegerAlgorithm, zero_point: int
) -> tuple[tvm.IRModule, np.ndarray, np.ndarray]:
    """A layer of (weight, activation) bits with its extreme values, data for it, and the exact result."""
    rng = np.random.default_rng(0)
    limit = 2 ** (bits[0] - 1) - 1
    x = rng.choice([0, 1, 2 ** bits[1] - 2, 2 ** bits[1] - 1], shape).astype(np.uint8)
    w = rng.integers(-limit, limit + 1, (outs, shape[-1], 3, 3)).astype(np.int8)
    # Where each product is as large as it may be, and of one sign.
    x[:, :5, :5] = 2 ** bits[1] - 1
    w[0], w[1] = limit, -limit
    b = rng.integers(-900, 900, outs).astype(np.int32)
    geometry: dict[str, Any] = {
        "strides": [algorithm.stride] * 2, "padding": SAME, "zero_point": zero_point,
    }  # fmt: skip
    names = {"scheme": "bitserial", "weight_bits": bits[0], "activation_bits": bits[1]}
    return make_site(x, w, b, **geometry, **names), x, reference.conv2d(x, w, b, **geometry)


@given(
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    channels=st.tuples(st.sampled_from([32, 64, 96]), st.sampled_from([8, 24, 40])),
    bits=st.tuples(st.integers(2, 4), st.integers(1, 6)),
    algorithm=st.sampled_from(BYTES),
)
@settings(max_examples=6, deadline=None)
def test_any_convolution_of_few_bits_is_exact(
    size: tuple[int, int], channels: tuple[int, int], bits: tuple[int, int], algorithm: IntegerAlgorithm
) -> None:
    ins, outs = channels
    module, x, exact = few_bits((1, *size, ins), outs, bits, algorithm, 2 ** bits[1] - 1)
    # Other kernels of few bits are faster here.
    with patch.object(winograd, "speedup", lambda *arguments: 99.0):
        np.testing.assert_array_equal(run(module, x, algorithm), exact)


@given(
    bits=st.tuples(st.integers(2, 8), st.integers(1, 8)),
    signed=st.booleans(),
    seed=st.integers(0, 99),
    algorithm=st.sampled_from(BYTES),
)
@settings(max_examples=60, deadline=None)
def test_what_fits_bytes_is_computed_in_bytes(
    bits: tuple[int, int], signed: bool, seed: int, algorithm: IntegerAlgorithm
) -> None:
    rng = np.random.default_rng(seed)
    limit = 2 ** (bits[0] - 1) - 1
    weight = limit * rng.choice([-1, 1], (1, 1, 3, 3))
    low, high = (-(2 ** (bits[1] - 1)), 2 ** (bits[1] - 1) - 1) if signed else (0, 2 ** bits[1] - 1)
    patches = rng.choice([low, high], (algorithm.patch, algorithm.patch, 500)) + algorithm.offset((low, high))
    data = np.einsum("ik,jl,kln->ijn", algorithm.input_matrix, algorithm.input_matrix, patches)
    if fits(algorithm, weight, (low, high)):
        assert data.min() >= -128
        assert data.max() <= 127
        assert np.abs(transform_weights(weight, algorithm)).max() <= 127
    else:
        assert bits[0] > {1: 4, 2: 6}[algorithm.stride] or bits[1] > 6


def test_bytes_hold_layers_of_4_bits() -> None:
    narrow, strided = BYTES
    full = np.ones((1, 1, 3, 3), np.int64)
    assert fits(narrow, 14 * full, (0, 31))
    assert fits(narrow, 14 * full, (0, 63))
    assert not fits(narrow, 15 * full, (0, 31))
    assert not fits(narrow, 7 * full, (0, 127))
    assert fits(strided, 31 * full, (0, 63))
    assert not fits(strided, 32 * full, (0, 63))
    assert [narrow.offset((0, largest)) for largest in (31, 63)] == [0, -32]


@pytest.mark.parametrize(
    ("kernel", "attrs"), [(3, {"strides": [2, 1]}), (3, {"dilation": [2, 2]}), (3, {"groups": 2}), (1, {})]
)
def test_other_convolutions_get_the_direct_kernel(kernel: int, attrs: dict[str, Any]) -> None:
    x = np.ones((1, 12, 12, 8), np.int8)
    w = np.ones((8, 8 // attrs.get("groups", 1), kernel, kernel), np.int8)
    target = parse_target(HOST)
    lowered = lower(make_site(x, w, np.zeros(8, np.int32), **attrs), target, F4)
    assert not any(info.features["backend_winograd"] for info in apply.kernel_infos(lowered, target))


def test_compact_libraries_have_none() -> None:
    x, w, b = random_site(np.random.default_rng(0), (1, 16, 16, 64), (64, 64, 3, 3))
    target = parse_target(A72)
    kernels = {}
    for compact in (False, True):
        lowered = apply.lower_to_kernels(make_site(x, w, b, padding=SAME), target, compact)
        (kernels[compact],) = apply.kernel_infos(lowered, target)
    assert [kernels[compact].features["backend_winograd"] for compact in (False, True)] == [1, 0]
    assert kernels[True].features["weight_bytes"] == w.size + b.nbytes
    assert kernels[False].features["weight_bytes"] == 2 * F4.n**2 * 64 * 64 + b.nbytes


def requantized(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, multiplier: np.ndarray, stride: int = 1
) -> tvm.IRModule:
    """A convolution and the requantization behind it."""
    data = relax.Var("x", relax.TensorType(x.shape, str(x.dtype)))
    builder = relax.BlockBuilder()
    site = {"strides": [stride] * 2, "dilation": [1, 1], "groups": 1, "scheme": "int8"}
    with builder.function("main", [data]):
        with builder.dataflow():
            y = ops.call(
                "conv2d", [data, relax.const(w), relax.const(b)],
                **site, padding=SAME, zero_point=-128, activation_bits=8, weight_bits=8,
            )  # fmt: skip
            y = ops.call(
                "requantize", [builder.emit(y), relax.const(multiplier)],
                shift=38, zero_point=-128, qmin=-128, qmax=127, dtype="int8",
            )  # fmt: skip
            out = builder.emit_output(y)
        builder.emit_func_output(out)
    return builder.get()


@EACH
def test_the_requantization_is_fused(algorithm: IntegerAlgorithm) -> None:
    x, w, b = random_site(np.random.default_rng(0), (1, 9, 14, 16), (21, 16, 3, 3))
    multiplier = np.random.default_rng(1).integers(1 << 29, 1 << 30, 21).astype(np.int32)
    target = parse_target(HOST)
    module = requantized(x, w, b, multiplier, algorithm.stride)
    (info,) = apply.kernel_infos(lower(module, target, algorithm), target)
    assert info.kind == "conv2d_int8"
    assert info.features["is_int8"] == info.features["backend_winograd"] == 1
    exact = reference.requantize(
        reference.conv2d(x, w, b, -128, [algorithm.stride] * 2, SAME), multiplier, 38, -128, -128, 127
    )
    np.testing.assert_array_equal(run(module, x, algorithm), exact)


@pytest.mark.parametrize(
    "name",
    ["llvm -mcpu=cascadelake -mtriple=x86_64-linux-gnu", "llvm -mcpu=haswell -mtriple=x86_64-linux-gnu"],
)
def test_x86_multiplies_pairs(name: str) -> None:
    x, w, b = random_site(np.random.default_rng(0), (1, 8, 8, 16), (32, 16, 3, 3))
    target = parse_target(name)
    executable = relax.build(lower(make_site(x, w, b, padding=SAME), target, F4), target=target)
    text = "".join(part.inspect_source("asm") for part in executable.mod.imports if part.kind == "llvm")
    assert "vpmaddwd" in text


def test_the_a72_multiplies_and_adds_in_one_instruction() -> None:
    x, w, b = random_site(np.random.default_rng(0), (1, 8, 8, 16), (32, 16, 3, 3))
    target = parse_target(A72)
    executable = relax.build(lower(make_site(x, w, b, padding=SAME), target, F4), target=target)
    text = "".join(part.inspect_source("asm") for part in executable.mod.imports if part.kind == "llvm")
    assert "smlal\tv0.4s" in text


X86 = "llvm -mcpu={} -mtriple=x86_64-linux-gnu"


@pytest.mark.parametrize("name", [A72, X86.format("haswell"), X86.format("cascadelake")])
def test_the_tables_hold_integer_kernels(name: str) -> None:
    rules = rules_for(parse_target(name))
    rows = kernel_tables.load_rows(rules.isa, "conv2d_int8")
    assert len(rows) > 20
    chosen = set()
    for row in rows:
        info = {"OH": row["H"], "OW": row["W"], "IC": row["IC"], "OC": row["OC"], "stride": 1}
        allowed = {key: INTEGER_ALGORITHMS[key] for key in row["costs"] if key != "direct"}
        algorithm = winograd_choice.choose_algorithm(info, rules, "conv2d_int8", allowed)
        kernel = algorithm.name if algorithm else "direct"
        assert row["costs"][kernel] == min(row["costs"].values())
        chosen.add(kernel)
    assert {"direct", "F4"} <= chosen


# (input shape, type, zero point, output channels, padding, algorithm).
EMULATED: list[tuple[tuple[int, ...], str, int, int, list[int], IntegerAlgorithm]] = [
    ((1, 8, 8, 16), "int8", -128, 16, SAME, F2),
    ((1, 8, 8, 32), "int8", 3, 16, SAME, F4),
    ((2, 7, 9, 5), "uint8", 0, 19, [0, 1, 2, 0], F2),
    ((2, 7, 9, 5), "uint8", 255, 19, [0, 1, 2, 0], F4),
    ((1, 16, 16, 16), "int8", -128, 16, SAME, S4),
    ((2, 7, 14, 5), "uint8", 255, 19, [0, 1, 2, 0], S2),
]


def test_the_emulated_a72_computes_them_too(tmp_path: Path) -> None:
    target = parse_target(A72)
    with open_device("emulated-a72").open() as session:
        for index, (shape, dtype, zero_point, outs, padding, algorithm) in enumerate(EMULATED):
            x, w, b = random_site(np.random.default_rng(index), shape, (outs, shape[-1], 3, 3), dtype)
            geometry: dict[str, Any] = {
                "strides": [algorithm.stride] * 2, "padding": padding, "zero_point": zero_point,
            }  # fmt: skip
            site = make_site(x, w, b, **geometry)
            library = tmp_path / f"{index}.so"
            relax.build(lower(site, target, algorithm), target=target).export_library(
                str(library), fcompile=export_fcompile("aarch64-linux-gnu")
            )
            (actual,) = session.run(library, [x])
            np.testing.assert_array_equal(actual, reference.conv2d(x, w, b, **geometry))


def test_the_emulated_a72_multiplies_bytes(tmp_path: Path) -> None:
    target = parse_target(A72)
    cases = [((1, 8, 8, 32), 16, (4, 5), 0), ((2, 7, 9, 64), 24, (4, 6), 63)]
    with open_device("emulated-a72").open() as session:
        for algorithm in BYTES:
            for shape, outs, bits, zero_point in cases:
                module, x, exact = few_bits(shape, outs, bits, algorithm, zero_point)
                library = tmp_path / f"{algorithm.stride}-{bits[1]}.so"
                # Lookups are faster for layers as small as these.
                with patch.object(winograd, "speedup", lambda *arguments: 99.0):
                    lowered = lower(module, target, algorithm)
                assert apply.kernel_infos(lowered, target)[0].features["backend_winograd"] == 1
                executable = relax.build(lowered, target=target)
                (text,) = (p.inspect_source("asm") for p in executable.mod.imports if p.kind == "llvm")
                assert "sadalp" in text
                executable.export_library(str(library), fcompile=export_fcompile("aarch64-linux-gnu"))
                (actual,) = session.run(library, [x])
                np.testing.assert_array_equal(actual, exact)
