import numpy as np
import pytest
from tvm import relax

from tests.passes.quantized_networks import FP32, Net, bits, policy, residual, sequential
from tvm_compress.bias_correction import MAX_IMAGES, correct_biases
from tvm_compress.calibration import calibrate
from tvm_compress.compression import compress_model, uniform_policy
from tvm_compress.compressor import PostTraining
from tvm_compress.errors import DataError, ModelError, SettingError
from tvm_compress.passes.params import get_params, set_params
from tvm_compress.passes.pipeline import compress
from tvm_compress.passes.realize_integer import RealizeInteger
from tvm_compress.passes.sites import find_sites
from tvm_compress.samples.load import load_sample, load_sample_data
from tvm_compress.twin import Twin


def images(count=64, channels=3, seed=0):
    return np.random.default_rng(seed).normal(size=(count, channels, 8, 8)).astype(np.float32)


def quantized(module, x, width=3):
    every = {site.name.replace(".", "__"): bits(width, 6) for site in find_sites(module)}
    return compress(module, policy(**every), calibration=calibrate(module, x))


def plain():
    """Convolutions without bias and batch norm."""
    return Net((1, 3, 8, 8)).module(
        lambda net, x: net.dense(mean(net, net.conv(x, "a", 6)), "b", 4, bias=False)
    )


def mean(net, x):
    return net.emit(relax.op.mean(net.emit(relax.op.nn.relu(x)), axis=[1, 2]))


@pytest.mark.parametrize("make", [sequential, residual, plain])
def test_the_means_of_the_output_are_those_of_the_dense_network(make):
    module, x = make(), images()
    before = quantized(module, x)
    after = correct_biases(before, module, x)
    wanted = Twin(module).predict(x).mean(axis=0)
    moved, left = (np.abs(Twin(m).predict(x).mean(axis=0) - wanted).max() for m in (before, after))
    assert left < 1e-5 + 1e-4 * np.abs(wanted).max()
    assert moved > 20 * left


def deep(layers=12):
    """Layers whose signal is only as strong as each of them leaves it."""

    def build(net, x):
        for i in range(layers):
            x = net.emit(relax.op.nn.relu(net.batch_norm(net.conv(x, f"c{i}", 16), f"bn{i}")))
        return net.dense(mean(net, x), "fc", 6)

    twin = Twin(Net((1, 3, 8, 8)).module(build))
    twin.reestimate_batch_norm(images(128, seed=1))
    return twin.to_module()


def test_the_signal_does_not_fade_in_a_deep_network():
    """Rounded weights are a little too small: behind corrected means, that adds up over the layers."""
    module, x, unseen = deep(), images(96), images(64, seed=2)
    before = quantized(module, x, width=4)
    after = correct_biases(before, module, x)
    wanted, uncorrected, corrected = (Twin(m).predict(unseen) for m in (module, before, after))
    assert 0.9 < np.linalg.norm(corrected.std(axis=0)) / np.linalg.norm(wanted.std(axis=0)) < 1.1
    assert np.square(corrected - wanted).mean() < 0.5 * np.square(uncorrected - wanted).mean()


def test_sorted_images_count_all_alike():
    module, x = residual(), images(2 * MAX_IMAGES)
    x[:MAX_IMAGES] += 1
    x[MAX_IMAGES:] -= 1
    before = quantized(module, x)
    wanted = Twin(module).predict(x).mean(axis=0)
    after = correct_biases(before, module, x)
    moved, left = (np.abs(Twin(m).predict(x).mean(axis=0) - wanted).max() for m in (before, after))
    assert left < 0.1 * moved


def test_only_shifts_change_and_a_layer_without_one_gets_a_bias():
    module, x = residual(), images()
    before, after = (
        get_params(m) for m in (quantized(module, x), correct_biases(quantized(module, x), module, x))
    )
    assert list(before) == list(after)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    statistics = {name for name in before if name.endswith(("running_mean", "running_var"))}
    assert changed == statistics | {"fc.bias"}
    grown = correct_biases(quantized(plain(), x), plain(), x)
    assert set(get_params(grown)) - set(get_params(quantized(plain(), x))) == {"a.bias", "b.bias"}
    assert RealizeInteger()(grown)["main"].params[0].name == "x"


def test_sites_in_float_are_left_alone():
    module, x = sequential(), images()
    policy_ = policy(conv1=bits(2, 4), conv2=FP32, fc1=FP32, fc2=FP32)
    before = compress(module, policy_, calibration=calibrate(module, x))
    after = get_params(correct_biases(before, module, x))
    changed = {n for n, value in get_params(before).items() if not np.array_equal(value, after[n])}
    assert changed == {"bn1.running_mean", "bn1.running_var"}


def test_one_image_and_dead_channels():
    """A channel that never moves, in either network, keeps its spread."""
    gamma = np.ones(8)
    gamma[:3] = 0
    module = residual(gamma=gamma)
    weights = get_params(module)["b.conv1.weight"].copy()
    weights[5] = 0
    module = set_params(module, {"b.conv1.weight": weights})
    x = images(1)
    after = correct_biases(quantized(module, images()), module, x)
    assert all(np.isfinite(value).all() for value in get_params(after).values())
    assert get_params(after)["b.bn1.running_var"][5] == get_params(module)["b.bn1.running_var"][5]
    np.testing.assert_allclose(Twin(after).predict(x), Twin(module).predict(x), atol=1e-4)


def test_bad_input():
    module, x = sequential(), images(4)
    before = quantized(module, x)
    with pytest.raises(ModelError, match="QDQ"):
        correct_biases(module, module, x)
    with pytest.raises(ModelError, match="float"):
        correct_biases(before, before, x)
    with pytest.raises(ModelError, match="conv1"):
        correct_biases(before, residual(), x)
    with pytest.raises(DataError, match="images"):
        correct_biases(before, module, x[:0])
    with pytest.raises(SettingError, match="sideways"):
        PostTraining(calibration="sideways")


def test_a_trained_network_gains():
    model, split = load_sample("resnet8-fashion"), load_sample_data("resnet8-fashion")
    wanted = Twin(model.module).predict(split.validation.normalized())
    chosen = uniform_policy(model, target="host", weight_bits=2, activation_bits=4)
    errors = {}
    for how in (
        PostTraining(),
        PostTraining(bias_correction=True),
        PostTraining(weight_rounding="reconstruction", bias_correction=True),
    ):
        compressed = compress_model(model, chosen, split, post_training=how, images=128)
        got = Twin(compressed.module).predict(split.validation.normalized())
        errors[how] = float(np.square(got - wanted).mean())
        assert len(compressed.metadata["calibration"]) > 5
    plain_error, corrected, both = errors.values()
    assert corrected < 0.97 * plain_error
    assert both < 0.7 * corrected
