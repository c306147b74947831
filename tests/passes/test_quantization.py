"""Quantizers against brute force, and fixed-point arithmetic against exact integers."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tvm_compress.errors import DataError, KernelError, ModelError
from tvm_compress.passes.integer_layer import fold_integer_layer
from tvm_compress.passes.quantization import (
    INT32_MAX,
    MAX_SHIFT,
    QuantizationParameters,
    activation_parameters,
    fixed_point,
    fixed_point_within,
    quantize_weights,
    requantize,
    weight_limit,
    weight_scale,
)

few = settings(max_examples=60, deadline=None)
finite = st.floats(-1e4, 1e4, allow_nan=False, width=32)


@few
@given(low=finite, span=st.floats(2**-10, 1e4, width=32), bits=st.integers(1, 8))
def test_activation_ranges_are_covered_and_hold_zero(low, span, bits):
    held = activation_parameters(low, low + span, bits)
    assert (held.qmin, held.qmax, held.dtype) == (
        (-128, 127, "int8") if bits == 8 else (0, 2**bits - 1, "uint8")
    )
    assert held.qmin <= held.zero_point <= held.qmax
    assert held.quantize(np.zeros(1)) == held.zero_point
    # Every value of the range is within a step: half for rounding, half for the zero point's rounding.
    x = np.linspace(min(low, 0.0), max(low + span, 0.0), 33)
    restored = held.scale * (held.quantize(x).astype(float) - held.zero_point)
    assert np.abs(restored - x).max() <= held.scale * (1 + 1e-3)


def test_activation_parameters_of_known_ranges():
    assert activation_parameters(0.0, 15.0, 4) == QuantizationParameters(1.0, 0, 0, 15, "uint8")
    assert activation_parameters(3.0, 15.0, 4) == QuantizationParameters(1.0, 0, 0, 15, "uint8")
    assert activation_parameters(-4.0, 11.0, 4) == QuantizationParameters(1.0, 4, 0, 15, "uint8")
    assert activation_parameters(-128.0, 127.0, 8) == QuantizationParameters(1.0, 0, -128, 127, "int8")
    assert activation_parameters(0.0, 255.0, 8) == QuantizationParameters(1.0, -128, -128, 127, "int8")
    assert activation_parameters(0.0, 255.0, 8, unsigned=True) == QuantizationParameters(
        1.0, 0, 0, 255, "uint8"
    )


@pytest.mark.parametrize(
    ("low", "high"), [(1.0, 1.0), (0.0, 0.0), (np.nan, 1.0), (0.0, np.inf), (2.0, 1.0), (0.0, 1e-45)]
)
def test_impossible_ranges_name_the_site(low, high):
    with pytest.raises(DataError, match=r"layer1[.]conv2"):
        activation_parameters(low, high, 8, site="layer1.conv2")


@pytest.mark.parametrize(("scale", "zero_point"), [(0.0, 0), (-1.0, 0), (np.nan, 0), (1.0, 128)])
def test_impossible_parameters(scale, zero_point):
    with pytest.raises(ModelError):
        QuantizationParameters(scale, zero_point, -128, 127, "int8")


def squared_error(w: np.ndarray, scale: np.ndarray, bits: int) -> np.ndarray:
    restored = quantize_weights(w, scale, bits) * scale.reshape(-1, *[1] * (w.ndim - 1))
    return ((restored - w) ** 2).reshape(w.shape[0], -1).sum(axis=1)


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (5, 40)])
def test_weight_scale_is_close_to_the_best_of_a_fine_search(bits, shape):
    w = np.random.default_rng(bits).standard_t(5, size=shape).astype(np.float32)
    scale = weight_scale(w, bits)
    assert scale.shape == (shape[0],)
    assert scale.dtype == np.float32
    top = np.abs(w.reshape(shape[0], -1)).max(axis=1)
    errors = [
        squared_error(w, top * fraction / weight_limit(bits), bits) for fraction in np.linspace(0.02, 1, 400)
    ]
    assert (squared_error(w, scale, bits) <= np.min(errors, axis=0) * 1.05).all()


def test_eight_bits_use_the_whole_range():
    w = np.random.default_rng(0).normal(size=(4, 30)).astype(np.float32)
    q = quantize_weights(w, weight_scale(w, 8), 8)
    np.testing.assert_array_equal(np.abs(q).max(axis=1), 127)


def test_one_bit_is_the_sign_and_the_mean_magnitude():
    w = np.array([[0.5, -1.5, 0.0, -0.0]], np.float32)
    np.testing.assert_array_equal(quantize_weights(w, weight_scale(w, 1), 1), [[1, -1, 1, 1]])
    np.testing.assert_allclose(weight_scale(w, 1), [0.5])


@pytest.mark.parametrize("bits", range(1, 9))
def test_dead_channels_get_a_tiny_positive_scale(bits):
    w = np.zeros((2, 3, 3, 3), np.float32)
    w[1] = 1.0
    scale = weight_scale(w, bits)
    assert 0 < scale[0] < 1e-6 < scale[1]
    if bits > 1:
        assert not quantize_weights(w, scale, bits)[0].any()


def test_weights_that_are_not_finite():
    with pytest.raises(ModelError, match="NaN"):
        weight_scale(np.array([[np.nan, 1.0]]), 4)


@few
@given(
    exponents=st.lists(st.floats(-70, 30.9), min_size=1, max_size=6),
    x=st.lists(st.integers(-(2**31), INT32_MAX), min_size=1, max_size=6),
)
def test_fixed_point_errs_by_no_more_than_documented(exponents, x):
    multipliers = np.array([2.0**e for e in exponents])
    m, shift = fixed_point(multipliers)
    assert m.dtype == np.int32
    assert 0 <= shift <= MAX_SHIFT
    assert m.max() >= 2**30 or shift == MAX_SHIFT  # 31 bits are used
    for real, integer in zip(multipliers, m, strict=True):
        assert abs(Fraction(float(real)) - Fraction(int(integer), 2**shift)) <= Fraction(1, 2 ** (shift + 1))
        for value in x:
            got = requantize(np.array([value]), np.array([integer]), shift, 0, -(2**62), 2**62)[0]
            # Half a step of rounding, and what the multiplier's own error makes of x.
            bound = Fraction(1, 2) + Fraction(abs(value), 2 ** (shift + 1))
            assert abs(value * Fraction(float(real)) - int(got)) <= bound


@given(st.integers(1, 2**10 - 1), st.floats(-40, 18))
@example(512, 1.9999999999999964)  # rounds up to a power of two
@settings(max_examples=50, deadline=None)
def test_small_integers_are_requantized_within_32_bits(bound, exponent):
    multiplier = 2.0**exponent
    m, shift = fixed_point_within(np.array([multiplier]), bound)
    assert bound * int(m[0]) + ((1 << shift) >> 1) < 2**31
    got = requantize(np.array([bound]), m, shift, 0, -(2**62), 2**62)[0]
    assert abs(got - bound * multiplier) <= 0.5 + bound * 2.0 ** -(shift + 1) * 1.001
    error = abs(Fraction(int(m[0]), 2**shift) - Fraction(multiplier))
    assert error <= Fraction(1, 2 ** (shift + 1))
    assert bound * error <= max(bound * multiplier * 2.0**-20, 2.0**-20)


@pytest.mark.parametrize(("bound", "multiplier"), [(2**10, 0.5), (2**20, 0.5), (255, 2.0**25)])
def test_other_integers_keep_the_widest_multiplier(bound, multiplier):
    assert fixed_point_within(np.array([multiplier]), bound) == fixed_point(np.array([multiplier]))


def test_fixed_point_of_special_multipliers():
    assert fixed_point(np.array([1.0])) == (np.array([2**30]), 30)
    m, shift = fixed_point(np.array([np.nextafter(1.0, 0.0)]))  # rounds up to 2**31: one shift less
    assert (m[0], shift) == (2**30, 30)
    m, shift = fixed_point(np.zeros(3))
    assert (m.tolist(), shift) == ([0, 0, 0], 0)
    assert fixed_point(np.array([1e-30]))[0] == 0


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf, 2.0**31])
def test_fixed_point_refuses(bad):
    with pytest.raises(KernelError):
        fixed_point(np.array([1.0, bad]))


@few
@given(
    x=st.integers(-(2**31), INT32_MAX),
    m=st.integers(0, INT32_MAX),
    shift=st.integers(0, MAX_SHIFT),
    zero_point=st.integers(-128, 127),
)
def test_requantize_is_exact(x, m, shift, zero_point):
    exact = Fraction(x * m, 2**shift)
    away = int(abs(exact) + Fraction(1, 2)) * (1 if exact >= 0 else -1)
    expected = min(max(away + zero_point, -128), 127)
    got = requantize(np.array([[x]], np.int32), np.array([m], np.int32), shift, zero_point, -128, 127)
    assert int(got[0, 0]) == expected


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.sampled_from([1, 2, 4, 8]),
    scale=st.floats(-30, 2),
    shift=st.floats(-30, 20),
    output=st.one_of(st.none(), st.floats(-20, 5)),
)
@example(7, 1, -3.0, 20.0, 0.0)  # fraction bits beside channels of coarser scale
@example(2389196, 1, 0.0, 0.0, None)  # a dead channel of 1-bit weights
def test_folded_layer_is_the_affine_map(seed, bits, scale, shift, output):
    """Within an eighth of an 8-bit step of the reals, whatever the batch norm: negative, dead or huge."""
    rng = np.random.default_rng(seed)
    limit, channels, inputs = weight_limit(bits), 5, 36
    w = rng.integers(-limit, limit + 1, size=(channels, inputs)).astype(np.int8)
    if bits == 1:
        w = np.where(w >= 0, 1, -1).astype(np.int8)
    reach = 255 if bits == 8 else 2**bits - 1
    scales = rng.uniform(0.5, 1, channels) * 2.0**scale
    factor = np.array([1.0, -1.0, 0.0, 1e-20, -3.0]) * rng.uniform(0.5, 2, channels)
    shifts = rng.normal(size=channels) * 2.0**shift
    output_scale = None if output is None else 2.0**output
    layer = fold_integer_layer(w, scales, factor, shifts, bits, reach, output_scale, "a.site")

    x = rng.integers(-reach if bits == 8 else 0, reach + 1, size=(20, inputs))
    sums = (x @ layer.weight.astype(np.int64).T << layer.fraction_bits) + layer.bias
    assert (np.abs(sums) <= layer.bound).all()
    assert (layer.bound <= INT32_MAX).all()
    assert np.abs(layer.weight).max() <= limit
    assert bits > 1 or (np.abs(layer.weight) == 1).all()
    real = (x @ w.astype(np.int64).T) * scales * factor + shifts
    # A step of an output whose 8 bits just cover the channel.
    step = (np.abs(x @ w.astype(np.int64).T) * scales * np.abs(factor) + np.abs(shifts)).max(axis=0) / 255
    half_bias = layer.scale / 2
    assert (np.abs(sums * layer.scale - real) <= step / 8 + half_bias + 1e-30).all()
    if output_scale is not None and layer.fraction_bits > 0:
        # Channels whose shift fits keep their scale, refined by the fraction bits; others got a coarser one.
        products = scales * np.abs(factor)
        refined = layer.scale * 2.0**layer.fraction_bits <= products * (1 + 1e-9)
        assert (half_bias[refined] <= products[refined] / 4 * (1 + 1e-9)).all()


def test_small_sums_get_fraction_bits_only_where_a_bias_needs_them():
    w = np.ones((1, 9), np.int8)
    one = np.ones(1)

    def fold(shift: float, output_scale: float | None) -> int:
        return fold_integer_layer(w, one, one, one * shift, 1, 1, output_scale, "s").fraction_bits

    assert fold(0.3, 8.0) == 0  # half a unit is a 16th of a step
    assert fold(0.3, 1.0) == 3
    assert fold(0.3, 0.1) == 7
    assert fold(0.0, 0.1) == 0  # no bias, nothing to round
    assert fold(0.3, None) > 0


def test_sums_beyond_int32_are_refused_with_the_bound_and_the_site():
    w = np.full((1, 70_000), 127, np.int8)
    bound = 70_000 * 127 * 255
    with pytest.raises(KernelError, match=rf"'big.fc'.*{bound}"):
        fold_integer_layer(w, np.ones(1), np.ones(1), np.zeros(1), 8, 255, 1.0, "big.fc")
