import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from tests.tvm_compress.twin_networks import Build
from tvm_compress.errors import ModelError, UnsupportedOperatorError
from tvm_compress.schedules import ops
from tvm_compress.twin import Twin
from tvm_compress.twin.integer_ops import exact_pieces

INPUT_SCALE = 0.02


def integer_module(channels, size, make_layer, zero_point=-5, dtype="int8"):
    """Quantize the input, then whatever `make_layer(build, q)` gives."""
    b = Build((1, channels, size, size), "integer")
    low, high = (-128, 127) if dtype == "int8" else (0, 255)

    def make():
        q = ops.call(
            "quantize",
            [b.nhwc(b.x)],
            scale=INPUT_SCALE,
            zero_point=zero_point,
            qmin=low,
            qmax=high,
            dtype=dtype,
        )
        return b.emit(make_layer(b, b.emit(q)))

    return b.finish(make)


def quantized(x, zero_point, low, high):
    steps = np.rint(x.transpose(0, 2, 3, 1) / np.float32(INPUT_SCALE)) + zero_point
    return np.clip(steps, low, high).astype(np.int64)


def conv_reference(q, w, b, stride, padding, dilation, groups):
    """Convolution of int64 NHWC `q` (zero point subtracted) with OIHW weights, by its definition."""
    top, left, bottom, right = padding
    q = np.pad(q, ((0, 0), (top, bottom), (left, right), (0, 0)))
    o, per_group, kh, kw = w.shape
    height = (q.shape[1] - dilation * (kh - 1) - 1) // stride + 1
    width = (q.shape[2] - dilation * (kw - 1) - 1) // stride + 1
    y = np.zeros((q.shape[0], height, width, o), np.int64)
    for channel in range(o):
        first = channel // (o // groups) * per_group
        for i in range(kh):
            for j in range(kw):
                rows = slice(i * dilation, i * dilation + stride * (height - 1) + 1, stride)
                columns = slice(j * dilation, j * dilation + stride * (width - 1) + 1, stride)
                part = q[:, rows, columns, first : first + per_group]
                y[..., channel] += part @ w[channel, :, i, j].astype(np.int64)
    return y + b


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    size=st.integers(5, 8),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    groups=st.sampled_from([1, 2, 4]),
    dtype=st.sampled_from(["int8", "uint8"]),
)
def test_convolution_equals_numpy(seed, size, kernel, stride, dilation, padding, groups, dtype):
    rng = np.random.default_rng(seed)
    w = rng.integers(-127, 128, (8, 4 // groups, kernel, kernel)).astype(np.int8)
    b = rng.integers(-(2**20), 2**20, 8).astype(np.int32)
    zero_point = -5 if dtype == "int8" else 0

    def layer(build, q):
        return ops.call(
            "conv2d",
            [q, relax.const(w), relax.const(b)],
            strides=[stride, stride],
            padding=padding,
            dilation=[dilation, dilation],
            groups=groups,
            zero_point=zero_point,
            scheme="int8",
            activation_bits=8,
            weight_bits=8,
            site="c",
        )

    twin = Twin(integer_module(4, size, layer, zero_point, dtype))
    x = rng.normal(size=(2, 4, size, size)).astype(np.float32)
    q = quantized(x, zero_point, *((-128, 127) if dtype == "int8" else (0, 255))) - zero_point
    expected = conv_reference(q, w, b, stride, padding, dilation, groups)
    assert twin.stage == "integer"
    result = twin.predict(x)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(twin.trace(x)["c"], expected)


@pytest.mark.parametrize(("channels", "pieces"), [(64, 2), (256, 0)])
def test_sums_that_float32_cannot_hold_are_exact(channels, pieces):
    w = np.full((2, channels, 3, 3), 127, np.int8)
    w[1] = np.random.default_rng(0).integers(-127, 128, w[1].shape)
    b = np.array([2**24 + 1, -3], np.int32)
    assert exact_pieces(torch.from_numpy(w), 255) == pieces

    def layer(build, q):
        return ops.call(
            "conv2d",
            [q, relax.const(w), relax.const(b)],
            strides=[1, 1],
            padding=[1, 1, 1, 1],
            dilation=[1, 1],
            groups=1,
            zero_point=-128,
            scheme="int8",
            activation_bits=8,
            weight_bits=8,
        )

    x = np.random.default_rng(1).normal(size=(17, channels, 4, 4)).astype(np.float32) * 5
    x[0] = 1e6
    q = quantized(x, -128, -128, 127) + 128
    expected = conv_reference(q, w, b, 1, (1, 1, 1, 1), 1, 1)
    assert expected.max() > 2**24
    np.testing.assert_array_equal(Twin(integer_module(channels, 4, layer, -128)).predict(x), expected)


def requantize_reference(x, multiplier, shift, zero_point, low, high):
    """By Python's integers, one value after the other."""
    result = []
    for value, m in zip(x.ravel(), np.broadcast_to(multiplier, x.shape).ravel(), strict=True):
        product = abs(int(value) * int(m))
        rounded = (2 * product + 2**shift) // 2 ** (shift + 1)
        sign = -1 if int(value) * int(m) < 0 else 1
        result.append(min(max(sign * rounded + zero_point, low), high))
    return np.array(result).reshape(x.shape)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shift=st.integers(0, 40),
    per_channel=st.booleans(),
    target=st.sampled_from([("int8", -128, 127, -7), ("uint8", 0, 15, 0), ("int32", -(2**30), 2**30, 0)]),
)
def test_requantization_equals_whole_numbers(seed, shift, per_channel, target):
    rng = np.random.default_rng(seed)
    dtype, low, high, zero_point = target
    multiplier = rng.integers(1, min(2**31 - 1, 2 ** (shift + 1)), 4 if per_channel else 1).astype(np.int32)

    def layer(build, q):
        return ops.call(
            "requantize",
            [build.emit(relax.op.astype(q, "int32")), relax.const(multiplier)],
            shift=shift,
            zero_point=zero_point,
            qmin=low,
            qmax=high,
            dtype=dtype,
        )

    x = rng.normal(size=(2, 4, 3, 3)).astype(np.float32)
    result = Twin(integer_module(4, 3, layer)).predict(x)
    assert str(result.dtype) == dtype
    q = quantized(x, -5, -128, 127)
    np.testing.assert_array_equal(result, requantize_reference(q, multiplier, shift, zero_point, low, high))


def test_halves_round_away_from_zero():
    def layer(build, q):
        wide = build.emit(relax.op.astype(q, "int32"))
        return ops.call(
            "requantize",
            [wide, relax.const(np.array([1], np.int32))],
            shift=1,
            zero_point=0,
            qmin=-128,
            qmax=127,
            dtype="int8",
        )

    x = (np.array([-3, -1, 1, 3], np.float32) * INPUT_SCALE).reshape(1, 1, 2, 2)
    result = Twin(integer_module(1, 2, layer, zero_point=0)).predict(x)
    np.testing.assert_array_equal(result.ravel(), [-2, -1, 1, 2])


def test_pooling_addition_dense_and_dequantization():
    rng = np.random.default_rng(3)
    w = rng.integers(-127, 128, (5, 4)).astype(np.int8)
    b = rng.integers(-1000, 1000, 5).astype(np.int32)
    scale = rng.uniform(0.01, 0.1, 5).astype(np.float32)

    def layer(build, q):
        pooled = build.emit(relax.op.nn.max_pool2d(q, 2, 2, layout="NHWC"))
        wide = build.emit(relax.op.astype(pooled, "int32"))
        total = build.emit(relax.op.nn.relu(build.emit(relax.op.add(wide, wide))))
        total = build.emit(relax.op.sum(total, [1, 2]))
        narrow = build.emit(
            ops.call(
                "requantize",
                [total, relax.const(np.array([1 << 28], np.int32))],
                shift=30,
                zero_point=-9,
                qmin=-128,
                qmax=127,
                dtype="int8",
            )
        )
        settings = {"zero_point": -9, "scheme": "int8", "activation_bits": 8, "weight_bits": 8, "site": "fc"}
        product = build.emit(ops.call("dense", [narrow, relax.const(w), relax.const(b)], **settings))
        return ops.call("dequantize", [product, relax.const(scale)], zero_point=0)

    x = rng.normal(size=(3, 4, 4, 4)).astype(np.float32)
    q = quantized(x, -5, -128, 127).reshape(3, 2, 2, 2, 2, 4).max((2, 4))
    total = np.maximum(2 * q, 0).sum((1, 2))
    narrow = requantize_reference(total, np.array([1 << 28]), 30, -9, -128, 127)
    product = (narrow + 9) @ w.T.astype(np.int64) + b
    twin = Twin(integer_module(4, 4, layer))
    np.testing.assert_array_equal(twin.predict(x), product.astype(np.float32) * scale)
    np.testing.assert_array_equal(twin.trace(x)["fc"], product)


def test_integers_have_no_gradients():
    twin = Twin(integer_module(1, 2, lambda build, q: relax.op.astype(q, "float32")))
    with pytest.raises(ModelError, match="no gradients"):
        twin.gradients(np.zeros((1, 1, 2, 2), np.float32), np.zeros(1, np.int64))


def test_wide_inputs_are_refused():
    def layer(build, q):
        wide = build.emit(relax.op.astype(q, "int32"))
        weights = relax.const(np.ones((1, 1, 1, 1), np.int8)), relax.const(np.zeros(1, np.int32))
        return ops.call(
            "conv2d",
            [wide, *weights],
            strides=[1, 1],
            padding=[0, 0, 0, 0],
            dilation=[1, 1],
            groups=1,
            zero_point=0,
            scheme="int8",
        )

    with pytest.raises(UnsupportedOperatorError, match="int32"):
        Twin(integer_module(1, 2, layer))
