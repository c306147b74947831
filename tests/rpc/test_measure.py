"""Ratios come from within each round, and never mix units."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_compress.errors import SettingError
from tvm_compress.rpc.device import LatencyResult, MeasurementSettings, open_device
from tvm_compress.rpc.measure import latency_ratio, measure

SETTINGS = MeasurementSettings()
OTHERS = MeasurementSettings(timeout_s=20.0)


def latency(samples, unit="seconds"):
    return LatencyResult.from_samples(samples, unit, SETTINGS)


@settings(max_examples=30, deadline=None)
@given(
    drift=st.lists(st.floats(0.1, 10), min_size=1, max_size=9),
    speed=st.floats(0.01, 100),
)
def test_drift_cancels(drift, speed):
    reference = latency(drift)
    other = latency([speed * sample for sample in drift])
    assert latency_ratio(other, reference) == pytest.approx(speed)


def test_a_failure_has_no_ratio():
    failed = LatencyResult.failed("crash", "it fell", "seconds", SETTINGS)
    assert latency_ratio(failed, latency([1.0])) is None
    assert latency_ratio(latency([1.0]), failed) is None


def test_units_never_mix():
    with pytest.raises(SettingError, match="estimated_cycles"):
        latency_ratio(latency([1.0]), latency([1.0], "estimated_cycles"))


def test_a_device_is_opened_with_the_settings(build):
    library = build("layers", "emulated-a72")
    inputs = [np.ones((2, 8), "float32"), np.ones((8, 4), "float32")]
    measured = measure(open_device("emulated-a72"), {"a": library, "b": library}, inputs, OTHERS, "a")
    assert measured["b"].ratio == 1.0
    assert measured["b"].result.settings == OTHERS


def test_names_that_do_not_fit_are_refused(tmp_path):
    device = open_device("local")
    with pytest.raises(SettingError, match="'dense'"):
        measure(device, {"a": tmp_path}, [], reference="dense")
    with pytest.raises(SettingError, match="no inputs for 'a'"):
        measure(device, {"a": tmp_path}, {"b": []})
