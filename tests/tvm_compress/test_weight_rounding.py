"""Weights rounded for the layers' outputs: better than the nearest, on the same grid."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from tvm_compress.compression import compress_model, uniform_policy
from tvm_compress.compressor import Compressor, PostTraining
from tvm_compress.errors import DataError, ModelError, SettingError
from tvm_compress.model import Model
from tvm_compress.passes.params import get_params
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.quantization import quantize_weights
from tvm_compress.passes.sites import find_sites
from tvm_compress.samples.load import load_sample, load_sample_data
from tvm_compress.twin import Twin
from tvm_compress.weight_rounding import _round_group, round_weights

BITS = 3


def network(groups: int = 1) -> Model:
    torch.manual_seed(1)
    layers = [
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=groups), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(12 * 16, 5)),
    ]
    return Model.from_torch(nn.Sequential(*layers).eval(), [torch.zeros(1, 3, 8, 8)])


def images(count: int = 48) -> np.ndarray:
    """Smooth images: neighbouring inputs of a layer go together, as in photographs."""
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(count, 3, 4, 4)).repeat(2, axis=2).repeat(2, axis=3)
    return (coarse + 0.1 * rng.normal(size=coarse.shape)).astype(np.float32)


def policy_of(model: Model, bits: int = BITS) -> CompressionPolicy:
    return uniform_policy(model, target="host", weight_bits=bits, activation_bits=min(bits, 6))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("method", ["reconstruction", "curvature"])
def test_outputs_stay_closer_than_by_rounding_to_the_nearest(groups: int, method: str) -> None:
    model = network(groups)
    sites = find_sites(model.module)
    fp32 = {site.name: SitePolicy(scheme="bitserial", weight_bits=BITS, activation_bits=6) for site in sites}
    policy = CompressionPolicy(sites=fp32, target="host")
    x, fresh = images(), images(64)[48:]
    wanted = Twin(model.module).predict(fresh)
    errors = {}
    for name in ("nearest", method):
        module = Compressor(model.module, x, None, PostTraining(weight_rounding=name)).quantize(
            model.module, policy
        )
        errors[name] = float(np.square(Twin(module).predict(fresh) - wanted).mean())
    assert errors[method] < 0.8 * errors["nearest"]


def test_weights_stand_on_integers_of_the_same_scales() -> None:
    model = network()
    policy = policy_of(model)
    modules = [
        Compressor(model.module, images(), None, PostTraining(weight_rounding=method)).quantize(
            model.module, policy
        )
        for method in ("nearest", "reconstruction")
    ]
    plain, rounded = (get_params(module) for module in modules)
    for site in find_sites(model.module):
        if not policy[site.name].quantized:
            assert np.array_equal(plain[site.weight], rounded[site.weight])
            continue
        scale = rounded[f"{site.name}.weight_scale"]
        assert np.array_equal(scale, plain[f"{site.name}.weight_scale"])
        bits = policy[site.name].weight_bits
        integers = quantize_weights(rounded[site.weight], scale, bits)
        steps = scale.reshape(-1, *[1] * (integers.ndim - 1))
        assert np.allclose(rounded[site.weight], integers * steps, rtol=1e-6)
        assert np.abs(integers - quantize_weights(plain[site.weight], scale, bits)).max() <= 2


def test_one_row_is_near_the_best_of_all_roundings() -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        inputs = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6))
        moment, row = inputs.T @ inputs, 3 * rng.normal(size=6)

        def loss(integers: np.ndarray, row: np.ndarray = row, moment: np.ndarray = moment) -> float:
            return float((integers - row) @ moment @ (integers - row))

        floors = np.floor(row)
        all_of_them = [loss(floors + np.array(up)) for up in itertools.product((0, 1), repeat=6)]
        found = _round_group(row[None].copy(), np.ones(1), moment, 127)[0]
        assert loss(found) <= loss(np.rint(row)) * 1.001
        assert loss(found) <= np.quantile(all_of_them, 0.1)


def test_one_bit_and_unknown_inputs_are_left_alone() -> None:
    model = network()
    sites = {s.name: SitePolicy(None, None, "bitserial", 1, 2) for s in find_sites(model.module)}
    policy = CompressionPolicy(sites=sites, target="host")
    module = Compressor(model.module, images(), None).quantize(model.module, policy)
    again = round_weights(module, {name: 1 for name in sites}, images())
    assert all(np.array_equal(v, get_params(again)[k]) for k, v in get_params(module).items())


def test_a_channel_that_sees_nothing_rounds_to_the_nearest() -> None:
    rows = np.array([[0.4, -1.6, 2.2]])
    assert _round_group(rows, np.ones(1), np.zeros((3, 3)), 3).tolist() == [[0, -2, 2]]


def test_the_same_seed_gives_the_same_integers() -> None:
    model = network()
    made = [
        Compressor(model.module, images(), None, PostTraining(weight_rounding="curvature")).quantize(
            model.module, policy_of(model)
        )
        for _ in range(2)
    ]
    first, second = (get_params(module) for module in made)
    assert all(np.array_equal(value, second[name]) for name, value in first.items())


def test_bad_input() -> None:
    model = network()
    with pytest.raises(SettingError, match="sideways"):
        round_weights(model.module, {}, images(), "sideways")
    with pytest.raises(ModelError, match="qdq"):
        round_weights(model.module, {}, images())
    module = Compressor(model.module, images(), None).quantize(model.module, policy_of(model))
    with pytest.raises(DataError, match="images"):
        round_weights(module, {}, images()[:0])


def test_compress_model_takes_it() -> None:
    model, split = load_sample("resnet8-fashion"), load_sample_data("resnet8-fashion")
    policy = policy_of(model, 2)
    right = {}
    for method in ("nearest", "reconstruction"):
        compressed = compress_model(
            model, policy, split, post_training=PostTraining(weight_rounding=method), images=128
        )
        some = split.validation.take(slice(0, 300))
        right[method] = Twin(compressed.module).accuracy(some.normalized(), some.y)
    assert right["reconstruction"] > right["nearest"]
