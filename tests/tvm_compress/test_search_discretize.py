"""Actions become channel counts, bit widths and schemes by the corrected equations 4 and 8."""

import math

from hypothesis import given
from hypothesis import strategies as st

from tvm_compress.search.discretize import FP32, INT8, choose_precision, compression_ratio, discretize

unit = st.floats(0.0, 1.0)


@given(unit, st.integers(1, 512))
def test_counts_stay_within_1_and_the_reference(ratio, reference):
    count = discretize(ratio, reference)
    assert 1 <= count <= reference
    assert count == min(reference, math.floor((1 - ratio) * reference) + 1)


@given(unit, unit, st.integers(1, 512))
def test_more_compression_never_gives_more(a, b, reference):
    low, high = sorted((a, b))
    assert discretize(high, reference) <= discretize(low, reference)


@given(st.integers(1, 512))
def test_ends_of_the_range(reference):
    assert discretize(0.0, reference) == reference
    assert discretize(1.0, reference) == 1


@given(st.integers(1, 64), st.data())
def test_every_count_can_be_reached(reference, data):
    wanted = data.draw(st.integers(1, reference))
    assert discretize(1.0 - (wanted - 0.5) / reference, reference) == wanted


def test_ratio_stretches_what_is_above_the_threshold():
    assert [compression_ratio(a) for a in (0.0, 0.5, 0.75, 1.0)] == [0.0, 0.0, 0.5, 1.0]


@given(unit, unit, st.integers(1, 6))
def test_schemes_follow_the_thresholds(activation, weight, max_bits):
    largest = max(activation, weight)
    found = choose_precision(activation, weight, None, max_bits)
    fallback = choose_precision(activation, weight, "some rule", max_bits)
    if largest > 0.5:
        assert found.scheme == "bitserial"
        assert 1 <= found.weight_bits <= max_bits
        assert 1 <= found.activation_bits <= max_bits
        assert (fallback.scheme, fallback.weight_bits, fallback.note) == ("int8", 8, "some rule")
    else:
        assert found == fallback == (INT8 if largest > 0.2 else FP32)


def test_one_action_above_the_threshold_leaves_the_other_side_its_most_bits():
    found = choose_precision(0.1, 1.0, None, 6)
    assert (found.activation_bits, found.weight_bits) == (6, 1)
