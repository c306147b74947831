import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tvm_compress.test_finetune import shapes_data, small_network
from tvm_compress.errors import DataError, SettingError
from tvm_compress.finetune import finetune
from tvm_compress.metrics.esn import (
    esn_a,
    esn_a_from_noise,
    esn_d_filters,
    filter_bits,
    filter_steps,
    mid_rise,
)
from tvm_compress.metrics.esn_training import EpochEsn, EsnRecord, EsnRecorder, SiteEsn, allocate_bits
from tvm_compress.passes.params import get_params


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.5, 1.0, 6.0]))
def test_the_papers_pseudo_code(seed, delta):
    """Appendix A, word for word, on whole-layer steps; some filters are small enough to be pruned."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(6, 3, 3, 3)) * rng.choice([0.01, 1.0], size=(6, 1, 1, 1))
    pruned = np.all(abs(w) < delta / 2, axis=(1, 2, 3))
    w_int = np.floor(w / delta) + 0.5
    w_int[pruned, :, :, :] = 0
    np.testing.assert_array_equal(mid_rise(w, np.full(6, delta)), w_int)


def test_equation_4_on_uniform_noise():
    """Signal over quantization noise gives the quantized norm, within 2 %, where the noise is uniform."""
    w = np.random.default_rng(0).normal(size=(64, 32, 3, 3))
    for step in (0.02, 0.1, 0.4):
        levels = mid_rise(w, np.full(64, step))
        noise = float(np.sum(np.square(w - step * levels)))
        expected = esn_a_from_noise(float(np.sum(np.square(w))), noise, w.size)
        # (w / Δ)² is W_int² plus 1/12 in the mean, which appendix E leaves out: 1.3 % at the last step.
        assert esn_a(levels) == pytest.approx(expected, rel=0.02)


def test_bits_of_filters():
    levels = np.array([[0.5, -7.5], [0.5, -0.5], [0.0, 0.0], [1.5, 0.5], [3.5, -3.5]])
    np.testing.assert_array_equal(filter_bits(levels), [4, 1, 0, 2, 3])
    # 100 MACs a filter.
    assert esn_d_filters(levels, 500.0) == 1000.0
    w = np.random.default_rng(0).normal(size=(8, 4, 3, 3))
    for bits in range(1, 9):
        assert (filter_bits(mid_rise(w, filter_steps(w, bits), bits)) == bits).all()


def test_the_recorder_follows_equation_5(tmp_path):
    recorder = EsnRecorder({"a": "a.weight"}, tmp_path / "esn.json")
    start = torch.tensor([[1.0, 0.0], [2.0, -1.0]])
    for epoch in (1, 2):
        tensors = {"a.weight": start.clone()}
        recorder.begin_epoch(tensors)
        tensors["a.weight"] += 0.5
        recorder.after_step(tensors)
        tensors["a.weight"][0, 0] = 0.0
        recorder.after_step(tensors)
        recorder.end_epoch(epoch, {"loss": 1.0})
    first = 1.5**2 + 0.5**2 + 2.5**2 + 0.5**2
    seen = recorder.record.epochs[1].sites["a"]
    assert seen == SiteEsn(first + (first - 1.5**2), 4 * 0.25 + 3 * 0.25 + 1.0, 3)
    assert seen.esn_a == pytest.approx(seen.signal / seen.noise * 3 / 12)
    assert EsnRecord.load(tmp_path / "esn.json") == recorder.record
    assert json.loads((tmp_path / "esn.json").read_text())["epochs"][0]["means"] == {"loss": 1.0}


def test_fine_tuning_is_recorded_and_unchanged_by_that():
    module, train = small_network(), shapes_data(200, 0)
    recorder = EsnRecorder({"c": "c.weight", "d": "d.weight"})
    watched = finetune(module, train, 3, 0.1, observer=recorder)
    alone = finetune(module, train, 3, 0.1)
    for name, value in get_params(alone).items():
        np.testing.assert_array_equal(get_params(watched)[name], value)
    norms = [epoch.esn_a for epoch in recorder.record.epochs]
    # The rate falls to zero in the last epoch: so does the walk, and the norm rises.
    assert norms[2] > 1.5 * max(norms[:2])
    assert recorder.record.epochs[0].means.keys() == {"loss", "accuracy", "learning_rate"}


def epoch_of(ratios):
    return EpochEsn(1, {}, {name: SiteEsn(ratio, 1.0, 1) for name, ratio in ratios.items()})


@settings(max_examples=40, deadline=None)
@given(st.floats(2.0, 8.0), st.integers(0, 1000))
def test_allocated_bits_keep_to_their_mean_and_follow_the_noise(mean_bits, seed):
    rng = np.random.default_rng(seed)
    # The same weights everywhere: only what training showed tells the layers apart.
    weights = dict.fromkeys("abcd", rng.normal(size=(8, 8, 3, 3)))
    macs = {name: float(rng.integers(1, 100)) for name in "abcd"}
    epoch = epoch_of({name: float(10 ** rng.uniform(0, 4)) for name in "abcd"})
    bits = allocate_bits(epoch, weights, macs, mean_bits, range(2, 9))
    mean = sum(macs[n] * bits[n] for n in "abcd") / sum(macs.values())
    assert mean <= mean_bits + 1e-9
    # A layer that bore less noise has no fewer bits.
    order = sorted("abcd", key=lambda n: epoch.sites[n].signal)
    assert [bits[n] for n in order] == sorted(bits.values())
    more = allocate_bits(epoch, weights, macs, 8.0, range(2, 9))
    assert all(value == 8 for value in more.values())


def test_one_bit_more_for_four_times_the_signal():
    weights = {name: np.random.default_rng(0).normal(size=(8, 8, 3, 3)) for name in "ab"}
    # Each bit quadruples ESN_a.
    epoch = epoch_of({"a": 100.0, "b": 400.0})
    assert allocate_bits(epoch, weights, {"a": 1.0, "b": 1.0}, 4.5, range(2, 9)) == {"a": 4, "b": 5}


def test_bad_records(tmp_path):
    weights, macs = {"a": np.ones((2, 2))}, {"a": 1.0}
    with pytest.raises(SettingError, match=r"1\.5 bits on average"):
        allocate_bits(epoch_of({"a": 1.0}), weights, macs, 1.5, (2, 3))
    with pytest.raises(SettingError, match="no layer 'a'"):
        allocate_bits(epoch_of({"b": 1.0}), weights, macs, 4, (2, 3))
    still = EpochEsn(3, {}, {"a": SiteEsn(1.0, 0.0, 4)})
    with pytest.raises(SettingError, match="did not move in epoch 3"):
        allocate_bits(still, weights, macs, 4, (2, 3))
    path = tmp_path / "esn.json"
    for text in ("", "{}", '{"version": 2, "epochs": []}', '{"version": 1, "epochs": [{"epoch": 1}]}'):
        path.write_text(text)
        with pytest.raises(DataError, match="ESN record"):
            EsnRecord.load(path)
