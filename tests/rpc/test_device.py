"""Settings and results check themselves and survive JSON."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tvm_compress.errors import SettingError
from tvm_compress.rpc.device import ERROR_KINDS, UNITS, LatencyResult, MeasurementSettings

finite = st.floats(min_value=1e-9, max_value=1e12)
settings_values = st.builds(
    MeasurementSettings,
    warmup=st.integers(0, 9),
    number=st.integers(1, 9),
    repeat=st.integers(1, 9),
    min_repeat_ms=st.floats(0, 1e3),
    cooldown_ms=st.floats(0, 1e3),
    timeout_s=finite,
    threads=st.integers(1, 8),
)


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    settings=settings_values, samples=st.lists(finite, min_size=1, max_size=9), unit=st.sampled_from(UNITS)
)
def test_results_survive_json(settings, samples, unit):
    result = LatencyResult.from_samples(samples, unit, settings, {"conv": 1.5}, {"instructions": 3})
    result = dataclasses.replace(result, breakdown={"conv": {"l1_misses": 3, "cycles": 1.5}})
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert LatencyResult.from_dict(json.loads(text)) == result
    assert min(samples) <= result.value <= max(samples)
    assert 0 <= result.spread <= max(samples) - min(samples)


@hypothesis_settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(ERROR_KINDS), text=st.text(max_size=20), unit=st.sampled_from(UNITS))
def test_failures_survive_json(kind, text, unit):
    result = LatencyResult.failed(kind, text, unit, MeasurementSettings())
    again = LatencyResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    assert again == result
    assert not again.ok
    assert math.isnan(again.value)


def test_median_and_spread():
    result = LatencyResult.from_samples([3.0, 1.0, 2.0, 10.0, 2.0], "seconds", MeasurementSettings())
    assert (result.value, result.spread) == (2.0, 1.0)
    assert result.samples == (3.0, 1.0, 2.0, 10.0, 2.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("warmup", -1),
        ("number", 0),
        ("repeat", 1.5),
        ("repeat", True),
        ("threads", 0),
        ("min_repeat_ms", -1.0),
        ("cooldown_ms", math.nan),
        ("timeout_s", 0.0),
        ("timeout_s", math.inf),
    ],
)
def test_impossible_settings_are_named(name, value):
    with pytest.raises(SettingError, match=name):
        MeasurementSettings(**{name: value})


def test_unknown_fields_units_and_kinds_are_refused():
    values = LatencyResult.from_samples([1.0], "seconds", MeasurementSettings()).to_dict()
    with pytest.raises(SettingError, match="'colour'"):
        LatencyResult.from_dict(values | {"colour": 1})
    with pytest.raises(SettingError, match="'hours'"):
        LatencyResult.from_dict(values | {"unit": "hours"})
    with pytest.raises(SettingError, match="'bored'"):
        LatencyResult.from_dict(values | {"error": ["bored", ""]})
    with pytest.raises(SettingError, match="'speed'"):
        MeasurementSettings.from_dict({"speed": 1})


def test_results_of_earlier_releases_can_be_read():
    result = LatencyResult.from_samples([1.0], "estimated_cycles", MeasurementSettings(), {"conv": 1.0})
    values = result.to_dict()
    del values["breakdown"]
    assert LatencyResult.from_dict(values) == result
