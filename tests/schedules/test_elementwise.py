"""The dialect's element-wise operators exactly as numpy computes them, and schedules of everything else."""

import numpy as np
import pytest
import torch
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, tirx

from tvm_compress.errors import KernelError
from tvm_compress.schedules import apply, counts, elementwise, ops, reference
from tvm_compress.schedules.target_rules import parse_target


def unary(shape, dtype, operation):
    """Make a module of one input and what `operation` makes of it."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, dtype))
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(operation(builder, x))
        builder.emit_func_output(out)
    return builder.get()


def build(module, target=None):
    target = target or parse_target("host")
    return relax.build(apply.lower_to_kernels(module, target), target=target)


def run(module, x):
    return relax.VirtualMachine(build(module), tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()


SHAPES = st.sampled_from([(1, 4, 4, 16), (2, 5, 3, 37), (1, 7, 7, 3), (3, 10), (1, 2, 2, 64)])


@settings(max_examples=12, deadline=None)
@given(
    SHAPES,
    st.sampled_from([(0, "int8"), (5, "int8"), (20, "int32"), (31, "uint8"), (34, "int32"), (48, "int8")]),
    st.integers(-5, 5),
    st.booleans(),
)
def test_requantize_is_exact(shape, shift_and_dtype, zero_point, per_channel):
    shift, dtype = shift_and_dtype
    rng = np.random.default_rng(shift)
    x = rng.integers(-(2**31), 2**31, shape).astype(np.int32)
    # Halves, both signs, and the extremes.
    x.flat[:6] = [2**31 - 1, -(2**31), 1 << (shift % 31), -(1 << (shift % 31)), 3, -3]
    multiplier = rng.integers(1, 2**31, shape[-1] if per_channel else 1).astype(np.int32)
    multiplier[0] = 1 << min(30, max(0, shift - 1))
    limits = np.iinfo(dtype)
    zero_point = 0 if dtype == "int32" else zero_point
    attrs = dict(shift=shift, zero_point=zero_point, qmin=int(limits.min), qmax=int(limits.max), dtype=dtype)
    module = unary(shape, "int32", lambda _, v: ops.call("requantize", [v, relax.const(multiplier)], **attrs))
    actual = run(module, x)
    assert actual.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(actual, reference.requantize(x, multiplier, **attrs))


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([(255, 0), (255, 30), (1000, 14), (2**20, 8), (2**24, 33), (2**30 - 1, 8)]),
    st.sampled_from(["int8", "int32"]),
    st.booleans(),
)
def test_a_bound_changes_no_requantization(bound_and_shift, dtype, identity):
    bound, shift = bound_and_shift
    rng = np.random.default_rng(bound)
    x = rng.integers(-bound, bound + 1, (1, 3, 5, 19)).astype(np.int32)
    # The extremes, and halves of both signs.
    x.flat[:6] = [bound, -bound, *[min(bound, 1 << max(0, shift - 1)) * s for s in (1, -1, 3, -3)]]
    x = np.clip(x, -bound, bound)
    largest = 1 if identity else min(2**31 - 1, max(2, (2**31 - 2**29 - 1) // bound if shift < 31 else 2**31))
    multiplier = np.array([largest], np.int32) if identity else rng.integers(1, largest, 19).astype(np.int32)
    multiplier[-1] = largest
    limits = np.iinfo(dtype)
    attrs = dict(shift=shift, zero_point=0, qmin=int(limits.min), qmax=int(limits.max), dtype=dtype)
    module = unary(
        x.shape,
        "int32",
        lambda _, v: ops.call("requantize", [v, relax.const(multiplier)], **attrs, bound=bound),
    )
    np.testing.assert_array_equal(run(module, x), reference.requantize(x, multiplier, **attrs))


@pytest.mark.parametrize(
    ("bound", "shift", "multiplier", "wide"),
    [
        (255, 14, 2**22, False),
        (255, 14, 2**24, True),
        (2**30 - 1, 8, 1, False),
        (2**31 - 1, 8, 1, True),
        (None, 8, 1, True),
    ],
)
def test_requantizations_are_computed_in_32_bits_where_they_fit(bound, shift, multiplier, wide):
    attrs = dict(shift=shift, zero_point=3, qmin=-128, qmax=127, dtype="int8")
    if bound is not None:
        attrs["bound"] = bound
    factor = relax.const(np.array([multiplier], np.int32))
    module = unary((1, 4, 4, 8), "int32", lambda _, v: ops.call("requantize", [v, factor], **attrs))
    lowered = apply.lower_to_kernels(module, parse_target("host"))
    (func,) = (func for func in lowered.functions.values() if isinstance(func, tirx.PrimFunc))
    assert ('Cast("int64"' in func.script()) == wide


@settings(max_examples=6, deadline=None)
@given(SHAPES, st.sampled_from([("int8", -128, 127), ("uint8", 0, 255), ("uint8", 0, 15)]))
def test_quantize_and_dequantize_are_exact(shape, kind):
    dtype, qmin, qmax = kind
    rng = np.random.default_rng(1)
    x = (rng.standard_normal(shape) * 3).astype(np.float32)
    x.flat[:4] = [0.0125, -0.0125, 1e30, -1e30]
    attrs = dict(scale=0.025, zero_point=3, qmin=qmin, qmax=qmax, dtype=dtype)
    quantized = run(unary(shape, "float32", lambda _, v: ops.call("quantize", [v], **attrs)), x)
    np.testing.assert_array_equal(quantized, reference.quantize(x, **attrs))
    scale = rng.uniform(0.1, 1, shape[-1]).astype(np.float32)
    module = unary(shape, dtype, lambda _, v: ops.call("dequantize", [v, relax.const(scale)], zero_point=3))
    np.testing.assert_array_equal(run(module, quantized), reference.dequantize(quantized, scale, 3))


def test_dequantize_by_a_scalar():
    x = np.arange(-6, 6, dtype=np.int8).reshape(3, 4)
    scale = relax.const(np.float32(0.25))
    module = unary(x.shape, "int8", lambda _, v: ops.call("dequantize", [v, scale], zero_point=0))
    np.testing.assert_array_equal(run(module, x), x * np.float32(0.25))


def test_a_shift_beyond_64_bits_is_refused():
    attrs = dict(shift=63, zero_point=0, qmin=0, qmax=1, dtype="int8")
    one = relax.const(np.ones(1, np.int32))
    module = unary((1, 8), "int32", lambda _, v: ops.call("requantize", [v, one], **attrs))
    with pytest.raises(KernelError, match="62"):
        apply.lower_to_kernels(module, parse_target("host"))


@pytest.mark.parametrize("channels", [1, 3, 16, 24, 37, 112])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_pools_are_torchs(channels, dtype):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2, 9, 8, channels)) * 20).astype(dtype)
    module = unary(
        x.shape, dtype, lambda _, v: relax.op.nn.max_pool2d(v, (3, 3), (2, 2), (1, 1), layout="NHWC")
    )
    as_torch = torch.tensor(x).float().permute(0, 3, 1, 2)
    expected = torch.nn.functional.max_pool2d(as_torch, 3, 2, 1).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(run(module, x), expected.numpy().astype(dtype))
    if dtype == "float32":
        module = unary(x.shape, dtype, lambda _, v: relax.op.nn.avg_pool2d(v, (2, 2), (2, 2), layout="NHWC"))
        expected = torch.nn.functional.avg_pool2d(as_torch, 2, 2).permute(0, 2, 3, 1)
        np.testing.assert_allclose(run(module, x), expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 7, 7, 64), (2, 5, 3, 37), (1, 1, 1, 1)])
@pytest.mark.parametrize("keepdims", [False, True])
def test_means_and_integer_sums(shape, keepdims):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    mean = run(unary(shape, "float32", lambda _, v: relax.op.mean(v, [1, 2], keepdims)), x)
    np.testing.assert_allclose(mean, x.mean((1, 2), keepdims=keepdims), rtol=1e-5, atol=1e-5)
    q = rng.integers(-128, 128, shape).astype(np.int8)

    def total(builder, v):
        return relax.op.sum(builder.emit(relax.op.astype(v, "int32")), [1, 2], keepdims)

    np.testing.assert_array_equal(
        run(unary(shape, "int8", total), q), q.astype(np.int32).sum((1, 2), keepdims=keepdims)
    )


@pytest.mark.parametrize("channels", [1, 3, 16, 37])
@pytest.mark.parametrize(("strides", "padding"), [((2, 2), (0, 0, 0, 0)), ((1, 2), (1, 0, 2, 1))])
def test_sums_over_windows(channels, strides, padding):
    x = np.random.default_rng(0).integers(-(2**20), 2**20, (2, 7, 6, channels)).astype(np.int32)
    window = dict(pool_size=[3, 2], strides=list(strides), padding=list(padding))
    top, left, bottom, right = padding
    wide = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(wide, (3, 2), axis=(1, 2))
    expected = windows.sum((-1, -2))[:, :: strides[0], :: strides[1]]
    found = run(unary(x.shape, "int32", lambda _, v: ops.call("window_sum", [v], **window)), x)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("channels", [1, 3, 16])
def test_transpositions_softmax_and_chains(channels):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, channels, 6, 5)).astype(np.float32)

    def network(builder, v):
        v = builder.emit(relax.op.permute_dims(v, [0, 2, 3, 1]))
        v = builder.emit(relax.op.nn.relu(builder.emit(relax.op.add(v, v))))
        v = builder.emit(relax.op.reshape(builder.emit(relax.op.permute_dims(v, [0, 3, 1, 2])), (2, -1)))
        return relax.op.nn.softmax(v)

    expected = torch.softmax(torch.relu(torch.tensor(x) * 2).flatten(1), 1).numpy()
    np.testing.assert_allclose(run(unary(x.shape, "float32", network), x), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.permutations([1, 2, 3]), st.tuples(*[st.sampled_from([1, 2, 3, 8, 15, 16, 33])] * 3), st.booleans())
def test_transpositions_and_what_follows_are_exact(order, extents, flat):
    attrs = dict(scale=0.5, zero_point=3, qmin=-128, qmax=127, dtype="int8")
    x = np.random.default_rng(0).integers(-99, 99, (2, *extents)).astype(np.float32)

    def network(builder, v):
        v = builder.emit(relax.op.permute_dims(v, [0, *order]))
        v = builder.emit(ops.call("quantize", [v], **attrs))
        return relax.op.nn.batch_flatten(v) if flat else v

    expected = np.clip(np.rint(x / 0.5) + 3, -128, 127).astype(np.int8).transpose(0, *order)
    found = run(unary(x.shape, "float32", network), x)
    np.testing.assert_array_equal(found, expected.reshape(found.shape))


@pytest.mark.parametrize(
    ("target", "rounding"),
    [
        ("llvm -mcpu=haswell -mtriple=x86_64-linux-gnu", "vroundps"),
        ("raspberry-pi/4b-aarch64", "frint"),
    ],
)
def test_quantization_rounds_whole_vectors(target, rounding):
    attrs = dict(scale=0.025, zero_point=3, qmin=-128, qmax=127, dtype="int8")
    module = unary((1, 8, 8, 16), "float32", lambda _, v: ops.call("quantize", [v], **attrs))
    assembly = build(module, parse_target(target)).mod.imports[0].inspect_source("asm")
    lines = [line for line in assembly.splitlines() if rounding in line]
    assert lines
    assert all("ymm" in line or ".4s" in line for line in lines)


def test_flattening_channels_runs_in_vectors():
    def network(builder, v):
        v = builder.emit(relax.op.permute_dims(v, [0, 3, 1, 2]))
        return relax.op.nn.batch_flatten(v)

    target = parse_target("raspberry-pi/4b-aarch64")
    lowered = apply.lower_to_kernels(unary((1, 4, 4, 64), "int8", network), target)
    (kernel,) = [func for func in lowered.functions.values() if isinstance(func, tirx.PrimFunc)]
    counted = counts.executed(kernel, 128)
    assert counted["vector_loads"] == 4 * 4 * 64 / 4
    # Their places in the output lie apart.
    assert counted["scalar_stores"] == 4 * 4 * 64
    assert counted["scalar_loads"] == counted["divisions"] == 0


@settings(max_examples=40, deadline=None)
@given(st.floats(2**-20, 1024, width=32), st.integers(0, 2**32 - 1))
def test_a_scale_whose_reciprocal_is_exact_quantizes_alike(scale, seed):
    scale = np.float32(scale)
    if not elementwise.reciprocal_is_exact(float(scale), -128, 127):
        return
    x = (np.random.default_rng(seed).uniform(-130, 130, 4096) * scale).astype(np.float32)
    inverse = np.float64(np.float32(1) / scale)
    quotient = x * np.float32(inverse)
    rest = (x - quotient * np.float64(scale)).astype(np.float32)
    corrected = (rest * inverse + quotient).astype(np.float32)
    np.testing.assert_array_equal(np.rint(corrected), np.rint(x / scale))


def test_scales_without_an_exact_reciprocal_are_divided_by():
    # All bits of the fraction are ones: there the correction may fail (Markstein 1990).
    assert not elementwise.reciprocal_is_exact(float(np.nextafter(np.float32(2), np.float32(0))), -255, 255)
    # What is left over would vanish.
    assert not elementwise.reciprocal_is_exact(1e-38, -128, 127)
    assert elementwise.reciprocal_is_exact(0.0235, -128, 127)


def test_pooling_bytes_compares_whole_vectors_of_them():
    def network(_, v):
        return relax.op.nn.max_pool2d(v, (2, 2), (2, 2), layout="NHWC")

    module = unary((1, 8, 8, 32), "int8", network)
    assembly = build(module, parse_target("raspberry-pi/4b-aarch64")).mod.imports[0].inspect_source("asm")
    lines = [line for line in assembly.splitlines() if "smax" in line]
    assert lines
    assert all(".16b" in line for line in lines)
