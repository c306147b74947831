import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.tvm_compress.test_finetune import shapes_data, small_network
from tests.tvm_compress.twin_networks import random_resnet8, resnet8_module
from tvm_compress.cli.main import main
from tvm_compress.compressor import realize
from tvm_compress.data.dataset import Dataset, Split
from tvm_compress.errors import ModelError, SettingError
from tvm_compress.finetune import finetune
from tvm_compress.metrics import metrics
from tvm_compress.metrics.esn_training import EpochEsn, EsnRecord, SiteEsn
from tvm_compress.model import InputSpec, Model
from tvm_compress.passes.params import get_params, get_stage
from tvm_compress.prune_then_quantize import EsnSettings, prune, prune_then_quantize, quantize
from tvm_compress.twin import Twin

SMALL = EsnSettings(epochs=6, learning_rate=0.1, images=128, rounding=1, edge_bits=0)


@pytest.fixture(scope="module")
def split():
    return Split(shapes_data(600, 0), shapes_data(100, 1), shapes_data(300, 2))


@pytest.fixture(scope="module")
def trained(split):
    return finetune(small_network(), split.train, 6, learning_rate=0.2, batch_size=32)


@pytest.fixture(scope="module")
def slim(trained, split):
    return prune(trained, split, SMALL)


def accuracy(module, data):
    return Twin(module).accuracy(data.normalized(), data.y)


def integers(module, site):
    params = get_params(module)
    weight, scale = params[f"{site}.weight"], params[f"{site}.weight_scale"]
    return np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1)))


def test_half_the_channels_at_four_bits(trained, split):
    seen: list[int] = []
    result = prune_then_quantize(trained, split, SMALL, seen.append)
    assert get_stage(result.module) == "qdq"
    assert result.policy["c"].channels == 4
    assert get_params(result.module)["c.weight"].shape[0] == 4
    # The strongest filters are those that are left, before training moves them.
    norms = np.square(get_params(trained)["c.weight"]).sum(axis=(1, 2, 3))
    assert result.policy["c"].kept == tuple(np.sort(np.argsort(-norms)[:4]))
    assert np.abs(integers(result.module, "c")).max() == 7
    assert accuracy(result.module, split.test) > 0.8
    assert seen == [1, 2, 3, 4, 5, 6]
    summary = result.summary
    assert summary["bits_by_site"] == {"c": 4, "d": 4}
    assert len(summary["training_esn"]) == 6
    # Half the channels at half the bits; the dense layer's inputs are halved too.
    assert summary["esn_d_filters"] == summary["dense_esn_d_filters"] / 4
    json.dumps(summary, allow_nan=False)


def test_what_is_deployed_computes_the_same(slim, split):
    module = quantize(slim, split.train, SMALL).module
    x = split.test.normalized()
    agreement = (Twin(realize(module)).predict(x).argmax(1) == Twin(module).predict(x).argmax(1)).mean()
    assert agreement > 0.98


@pytest.mark.parametrize("bits", range(1, 9))
def test_weights_stand_on_a_grid_of_their_bits(slim, split, bits):
    result = quantize(slim, split.train, replace(SMALL, weight_bits=bits))
    for site in ("c", "d"):
        found = np.unique(np.abs(integers(result.module, site)))
        assert found.max() == (1 if bits == 1 else 2 ** (bits - 1) - 1)
        assert found.min() == 1 or bits > 1
        assert result.policy[site].scheme == "int8"
        assert (f"{bits} bits" in result.policy[site].note) == (bits < 8)
    macs = metrics(slim.module)["macs"]
    assert result.summary["esn_d_filters"] == macs * bits


def test_fine_tuning_stays_on_the_grid(slim, split):
    start = quantize(slim, split.train, replace(SMALL, weight_bits=3))
    result = quantize(slim, split.train, replace(SMALL, weight_bits=3, quantized_epochs=2))
    assert np.abs(integers(result.module, "c")).max() <= 3
    assert not np.array_equal(integers(result.module, "c"), integers(start.module, "c"))
    assert result.summary["esn_d_filters"] <= start.summary["esn_d_filters"]


def test_statistics_are_taken_again_without_labels(slim, split):
    settings = replace(SMALL, weight_bits=2)
    unlabelled = replace(split.train, y=np.zeros_like(split.train.y))
    first, again = (quantize(slim, data, settings) for data in (split.train, split.train))
    params, before = get_params(first.module), get_params(slim.module)
    assert not np.allclose(params["n.running_mean"], before["n.running_mean"])
    for name, value in get_params(again.module).items():
        np.testing.assert_array_equal(value, params[name])
    # As many images as there are: which are drawn depends on the labels, what is done with them does not.
    everything = replace(settings, images=len(split.train))
    one, other = (quantize(slim, data, everything) for data in (split.train, unlabelled))
    for name, value in get_params(one.module).items():
        np.testing.assert_array_equal(value, get_params(other.module)[name])


