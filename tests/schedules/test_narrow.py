"""Narrow kernels against the integer reference, and the proof that their 16-bit sums never overflow."""

from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from tvm_compress.schedules import narrow, ops, reference
from tvm_compress.schedules.apply import kernel_infos, lower_to_kernels
from tvm_compress.schedules.intrin.narrow import INT16_MAX, narrow_dot_for
from tvm_compress.schedules.target_rules import parse_target

HOST = "host"
HASWELL = "llvm -mcpu=haswell -mtriple=x86_64-unknown-linux-gnu"
SKYLAKE_X = "llvm -mcpu=skylake-avx512 -mtriple=x86_64-unknown-linux-gnu"
CASCADE_LAKE = "llvm -mcpu=cascadelake -mtriple=x86_64-unknown-linux-gnu"
A72 = "raspberry-pi/4b-aarch64"


def make_site(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, bits: tuple[int, int], **attrs: Any
) -> tvm.IRModule:
    """A module of one bit-serial layer; `bits` are those of activations and weights."""
    common = {"zero_point": 0, "scheme": "bitserial", "activation_bits": bits[0], "weight_bits": bits[1]}
    if w.ndim == 4:
        common |= {"strides": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1}
    data = relax.Var("x", relax.TensorType(x.shape, str(x.dtype)))
    bb = relax.BlockBuilder()
    with bb.function("main", [data]):
        with bb.dataflow():
            operator = "conv2d" if w.ndim == 4 else "dense"
            call = ops.call(operator, [data, relax.const(w), relax.const(b)], **(common | attrs))
            result = bb.emit_output(call)
        bb.emit_func_output(result)
    return bb.get()


