"""The numpy references against torch, and against the definitions in exact arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_compress.errors import KernelError
from tvm_compress.schedules import reference


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("strides", "dilation", "padding"), [((1, 1), (1, 1), 1), ((2, 1), (1, 2), 0), ((2, 2), (1, 1), 2)]
)
def test_convolution_is_torchs(groups, strides, dilation, padding):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 9, 10, 8))
    w = rng.standard_normal((12, 8 // groups, 3, 3))
    expected = torch.nn.functional.conv2d(
        torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(w), None, strides, padding, dilation, groups
    )
    actual = reference.convolution(x, w, strides, (padding,) * 4, dilation, groups)
    np.testing.assert_allclose(actual, expected.permute(0, 2, 3, 1).numpy(), rtol=1e-12, atol=1e-12)


def test_padding_counts_as_the_zero_point():
    x = np.full((1, 2, 2, 1), 7, np.uint8)
    w = np.ones((1, 1, 3, 3), np.int8)
    bias = np.array([5], np.int32)
    sums = reference.conv2d(x, w, bias, zero_point=7, padding=(1, 1, 1, 1))
    assert np.array_equal(sums, np.full((1, 2, 2, 1), 5))


def test_dense_sums():
    x = np.array([[1, -2, 3]], np.int8)
    w = np.array([[1, 1, 1], [127, 0, -127]], np.int8)
    assert reference.dense(x, w, np.array([10, 0], np.int32), zero_point=1).tolist() == [[9, -254]]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(-(2**31), 2**31 - 1),
    st.integers(1, 2**31 - 1),
    st.integers(0, 62),
    st.integers(-128, 127),
)
def test_requantization_rounds_halves_away_from_zero(x, multiplier, shift, zero_point):
    exact = Fraction(x * multiplier, 2**shift)
    rounded = int(abs(exact) + Fraction(1, 2)) * (1 if exact >= 0 else -1)
    expected = min(max(rounded + zero_point, -128), 127)
    actual = reference.requantize(
        np.array([x], np.int32), np.array([multiplier], np.int32), shift, zero_point, -128, 127
    )
    assert actual.dtype == np.int8
    assert int(actual[0]) == expected


def test_quantization_rounds_halves_to_even_and_dequantization_undoes_it():
    x = np.array([-1.5, -0.5, 0.5, 1.5, 2.5, 1000.0], np.float32)
    q = reference.quantize(x, 1.0, 3, -128, 127)
    assert q.tolist() == [1, 3, 3, 5, 5, 127]
    assert reference.dequantize(q, 0.5, 3).tolist() == [-1.0, 0.0, 0.0, 1.0, 1.0, 62.0]


def test_binarization_counts_zero_as_positive():
    assert reference.binarize(np.array([-0.1, 0.0, 2.0])).tolist() == [-1, 1, 1]


def test_a_shift_outside_of_64_bits_is_refused():
    with pytest.raises(KernelError, match="62"):
        reference.requantize(np.zeros(1, np.int32), np.ones(1, np.int32), 63, 0, 0, 1)
