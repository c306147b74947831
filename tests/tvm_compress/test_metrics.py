import numpy as np
import pytest

from tests.tvm_compress.twin_networks import random_resnet8, resnet8_module
from tvm_compress.metrics import esn, metrics
from tvm_compress.metrics.esn import esn_a, esn_d, filter_steps, mid_rise
from tvm_compress.passes.codebook_weights import CodebookWeights
from tvm_compress.passes.params import get_params, set_params
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.sites import find_sites


@pytest.fixture(scope="module")
def module():
    return resnet8_module(random_resnet8())


def uniform(module, scheme, weight_bits, activation_bits):
    policy = SitePolicy(scheme=scheme, weight_bits=weight_bits, activation_bits=activation_bits)
    return CompressionPolicy({site.name: policy for site in find_sites(module)})


# Counted by hand: output positions * filters * weights per filter.
MACS = 28 * 28 * 16 * 9 + 2 * 28 * 28 * 16 * 16 * 9 + 14 * 14 * 32 * 16 * (9 + 1) + 14 * 14 * 32 * 32 * 9
MACS += 7 * 7 * 64 * 32 * (9 + 1) + 7 * 7 * 64 * 64 * 9 + 640
WEIGHTS = 144 + 2 * 16 * 16 * 9 + 32 * 16 * 10 + 32 * 32 * 9 + 64 * 32 * 10 + 64 * 64 * 9 + 640
CHANNELS = 16 * 3 + 32 * 3 + 64 * 3 + 10


def test_a_float_module(module):
    result = metrics(module)
    assert result["macs"] == MACS
    assert result["bops"] == MACS * 32 * 32
    assert result["parameter_bytes"] == 4 * (WEIGHTS + CHANNELS)
    assert result["esn_a"] > 0


def test_indices_into_codebooks(module):
    """They are counted as stored; the signal norm sees the numbers that they stand for."""
    params = get_params(module)
    thirds = set_params(module, {"fc.weight": np.sign(params["fc.weight"]) * np.float32(0.3)})
    policy = CompressionPolicy({"fc": SitePolicy(codebook_bits=1)})
    before, after = metrics(thirds), metrics(CodebookWeights(policy)(thirds), policy)
    assert before["parameter_bytes"] - after["parameter_bytes"] == 640 * 4 - 640 // 8 - 2 * 4
    assert after["esn_a"] == before["esn_a"]
    assert after["macs"] == MACS


def test_quantized_modules(module):
    result = metrics(module, uniform(module, "int8", 8, 8))
    assert result["bops"] == MACS * 64
    assert result["parameter_bytes"] == WEIGHTS + 8 * CHANNELS
    result = metrics(module, uniform(module, "bitserial", 2, 3))
    assert result["bops"] == MACS * 6
    assert result["parameter_bytes"] == WEIGHTS // 4 + 8 * CHANNELS
    mixed = CompressionPolicy({"fc": SitePolicy(scheme="int8", weight_bits=8, activation_bits=8)})
    assert metrics(module, mixed)["bops"] == (MACS - 640) * 1024 + 640 * 64


def test_a_qdq_module_counts_as_the_float_one(module):
    policy = uniform(module, "bitserial", 4, 4)
    assert metrics(resnet8_module(random_resnet8(), 4), policy) == metrics(module, policy)


def test_fewer_bits_carry_less_signal(module):
    by_bits = [metrics(module, uniform(module, "bitserial", bits, 4)) for bits in (1, 2, 4)]
    for name in ("esn_a", "esn_d"):
        values = [result[name] for result in by_bits]
        assert values == sorted(values)


def test_mid_rise_quantizer():
    w = np.array([[0.9, -0.1, 0.3, 0.0], [0.1, -0.2, 0.05, 0.0]])
    levels = mid_rise(w, np.array([0.25, 0.5]), bits=3)
    np.testing.assert_array_equal(levels, [[3.5, -0.5, 1.5, 0.5], [0, 0, 0, 0]])
    assert esn_a(levels) == 3.5**2 + 0.25 + 2.25 + 0.25
    # ceil(log2 3.5 + 1) = 3, ceil(log2 1.5 + 1) = 2, and log2 0.5 + 1 = 0.
    assert esn_d(levels) == 3 + 0 + 2 + 0
    assert esn_d(levels, squared=True) == 9 + 4


def test_levels_stay_within_their_bits():
    w = np.random.default_rng(0).normal(size=(4, 3, 3, 3))
    for bits in range(1, 9):
        levels = mid_rise(w, filter_steps(w, bits), bits)
        assert np.abs(levels).max() == 2 ** (bits - 1) - 0.5
    np.testing.assert_array_equal(mid_rise(np.zeros((2, 3)), filter_steps(np.zeros((2, 3)), 4), 4), 0)


def test_pruned_weights_and_filters_have_no_signal():
    w = np.random.default_rng(0).normal(size=(4, 9))
    sparse = np.where(np.arange(36).reshape(4, 9) % 3 == 0, w, 0.0)
    kept = sparse[sparse != 0].reshape(4, 3)
    assert esn({"a": sparse}, {"a": 4}) == esn({"a": kept}, {"a": 4})
    slim = sparse.copy()
    slim[1:3] = 0
    assert esn({"a": slim}, {"a": 4}) == esn({"a": kept[[0, 3]]}, {"a": 4})


def test_layers_are_weighted_by_their_uses():
    w = np.random.default_rng(0).normal(size=(4, 9))
    once, twice = esn({"a": w}, {"a": 4}), esn({"a": w, "b": w}, {"a": 4, "b": 4}, {"a": 1.0, "b": 3.0})
    assert twice == pytest.approx(tuple(4 * value for value in once))