def test_bits_follow_the_training(trained, slim, split):
    record = EsnRecord((EpochEsn(1, {}, {"c": SiteEsn(10.0, 1.0, 1), "d": SiteEsn(1e4, 1.0, 1)}),))
    settings = replace(SMALL, allocate=True, weight_bits=4.5, record=record)
    bits = quantize(slim, split.train, settings).summary["bits_by_site"]
    assert bits["d"] > bits["c"]
    own = quantize(slim, split.train, replace(settings, record=None)).summary["bits_by_site"]
    assert set(own) == {"c", "d"}
    stranger = EsnRecord((EpochEsn(1, {}, {"x": SiteEsn(1.0, 1.0, 1)}),))
    with pytest.raises(SettingError, match="no layer 'c'"):
        quantize(slim, split.train, replace(settings, record=stranger))


def test_width_1_and_32_bits_change_nothing(trained, split):
    result = prune_then_quantize(trained, split, replace(SMALL, width=1.0, weight_bits=32, epochs=0))
    assert get_stage(result.module) == "float"
    for name, value in get_params(trained).items():
        np.testing.assert_array_equal(get_params(result.module)[name], value)
    assert result.summary["esn_d_filters"] == result.summary["dense_esn_d_filters"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 0.0}, "width"),
        ({"width": 1.5}, "width"),
        ({"weight_bits": 9}, "weight_bits"),
        ({"weight_bits": 3.5}, "whole number"),
        ({"activation_bits": 7}, "activation_bits"),
        ({"edge_bits": 9}, "edge_bits"),
        ({"criterion": "random"}, "Criterion 'random'"),
        ({"images": 1}, "images"),
        ({"allocate": True, "epochs": 0}, "Bits can be allocated only"),
        ({"record": EsnRecord(())}, "holds no epoch"),
    ],
)
def test_impossible_settings(values, message):
    with pytest.raises(SettingError, match=message):
        EsnSettings(**values)


def test_wrong_modules(slim, split):
    quantized = quantize(slim, split.train, SMALL).module
    with pytest.raises(ModelError, match="takes a float module"):
        prune_then_quantize(quantized, split, SMALL)


def test_bit_serial_where_there_are_kernels():
    rng = np.random.default_rng(0)
    images = Dataset(
        rng.integers(0, 256, (64, 1, 28, 28), np.uint8), rng.integers(0, 10, 64), tuple("0123456789")
    )
    settings = EsnSettings(width=0.75, activation_bits=4, epochs=0, images=64, rounding=32)
    result = prune_then_quantize(resnet8_module(random_resnet8()), Split(images, images, images), settings)
    assert result.policy["layer3.0.conv2"].scheme == "bitserial"
    assert result.policy["layer3.0.conv2"].activation_bits == 4
    # 16 channels: INT8 kernels, on the grid of the same bits.
    assert result.policy["layer1.0.conv1"].scheme == "int8"
    assert result.policy["layer1.0.conv1"].note.endswith("INT8 kernels, weights of 4 bits")
    assert np.abs(integers(result.module, "layer1.0.conv1")).max() == 7
    assert result.summary["bits_by_site"] == {
        name: 8 if name in ("conv1", "fc") else 4 for name in result.summary["bits_by_site"]
    }


def test_the_command_and_what_follows(
    trained, split, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Compile, verify and benchmark follow as after a search."""

    def call(*arguments: str) -> dict:
        assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    dense, data, record = str(tmp_path / "dense"), str(tmp_path / "data.npz"), str(tmp_path / "esn.json")
    Model(trained, InputSpec("x", (1, 1, 8, 8), "float32", (0.3,), (0.3,)), ("a", "b", "c")).save(dense)
    np.savez(data, x=split.train.x, y=split.train.y)
    model, artifact = str(tmp_path / "model"), str(tmp_path / "artifact")
    esn = ["compress", dense, "--data", data, "-o", model, "--method", "esn"]
    call(*esn, "--rounding", "1", "--finetune-epochs", "2", "--save-esn", record)
    result = call(
        *esn,
        "--width",
        "0.75",
        "--rounding",
        "1",
        "--finetune-epochs",
        "0",
        "--esn-record",
        record,
        "--mean-bits",
        "4",
    )
    assert result["metrics"]["esn_d_filters"] == result["esn_d_filters"] < result["dense_esn_d_filters"]
    call("compile", model, "-o", artifact)
    checked = call("verify", artifact, "--model", model, "--data", data, "--limit", "40")
    assert checked["agreement"] == 1.0
    assert main([*esn, "--esn-record", str(tmp_path / "none.json"), "--mean-bits", "3"]) == 2
    assert "ESN record" in capsys.readouterr().err
    assert main([*esn, "--esn-record", record]) == 2
    assert "--mean-bits" in capsys.readouterr().err
    assert main([*esn, "--policy", record]) == 2
    assert "--policy does not go with --method esn" in capsys.readouterr().err
