"""Policies applied without a search: uniform ones, bad ones, and the same for an ONNX file as for torch."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from tests.passes.numpy_interpreter import calls
from tvm_compress.compression import compress_model, uniform_policy
from tvm_compress.compressor import realize
from tvm_compress.data.dataset import Split
from tvm_compress.errors import DataError, ModelError, PolicyError, SettingError
from tvm_compress.metrics.cost import metrics
from tvm_compress.model import Model
from tvm_compress.passes.pipeline import build
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.sites import find_sites
from tvm_compress.samples.load import load_sample, load_sample_data, sample_module
from tvm_compress.twin import Twin


@pytest.fixture(scope="module")
def sample() -> Model:
    return load_sample("resnet8-fashion")


@pytest.fixture(scope="module")
def split() -> Split:
    return load_sample_data("resnet8-fashion")


def test_onnx_and_torch_give_the_same_integers(sample: Model, split: Split, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        # The exporter's own: what it still uses of torch's older interfaces.
        warnings.simplefilter("ignore")
        network, example = sample_module("resnet8-fashion").eval(), (torch.zeros(1, 1, 28, 28),)
        torch.onnx.export(network, example, str(path), dynamo=True, optimize=False, verbose=False)
    spec = sample.input_spec
    imported = Model.from_onnx(path, mean=spec.mean, std=spec.std, class_names=sample.class_names)
    assert find_sites(imported.module) == find_sites(sample.module)
    policy = uniform_policy(sample, target="host", pruning_ratio=0.25, weight_bits=4, activation_bits=4)
    images = split.test.normalized(slice(0, 20))
    logits = []
    for model in (sample, imported):
        twin = Twin(realize(compress_model(model, policy, split, images=64).module))
        traced = twin.trace(images)
        logits.append({name: np.asarray(values) for name, values in traced.items()})
    assert logits[0].keys() == logits[1].keys()
    for name, values in logits[0].items():
        np.testing.assert_array_equal(values, logits[1][name], err_msg=name)


def test_same_policy_same_bytes(sample: Model, split: Split) -> None:
    policy = uniform_policy(sample, target="host", pruning_ratio=0.5, weight_bits=8, activation_bits=8)
    first, second = (compress_model(sample, policy, split, images=64, seed=3) for _ in range(2))
    assert first.metadata["policy"] == second.metadata["policy"]
    images = split.test.normalized(slice(0, 8))
    np.testing.assert_array_equal(
        Twin(realize(first.module)).predict(images), Twin(realize(second.module)).predict(images)
    )


def test_bitserial_falls_back_with_a_note(sample: Model) -> None:
    policy = uniform_policy(sample, target="host", weight_bits=2, activation_bits=2)
    assert policy["layer3.0.conv2"].scheme == "bitserial"
    assert policy["layer1.0.conv1"].scheme == "int8"
    assert "32" in policy["layer1.0.conv1"].note


@pytest.mark.parametrize(
    ("bits", "ratio"), [((7, 7), 0.0), ((8, 4), 0.0), ((32, 8), 0.0), ((8, 8), 1.0), ((8, 8), -0.1)]
)
def test_impossible_settings(sample: Model, bits: tuple[int, int], ratio: float) -> None:
    with pytest.raises(SettingError):
        uniform_policy(
            sample, target="host", pruning_ratio=ratio, weight_bits=bits[0], activation_bits=bits[1]
        )


def test_policies_and_models_that_do_not_fit(sample: Model, split: Split) -> None:
    with pytest.raises(PolicyError, match="nowhere"):
        compress_model(sample, CompressionPolicy({"nowhere": SitePolicy(channels=4)}), split)
    policy = uniform_policy(sample, target="host", weight_bits=8, activation_bits=8)
    compressed = compress_model(sample, policy, split, images=32)
    with pytest.raises(ModelError, match="compressed already"):
        compress_model(compressed, policy, split)


def test_fine_tuning_must_not_fill_pruned_weights(sample: Model, split: Split) -> None:
    policy = CompressionPolicy(sites={"conv1": SitePolicy(weight_pruning_ratio=0.5)})
    with pytest.raises(PolicyError, match="fine-tuning would fill"):
        compress_model(sample, policy, split, finetune_epochs=1)


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_weights_of_few_bits_with_8_bit_activations(sample: Model, split: Split, bits: int) -> None:
    policy = uniform_policy(sample, target="host", weight_bits=bits, activation_bits=8)
    assert {site.scheme for site in policy.sites.values()} == {"int8"}
    model = compress_model(sample, policy, split, images=64)
    integer = realize(model.module)
    layers = calls(integer, "tvm_compress.conv2d") + calls(integer, "tvm_compress.dense")
    assert len(layers) == len(policy.sites)
    limit = 1 if bits == 1 else 2 ** (bits - 1) - 1
    for call in layers:
        assert np.abs(call.args[1].value.numpy().astype(int)).max() <= limit
        assert (str(call.attrs["scheme"]), int(call.attrs["weight_bits"])) == ("int8", 8)
    # Stored as bytes, whatever the grid.
    eight = uniform_policy(sample, target="host", weight_bits=8, activation_bits=8)
    sizes = [metrics(model.module, one)["parameter_bytes"] for one in (policy, eight)]
    assert sizes[0] == sizes[1]
    machine = relax.VirtualMachine(build(integer, "host").executable, tvm.cpu())
    for image in split.test.normalized(slice(0, 3)):
        found = machine["main"](tvm.runtime.tensor(image[None])).numpy()
        np.testing.assert_allclose(found, Twin(integer).predict(image[None]), rtol=1e-5, atol=1e-5)


def test_calibration_sets_that_cannot_be_and_the_smallest_one(sample: Model, split: Split) -> None:
    policy = uniform_policy(sample, target="host", weight_bits=8, activation_bits=8)
    with pytest.raises(SettingError, match="images is 0"):
        compress_model(sample, policy, split, images=0)
    model = compress_model(sample, policy, split, images=1)
    assert np.isfinite(Twin(realize(model.module)).predict(split.test.normalized(slice(0, 2)))).all()


def test_constant_activations_name_the_site(sample: Model, split: Split) -> None:
    mean = np.float32(split.train.normalization.mean[0])
    grey = replace(split.train, x=np.full(split.train.x.shape, mean, np.float32))
    policy = uniform_policy(sample, target="host", weight_bits=8, activation_bits=8)
    with pytest.raises(DataError, match=r"'conv1'.*constant"):
        compress_model(sample, policy, replace(split, train=grey), images=8)
