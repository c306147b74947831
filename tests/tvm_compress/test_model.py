"""Saving, loading and refusing models."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from torch import nn

from tvm_compress.errors import ModelError
from tvm_compress.model import InputSpec, Model, load_model
from tvm_compress.passes.params import get_params, set_params


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    return Model.from_torch(
        network,
        (torch.zeros(1, 3, 4, 4),),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4),
        class_names=("cat", "dog"),
        metadata={"accuracy": 0.9, "note": None},
    )


def record(path: Path) -> dict:
    return json.loads((path / "model.json").read_text())


def test_round_trip(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "deep" / "saved")
    loaded = load_model(tmp_path / "deep" / "saved")
    tvm.ir.assert_structural_equal(loaded.module, model.module)
    for name, value in get_params(model.module).items():
        np.testing.assert_array_equal(get_params(loaded.module)[name], value)
    assert loaded.input_spec == model.input_spec
    assert loaded.class_names == ("cat", "dog")
    assert loaded.metadata == model.metadata
    assert loaded.num_classes == 2
    assert sorted(os.listdir(tmp_path / "deep")) == ["saved"]


def test_saving_replaces_a_model_and_nothing_else(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    model.save(path)
    bias = get_params(model.module)["4.bias"]
    model.with_module(set_params(model.module, {"4.bias": bias + 1})).save(path)
    np.testing.assert_array_equal(get_params(Model.load(path).module)["4.bias"], bias + 1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("other", "file"):
        with pytest.raises(ModelError, match="is not a saved Model"):
            model.save(tmp_path / name)
    with pytest.raises(ModelError, match="cannot be written"):
        model.save(tmp_path / "file" / "below")
    assert sorted(os.listdir(tmp_path)) == ["file", "other", "saved"]
    assert (tmp_path / "other" / "thesis.txt").read_text() == "years of work"


def test_same_model_same_bytes(model: Model, tmp_path: Path) -> None:
    model.save(tmp_path / "a")
    Model.load(tmp_path / "a").save(tmp_path / "b")
    for name in ("module.json", "params.safetensors", "model.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("name", ["module.json", "params.safetensors", "model.json"])
@pytest.mark.parametrize("damage", ["missing", "short", "bit"])
def test_damaged_directories(model: Model, tmp_path: Path, name: str, damage: str) -> None:
    model.save(tmp_path / "saved")
    path = tmp_path / "saved" / name
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        data[len(data) // 3] ^= 0x80
        path.write_bytes(bytes(data) if damage == "bit" else bytes(data[:-20]))
    with pytest.raises(ModelError, match=r"damaged|lacks|not a saved Model"):
        Model.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "has schema 99; this version reads 1"),
        ({"colour": "red"}, "unknown or missing keys: colour"),
        ({"input": {"name": "x"}}, "does not describe its input"),
        ({"files": {"../secret": "0"}}, "does not describe its input or files"),
        ({"parameters": ["0.weight", "other"]}, "cannot be read by TVM"),
    ],
)
def test_records_of_another_kind(model: Model, tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "saved"
    model.save(path)
    (path / "model.json").write_text(json.dumps(record(path) | change))
    with pytest.raises(ModelError, match=message):
        Model.load(path)


def test_record_without_a_key(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    model.save(path)
    (path / "model.json").write_text(
        json.dumps({k: v for k, v in record(path).items() if k != "class_names"})
    )
    with pytest.raises(ModelError, match="missing keys: class_names"):
        Model.load(path)


def test_metadata_must_be_json(model: Model, tmp_path: Path) -> None:
    odd = Model(model.module, model.input_spec, model.class_names, {"weights": np.zeros(2)})
    with pytest.raises(ModelError, match="not plain JSON"):
        odd.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_sources_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    (tmp_path / "x.pt2").write_text("text")
    cases = {
        "gone.onnx": "does not exist",
        "x.txt": "none of: a .pt2 file",
        "x.pt2": "not a readable exported program",
        "": "is not a saved Model",
    }
    for name, message in cases.items():
        with pytest.raises(ModelError, match=message):
            load_model(tmp_path / name)
    with pytest.raises(ModelError, match="The samples are: resnet8-fashion"):
        load_model("sample:unknown")


def test_class_names_must_fit(model: Model) -> None:
    with pytest.raises(ModelError, match="2 logits, but 3 classes"):
        Model(model.module, model.input_spec, ("a", "b", "c"))
    assert Model(model.module, model.input_spec).class_names == ("0", "1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": (3, 4, 4)}, "must be .N, C, H, W"),
        ({"mean": (0.1, 0.2), "std": (1.0, 1.0)}, "2 means"),
        ({"mean": (0.1,), "std": (1.0, 1.0, 1.0)}, "1 means and 3 deviations"),
        ({"std": (0.0,)}, "above 0"),
    ],
)
def test_input_specs_that_do_not_fit(settings: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        InputSpec(**({"name": "x", "shape": (1, 3, 4, 4)} | settings))