def random_site(
    rng: np.random.Generator, x_shape: tuple[int, ...], w_shape: tuple[int, ...], bits: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = rng.integers(0, 2 ** bits[0], x_shape).astype(np.uint8)
    limit = 2 ** (bits[1] - 1) - 1
    w = rng.choice([-1, 1], w_shape) if bits[1] == 1 else rng.integers(-limit, limit + 1, w_shape)
    return x, w.astype(np.int8), rng.integers(-500, 500, w_shape[0]).astype(np.int32)


def run(module: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    target = parse_target(HOST)
    executable = relax.build(lower_to_kernels(module, target), target=target)
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()


def kinds(module: tvm.IRModule, target: str) -> list[tuple[str, float, float, float]]:
    """Kind, scheme and backend of a module's kernels for a target."""
    parsed = parse_target(target)
    return [
        (
            info.kind,
            info.features["is_bitserial"],
            info.features["backend_popcount"],
            info.features["backend_narrow"],
        )
        for info in kernel_infos(lower_to_kernels(module, parsed), parsed)
        if info.kind != "bitpack"
    ]


@given(
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    channels=st.tuples(st.sampled_from([32, 64]), st.sampled_from([8, 16, 24])),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    bits=st.sampled_from([(6, 6), (4, 4), (5, 2), (6, 1), (3, 5)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=8, deadline=None)
def test_any_convolution_of_few_bits_is_exact(
    size: tuple[int, int],
    channels: tuple[int, int],
    kernel: int,
    stride: int,
    padding: tuple[int, ...],
    bits: tuple[int, int],
    seed: int,
) -> None:
    ic, oc = channels
    x, w, b = random_site(np.random.default_rng(seed), (1, *size, ic), (oc, ic, kernel, kernel), bits)
    geometry: dict[str, Any] = {
        "strides": [stride, stride],
        "padding": list(padding),
        "zero_point": seed % 2 ** bits[0],
    }
    np.testing.assert_array_equal(
        run(make_site(x, w, b, bits, **geometry), x), reference.conv2d(x, w, b, **geometry)
    )


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("bits", [(6, 6), (4, 3)])
def test_extreme_values_are_exact(bits: tuple[int, int], sign: int) -> None:
    x = np.full((1, 4, 4, 128), 2 ** bits[0] - 1, np.uint8)
    w = np.full((16, 128, 3, 3), sign * (2 ** (bits[1] - 1) - 1), np.int8)
    b = np.zeros(16, np.int32)
    np.testing.assert_array_equal(run(make_site(x, w, b, bits), x), reference.conv2d(x, w, b))


def test_dense_layers_are_exact() -> None:
    x, w, b = random_site(np.random.default_rng(0), (3, 96), (24, 96), (6, 5))
    np.testing.assert_array_equal(
        run(make_site(x, w, b, (6, 5), zero_point=9), x), reference.dense(x, w, b, 9)
    )


@given(
    shape=st.tuples(
        st.integers(1, 9), st.integers(1, 40).map(lambda n: 4 * n), st.integers(1, 5), st.integers(1, 5)
    ),
    bits=st.tuples(st.integers(1, 6), st.integers(2, 6)),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_no_sum_on_the_way_leaves_16_bits(
    shape: tuple[int, int, int, int], bits: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    _, w, _ = random_site(rng, (1,), shape, bits)
    w[0] = np.abs(w[0])  # the worst for sums
    largest = 2 ** bits[0] - 1
    chunks = narrow.choose_chunks(w, largest)
    assert chunks is not None
    assert [outer * inside for outer, inside in chunks] == [shape[2], shape[3], shape[1] // 4]
    assert narrow.largest_partial_sum(w, largest, chunks) <= INT16_MAX
    # The worst activations: all products of one sign. No order of summation passes what they reach.
    (_, y_inside), (_, x_inside), (_, k_inside) = chunks
    part = w[:, : 4 * k_inside, :y_inside, :x_inside].astype(np.int64)
    for half in range(2):
        lanes = part.reshape(shape[0], k_inside, 2, 2, y_inside, x_inside)[:, :, half]
        for worst in (np.maximum(lanes, 0), np.minimum(lanes, 0)):
            assert np.abs(worst.sum(axis=(1, 2, 3, 4)) * largest).max() <= INT16_MAX


def test_weights_that_overflow_a_step_have_no_chunks() -> None:
    w = np.full((8, 4, 1, 1), 127, np.int8)
    assert narrow.choose_chunks(w, 255) is None
    assert narrow.choose_chunks(w, 127) == ((1, 1), (1, 1), (1, 1))


@pytest.mark.parametrize(
    ("target", "bits", "expected"),
    [
        (HASWELL, (4, 4), ("conv2d_int8", 1, 0, 1)),
        (HASWELL, (1, 1), ("conv2d_bitserial", 1, 1, 0)),
        (SKYLAKE_X, (4, 4), ("conv2d_int8", 1, 0, 1)),
        (CASCADE_LAKE, (4, 4), ("conv2d_int8", 1, 0, 0)),
        (A72, (4, 4), ("conv2d_int8", 1, 0, 0)),
        (A72, (1, 2), ("conv2d_bitserial", 1, 1, 0)),
    ],
)
def test_the_fastest_backend_computes_a_scheme(
    target: str, bits: tuple[int, int], expected: tuple[str, float, float, float]
) -> None:
    x, w, b = random_site(np.random.default_rng(0), (1, 4, 4, 32), (16, 32, 3, 3), bits)
    assert kinds(make_site(x, w, b, bits), target) == [expected]


@pytest.mark.parametrize(("target", "register"), [(HASWELL, "ymm"), (SKYLAKE_X, "zmm")])
def test_bytes_are_multiplied_in_whole_vectors(target: str, register: str) -> None:
    x, w, b = random_site(np.random.default_rng(0), (1, 6, 6, 32), (32, 32, 3, 3), (4, 4))
    parsed = parse_target(target)
    executable = relax.build(lower_to_kernels(make_site(x, w, b, (4, 4)), parsed), target=parsed)
    text = "".join(part.inspect_source("asm") for part in executable.mod.imports if part.kind == "llvm")
    assert "vpmaddubsw" in text
    assert any("vpmaddubsw" in line and register in line for line in text.splitlines())


def test_instruction_sets_without_a_gain_have_no_narrow_dot() -> None:
    assert narrow_dot_for("avx512vnni", 16) is None
    assert narrow_dot_for("a72", 16) is None
    assert narrow_dot_for("avx2", 12) is None
