"""Settings and results check themselves and survive JSON."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tvm_compress.errors import SettingError
from tvm_compress.rpc.device import (
    ERROR_KINDS,
    STOPPED_BY,
    UNITS,
    LatencyResult,
    MeasurementSettings,
)

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
    cache_flush=st.booleans() | st.integers(1 << 16, 1 << 30),
    max_spread=st.none() | st.floats(1e-6, 0.5),
    max_repeat=st.integers(9, 99),
)


@hypothesis_settings(max_examples=30, deadline=None)
@given(
    settings=settings_values,
    samples=st.lists(finite, min_size=1, max_size=9),
    unit=st.sampled_from(UNITS),
    stopped_by=st.sampled_from(STOPPED_BY),
)
def test_results_survive_json(settings, samples, unit, stopped_by):
    result = LatencyResult.from_samples(
        samples, unit, settings, {"conv": 1.5}, {"instructions": 3}, stopped_by
    )
    result = replace(result, breakdown={"conv": {"l1_misses": 3, "cycles": 1.5}})
    result = replace(result, health={"before": {"clock_mhz": 600.0}, "warnings": ["it is hot"]})
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
        ("cache_flush", 1),
        ("cache_flush", 0),
        ("cache_flush", 1e6),
        ("cache_flush", (1 << 30) + 1),
        ("max_spread", 0.0),
        ("max_spread", 1.0),
        ("max_spread", math.nan),
        ("max_repeat", 0),
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
    with pytest.raises(SettingError, match="'boredom'"):
        LatencyResult.from_dict(values | {"stopped_by": "boredom"})
    with pytest.raises(SettingError, match="'speed'"):
        MeasurementSettings.from_dict({"speed": 1})


def test_the_limit_of_rounds_is_not_below_their_number():
    assert MeasurementSettings(repeat=200).max_spread is None
    with pytest.raises(SettingError, match="`max_repeat` must be at least `repeat` \\(200\\), not 100"):
        MeasurementSettings(repeat=200, max_spread=0.02)


def test_results_of_earlier_releases_are_read():
    settings = {"warmup": 3, "number": 1, "repeat": 2, "min_repeat_ms": 20.0, "cooldown_ms": 0.0}
    settings |= {"timeout_s": 60.0, "threads": 1}
    old = {"value": 1.5, "unit": "seconds", "samples": [1.0, 2.0], "spread": 0.5, "settings": settings}
    old |= {"kernels": {}, "counters": {}, "error": None}
    read = LatencyResult.from_dict(old)
    assert read == LatencyResult.from_samples([1.0, 2.0], "seconds", MeasurementSettings(warmup=3, repeat=2))
    assert (read.stopped_by, read.health) == ("repeat", {})
    failed = old | {"value": None, "spread": None, "samples": [], "error": ["crash", "it fell"]}
    assert LatencyResult.from_dict(failed).stopped_by is None


def test_results_of_earlier_releases_can_be_read():
    result = LatencyResult.from_samples([1.0], "estimated_cycles", MeasurementSettings(), {"conv": 1.0})
    values = result.to_dict()
    del values["breakdown"]
    assert LatencyResult.from_dict(values) == result
