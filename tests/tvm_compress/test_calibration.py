import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.tvm_compress.twin_networks import Build, random_resnet8, resnet8_module
from tvm_compress.calibration import BINS, METHODS, Calibration, Observation, calibrate
from tvm_compress.errors import DataError, ModelError, SettingError
from tvm_compress.passes.params import get_params, set_params
from tvm_compress.passes.sites import find_sites
from tvm_compress.twin import Twin


@pytest.fixture(scope="module")
def module():
    return resnet8_module(random_resnet8())


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(40, 1, 28, 28)).astype(np.float32)


def squared_error(values, low, high, bits):
    levels = 2**bits - 1
    scale = (high - low) / levels
    zero_point = np.clip(np.rint(-low / scale), 0, levels)
    q = np.clip(np.rint(values / scale) + zero_point, 0, levels)
    return float(np.sum(((q - zero_point) * scale - values) ** 2))


def observe(values, method="mse"):
    low, high = float(values.min()), float(values.max())
    counts, _ = np.histogram(values, BINS, (low, high))
    return Calibration(method, [(("c",), Observation(low, high, counts, values.size))])


def test_bounds_are_those_of_the_sites_inputs(module, images):
    calibration = calibrate(module, images, "minmax", batch_size=16)
    assert calibration.sites == tuple(site.name for site in sorted_like(calibration, module))
    inputs = Twin(module).site_inputs(images)
    for name, value in inputs.items():
        low, high = calibration.range(name, 8)
        assert high == pytest.approx(max(value.max(), 0), rel=1e-4)
        assert low == pytest.approx(min(value.min(), 0), rel=1e-4)
    assert calibration.range("layer1.0.conv1", 8)[0] == 0.0
    assert calibration.range("conv1", 8)[0] < 0


def sorted_like(calibration, module):
    """All the module's sites, each of which must have been observed, in the calibration's order."""
    sites = {site.name: site for site in find_sites(module)}
    assert set(sites) == set(calibration.sites)
    return [sites[name] for name in calibration.sites]


def test_histograms_count_every_value_whatever_the_batches(module, images):
    small, large = (calibrate(module, images, batch_size=size) for size in (7, 64))
    inputs = Twin(module).site_inputs(images)
    for (sites, a), (_, b) in zip(small.tensors, large.tensors, strict=True):
        assert a.counts.sum() == b.counts.sum() == inputs[sites[0]].size
        assert small.range(sites[0], 4) == pytest.approx(large.range(sites[0], 4), rel=0.02)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bits=st.integers(1, 8),
    shape=st.sampled_from(["relu", "normal", "heavy", "shifted"]),
)
@example(seed=340, bits=8, shape="relu")
def test_mse_range_is_the_best_on_the_values_themselves(seed, bits, shape):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=20000)
    values = {
        "relu": np.maximum(values, 0),
        "normal": values,
        "heavy": values**3,
        "shifted": values + 1.5,
    }[shape]
    low, high = observe(values).range("c", bits)
    assert values.min() <= low <= 0 or low == 0.0
    found = squared_error(values, low, high, bits)
    bottom, top = min(values.min(), 0), max(values.max(), 0)
    shares = np.linspace(0.03, 1, 25)
    best = min(
        squared_error(values, bottom * a, top * b, bits)
        for b in shares
        for a in (shares if bottom < 0 else [0.0])
    )
    # The asymmetric search goes one bound at a time; the grid of both is the reference.
    assert found <= best * (1.05 if bottom == 0 else 1.35) + 1e-9
    # What is minimised is the error of a histogram, whose bins are wider than 8-bit steps differ.
    assert found <= 1.02 * squared_error(values, bottom, top, bits) + 1e-9


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1000), bits=st.integers(2, 8), shape=st.sampled_from(["relu", "normal", "shifted"])
)
def test_kl_range_is_a_bounded_part_of_what_was_seen(seed, bits, shape):
    values = np.random.default_rng(seed).normal(size=20000)
    values = {"relu": np.maximum(values, 0), "normal": values, "shifted": values + 1.5}[shape]
    low, high = observe(values, "kl").range("c", bits)
    assert min(values.min(), 0) <= low <= 0 <= high <= values.max()
    # The distribution survives: three quarters of what is not 0 are inside of the range.
    moved = values[values != 0]
    assert np.mean((moved >= low) & (moved <= high)) > 0.75


def reference_divergence(values, high, bits):
    """KL of the clipped values' histogram from its quantized form, by loops; values are 0 or positive."""
    counts, _ = np.histogram(values, BINS, (0, values.max()))
    centers = values.max() / BINS * (np.arange(BINS) + 0.5)
    centers[0], centers[-1] = 0, values.max()
    scale = high / (2**bits - 1)
    inside = [i for i in range(1, BINS) if counts[i] and np.rint(centers[i] / scale) < 2**bits]
    p = {i: float(counts[i]) for i in inside}
    p[inside[-1]] += sum(counts[i] for i in range(inside[-1] + 1, BINS))
    levels: dict[int, list[int]] = {}
    for i in inside:
        levels.setdefault(int(np.rint(centers[i] / scale)), []).append(i)
    q = {i: sum(counts[j] for j in same) / len(same) for same in levels.values() for i in same}
    total_p, total_q = sum(p.values()), sum(q.values())
    return sum(p[i] / total_p * np.log(p[i] / total_p / (q[i] / total_q)) for i in inside)


