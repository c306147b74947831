"""The numpy packers: every weight is where its kernel looks for it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from tvm_compress.errors import KernelError
from tvm_compress.schedules import ops, packing
from tvm_compress.schedules.intrin.dot import dot_for

LAYER = packing.IntegerLayer(
    operator="conv2d",
    scheme="int8",
    data_shape=(2, 9, 7, 4),
    data_dtype="int8",
    weight=np.arange(-36, 36).reshape(2, 4, 3, 3).astype(np.int8),
    bias=np.array([10, -20], np.int32),
    strides=(2, 1),
    padding=(1, 0, 0, 2),
    dilation=(1, 2),
    groups=1,
    zero_point=3,
    activation_bits=8,
    weight_bits=8,
)


@given(
    st.sampled_from(["avx512vnni", "avx2", "x86", "a72"]),
    st.tuples(*(st.integers(1, n) for n in (40, 9, 3, 3))),
    st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_dot_weights_are_found_by_the_kernels_index(
    isa: str, shape: tuple[int, int, int, int], vectors: int
) -> None:
    weight = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
    dot = dot_for(isa)
    block = vectors * dot.lanes
    packed = packing.pack_dot_weight(weight, dot, block)
    assert packed.dtype == dot.weight_dtype
    for (o, i, y, x), value in np.ndenumerate(weight):
        inner = dot.inner_index(o % dot.lanes, i % dot.depth)
        assert packed[(o // block, y, x, i // dot.depth, o % block // dot.lanes, *inner)] == value
    assert np.abs(packed.astype(int)).sum() == np.abs(weight.astype(int)).sum(), "what is filled up is zero"


@given(st.integers(1, 6), st.integers(1, 2), st.integers(1, 2))
@settings(max_examples=12, deadline=None)
def test_weight_bits_are_planes_of_codes(bits: int, words: int, blocks: int) -> None:
    limit = 2 ** (bits - 1) - 1
    rng = np.random.default_rng(bits)
    shape = (8 * blocks, 32 * words, 2, 3)
    weight = rng.choice([-1, 1], shape) if bits == 1 else rng.integers(-limit, limit + 1, shape)
    packed = packing.pack_weight_bits(weight.astype(np.int8), bits, 8)
    assert packed.shape == (blocks, bits, 2, 3, words, 8, 4)
    planes = np.unpackbits(packed, axis=-1, bitorder="little")  # [..., O in block, 32 channels]
    places = 2 ** np.arange(bits)
    if bits > 1:
        places[-1] *= -1
    values = np.tensordot(places, planes.astype(int), axes=([0], [1]))  # [blocks, KH, KW, words, 8, 32]
    if bits == 1:
        values = 2 * values - 1
    restored = values.transpose(0, 4, 3, 5, 1, 2).reshape(shape)
    np.testing.assert_array_equal(restored, weight)


def test_activation_bits_are_planes() -> None:
    data = np.random.default_rng(0).integers(0, 8, (1, 2, 3, 64)).astype(np.uint8)
    packed = packing.pack_activation_bits(data, 3)
    assert packed.shape == (1, 2, 3, 3, 2, 4)
    planes = np.unpackbits(packed, axis=-1, bitorder="little").reshape(1, 2, 3, 3, 64)
    np.testing.assert_array_equal((planes * 2 ** np.arange(3)[:, None]).sum(axis=3), data)


def test_rows_hold_the_channels_of_neighbours_side_by_side() -> None:
    rows = packing.pack_rows_weight(LAYER.weight)
    assert rows.shape == (2, 12, 3, 1)
    assert rows[1, 2 * 4 + 3, 0, 0] == LAYER.weight[1, 3, 0, 2]


def test_geometry_of_a_layer() -> None:
    assert LAYER.padded_size == (10, 9)
    assert LAYER.out_size == (4, 5)
    assert LAYER.macs == 2 * 4 * 5 * 72
    assert LAYER.info() | {"OH": 4, "OW": 5, "KH": 3, "N": 2, "IC": 4, "OC": 2} == LAYER.info()


def test_the_bias_takes_up_zero_point_and_offset() -> None:
    sums = LAYER.weight.reshape(2, -1).astype(int).sum(axis=1)
    np.testing.assert_array_equal(packing.fold_bias(LAYER, offset=128), LAYER.bias - 131 * sums)


def test_one_bit_weights_are_minus_one_and_one() -> None:
    x = relax.Var("x", relax.TensorType((1, 32), "uint8"))
    weight = np.zeros((8, 32), np.int8)
    attrs = {"zero_point": 0, "scheme": "bitserial", "activation_bits": 1, "weight_bits": 1}
    call = ops.call("dense", [x, relax.const(weight), relax.const(np.zeros(8, np.int32))], **attrs)
    with pytest.raises(KernelError, match="1-bit weights must be -1 and \\+1"):
        packing.read_layer(call)


def test_weights_must_be_constants() -> None:
    x = relax.Var("x", relax.TensorType((1, 32), "uint8"))
    w = relax.Var("w", relax.TensorType((8, 32), "int8"))
    attrs = {"zero_point": 0, "scheme": "int8", "activation_bits": 8, "weight_bits": 8}
    call = ops.call("dense", [x, w, relax.const(np.zeros(8, np.int32))], **attrs)
    with pytest.raises(KernelError, match="weight"):
        packing.read_layer(call)


def test_the_accumulator_bound_counts_the_largest_sums() -> None:
    packing.check_accumulator(LAYER, -128, 127)
    with pytest.raises(KernelError, match="may reach"):
        packing.check_accumulator(replace(LAYER, bias=np.array([2**30, 0], np.int32)), -128, 127)
