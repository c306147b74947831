"""The embedded sample: its size, its accuracy, and that the network has not seen what it is judged by."""

import gzip
import hashlib
import struct
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from tvm_compress.data.dataset import Dataset, Split
from tvm_compress.data.load import load_data
from tvm_compress.errors import ModelError
from tvm_compress.passes.params import get_params
from tvm_compress.passes.sites import find_sites
from tvm_compress.samples.load import load_sample, load_sample_data, sample_module, sample_names

NAME = "resnet8-fashion"
SITES = ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
SITES += [f"layer{stage}.0.{name}" for stage in (2, 3) for name in ("conv1", "conv2", "short.0")] + ["fc"]


@pytest.fixture(scope="module")
def split() -> Split:
    return load_sample_data(NAME)


def accuracy(data: Dataset) -> float:
    with torch.no_grad():
        logits = sample_module(NAME)(torch.from_numpy(data.normalized()))
    return float((logits.argmax(1).numpy() == data.y).mean())


def test_accuracy_is_what_the_record_says(split: Split) -> None:
    stated = load_sample(NAME).metadata["accuracy"]
    assert stated["test"] >= 0.92
    assert accuracy(split.test) >= 0.90
    # Other machines add in another order: one image may fall on the other side.
    assert accuracy(split.test) == pytest.approx(stated["shipped_test"], abs=0.0021)
    assert accuracy(split.validation) == pytest.approx(stated["shipped_validation"], abs=0.0021)


def test_images_are_stratified_and_disjoint(split: Split) -> None:
    parts = (split.train, split.validation, split.test)
    assert [len(part) for part in parts] == [5000, 1000, 1000]
    for part in parts:
        assert part.x.dtype == np.uint8
        assert part.x.shape[1:] == (1, 28, 28)
        assert np.unique(np.bincount(part.y)).tolist() == [len(part) // 10]
    hashes = [{hashlib.sha256(image.tobytes()).digest() for image in part.x} for part in parts]
    assert not hashes[0] & hashes[1]
    assert not hashes[0] & hashes[2]
    assert not hashes[1] & hashes[2]


def test_sizes_and_licence() -> None:
    folder = Path(str(files("tvm_compress.samples")))
    assert (folder / f"{NAME}.safetensors").stat().st_size < 500_000
    assert (folder / f"{NAME}.npz").stat().st_size < 4_000_000
    text = (folder / "licences.txt").read_text(encoding="utf-8")
    assert "MIT License" in text
    assert "Zalando" in text


def test_model_of_the_sample(split: Split) -> None:
    model = load_sample(NAME)
    sites = {site.name: site for site in find_sites(model.module)}
    assert sorted(sites) == sorted(SITES)
    assert sites["layer2.0.conv1"].strides == (2, 2)
    assert sites["fc"].weight_shape == (10, 64)
    assert model.class_names[9] == "Ankle boot"
    assert model.input_spec.shape == (1, 1, 28, 28)
    assert (model.input_spec.mean, model.input_spec.std) == (
        split.train.normalization.mean,
        split.train.normalization.std,
    )
    state = sample_module(NAME).state_dict()
    for name, value in get_params(model.module).items():
        np.testing.assert_array_equal(value, state[name].numpy())


def test_sample_as_data(split: Split) -> None:
    loaded = load_data(f"sample:{NAME}", load_sample(NAME))
    for name in ("train", "validation", "test"):
        part = getattr(split, name)
        np.testing.assert_array_equal(getattr(loaded, name).x, part.x)
        np.testing.assert_array_equal(getattr(loaded, name).y, part.y)
        assert getattr(loaded, name).normalization == part.normalization


def test_unknown_samples() -> None:
    assert sample_names() == (NAME,)
    for function in (load_sample, load_sample_data, sample_module):
        with pytest.raises(ModelError, match=f"no sample 'other'. The samples are: {NAME}"):
            function("other")


def test_training_script_resumes(tmp_path: Path) -> None:
    """Two epochs on a little data, in one go and with a break, end in the same bytes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6400), ("t10k", 1000)):
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = rng.integers(0, 256, (count, 8, 8), np.uint8)
        for what, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
            (tmp_path / f"{part}-{what}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes(), 1))

    def train(out: str, stop: int | None = None) -> str:
        command = [
            sys.executable,
            "scripts/train_sample.py",
            "--data",
            str(tmp_path),
            "--epochs",
            "2",
            "--batch",
            "900",
        ]
        command += [
            "--out",
            str(tmp_path / out),
            "--checkpoint",
            str(tmp_path / out / "state.pt"),
            "--threads",
            "1",
        ]
        command += ["--stop-after", str(stop)] if stop else []
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
        return done.stdout

    whole = train("whole")
    assert "epoch 2" in whole
    assert '"shipped_test"' in whole
    assert "epoch 2" not in train("broken", stop=1)
    assert not (tmp_path / "broken" / f"{NAME}.safetensors").exists()
    assert "resumed after epoch 1" in train("broken")
    for suffix in ("safetensors", "json", "npz"):
        first, second = ((tmp_path / out / f"{NAME}.{suffix}").read_bytes() for out in ("whole", "broken"))
        assert first == second