def test_kl_range_has_the_least_divergence():
    values = np.maximum(np.random.default_rng(0).normal(size=50000), 0)
    values[:5] = 12.0  # a long tail, which min-max would follow
    found = observe(values, "kl").range("c", 8)[1]
    shares = np.linspace(0.02, 1, 50)
    best = min(reference_divergence(values, 12.0 * share, 8) for share in shares)
    assert reference_divergence(values, found, 8) <= best * 1.001 + 1e-9
    assert found < 8


def test_kl_does_not_clip_most_values():
    # A gate of squeeze-and-excite, nearly always open: what holds one of the few bins below diverges by 0.
    values = np.random.default_rng(0).normal(1.0, 0.05, 5000)
    values[:3] = 0.1, 0.4, 0.45
    low, high = observe(values, "kl").range("c", 8)
    assert low == 0.0
    assert np.mean(values > high) < 0.25


@pytest.mark.parametrize("method", METHODS)
def test_report_tells_the_share_that_is_clipped(module, images, method):
    calibration = calibrate(module, images, method, batch_size=16)
    bits = {name: 4 for name in calibration.sites if name != "conv1"} | {"layer2.0.short.0": 8}
    rows = calibration.report(bits)
    assert sorted(site for row in rows for site in row.sites) == sorted(bits)
    inputs = Twin(module).site_inputs(images)
    for row in rows:
        values = inputs[row.sites[0]]
        assert (row.low, row.high) == calibration.range(row.sites[0], row.bits)
        # What lies beyond a moving average was not counted by how far.
        half = 0 if method == "moving_average" else (row.high - row.low) / (2**row.bits - 1) / 2
        really = np.mean((values < row.low - half) | (values > row.high + half))
        width = (row.seen_high - row.seen_low) / BINS
        high, low = row.high + half, row.low - half
        near = np.mean((np.abs(values - high) < width) | (np.abs(values - low) < width))
        assert row.clipped == pytest.approx(really, abs=float(1e-6 + (near if near < 0.1 else 0.002)))
    assert {row.bits for row in rows if "layer2.0.short.0" in row.sites} == {8}


def test_one_image_calibrates_and_one_method_differs_from_another(module, images):
    ranges = {m: calibrate(module, images[:1], m).range("layer1.0.conv2", 4) for m in METHODS}
    assert all(low == 0.0 < high for low, high in ranges.values())
    assert ranges["kl"] != ranges["minmax"] != ranges["mse"]


def test_percentile_leaves_out_the_tails():
    values = np.concatenate([np.random.default_rng(0).uniform(-1, 2, 10**6), [50.0]])
    seen = observe(values).tensors[0][1]
    low, high = Calibration("percentile", [(("c",), seen)]).range("c", 8)
    assert (low, high) == (pytest.approx(-1, abs=0.05), pytest.approx(2, abs=0.05))


def test_moving_average_follows_the_batches(module):
    x = np.ones((20, 1, 28, 28), np.float32)
    x[10:] = 3.0
    calibration = calibrate(module, x, "moving_average", batch_size=10)
    assert calibration.range("conv1", 8) == pytest.approx((0.0, 0.9 * 1 + 0.1 * 3))


def test_memory_of_shared_tensors_is_shared(module, images):
    calibration = calibrate(module, images)
    assert ("layer2.0.conv1", "layer2.0.short.0") in [sites for sites, _ in calibration.tensors]
    assert calibration.range("layer2.0.conv1", 4) == calibration.range("layer2.0.short.0", 4)


@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded(module, images, method, tmp_path):
    calibration = calibrate(module, images, method)
    calibration.save(tmp_path / "c.json")
    loaded = Calibration.load(tmp_path / "c.json")
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]
    for site in calibration.sites:
        for bits in (1, 4, 8):
            assert loaded.range(site, bits) == calibration.range(site, bits)


def test_damaged_files(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        Calibration.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        Calibration.load(tmp_path / "bad.json")
    (tmp_path / "old.json").write_text(json.dumps({"version": 0}))
    with pytest.raises(DataError, match="version 0"):
        Calibration.load(tmp_path / "old.json")


def test_bad_data_and_settings(module, images):
    with pytest.raises(DataError, match="no images"):
        calibrate(module, images[:0])
    spoilt = images.copy()
    spoilt[3, 0, 4, 4] = np.nan
    with pytest.raises(DataError, match="'conv1'"):
        calibrate(module, spoilt)
    weights = get_params(module)["layer1.0.conv1.weight"]
    weights[0] = np.inf
    with pytest.raises(DataError, match=r"'layer1.0.conv2'"):
        calibrate(set_params(module, {"layer1.0.conv1.weight": weights}), images)
    with pytest.raises(SettingError, match="entropy"):
        calibrate(module, images, "entropy")
    calibration = calibrate(module, images, "minmax")
    with pytest.raises(SettingError, match="9"):
        calibration.range("conv1", 9)
    with pytest.raises(DataError, match="'other'"):
        calibration.range("other", 8)
    with pytest.raises(ModelError, match="'qdq'"):
        calibrate(resnet8_module(random_resnet8(), 8), images)


def test_a_constant_input_has_no_width():
    b = Build((1, 2, 3, 3))
    weights = np.ones((1, 2, 1, 1), np.float32)
    module = b.finish(lambda: b.conv(b.nhwc(b.x), b.param("c.weight", weights)))
    assert calibrate(module, np.zeros((4, 2, 3, 3), np.float32)).range("c", 8) == (0.0, 0.0)
