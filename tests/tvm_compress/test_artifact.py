"""Artifacts: what is damaged is refused by name, nothing is left half-written, a .tar is the same thing."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_compress import artifact as artifact_module
from tvm_compress.artifact import LIBRARY, MANIFEST, Artifact
from tvm_compress.compression import compile_model
from tvm_compress.errors import ArtifactError, DataError
from tvm_compress.rpc.device import open_device
from tvm_compress.samples.load import load_sample


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifacts") / "dense"
    compile_model(load_sample("resnet8-fashion"), "host", path)
    return path


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "copy"))


def test_manifest_says_what_it_is(built: Path) -> None:
    manifest = Artifact.load(built).manifest
    assert manifest.input["shape"] == [1, 1, 28, 28]
    assert manifest.output == {"shape": [1, 10], "dtype": "float32"}
    assert manifest.class_names[9] == "Ankle boot"
    assert manifest.metrics["macs"] == 9345920
    assert manifest.policy is None
    assert manifest.accuracy is None
    parts = dict(manifest.memory)
    assert parts.pop("peak_bytes") == sum(parts.values())
    # Weights stand in the library, packed and not compressed.
    assert 0 < (built / LIBRARY).stat().st_size - parts["constant_bytes"] < 1 << 20
    assert {"tvm", "tvm_ffi", "tvm_compress"} <= set(manifest.versions)
    json.dumps(manifest.target)


@pytest.mark.parametrize("position", [0, 5000, -1])
def test_a_changed_byte_is_found(copy: Path, position: int) -> None:
    content = bytearray((copy / LIBRARY).read_bytes())
    content[position] ^= 1
    (copy / LIBRARY).write_bytes(content)
    with pytest.raises(ArtifactError, match="SHA-256"):
        Artifact.load(copy)


def rewrite(path: Path, **changes: Any) -> None:
    values = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(values | changes))


def test_damaged_manifests(copy: Path) -> None:
    rewrite(copy, schema_version=99)
    with pytest.raises(ArtifactError, match="version 99"):
        Artifact.load(copy)
    rewrite(copy, schema_version=1, colour="blue")
    with pytest.raises(ArtifactError, match="colour"):
        Artifact.load(copy)
    (copy / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="JSON"):
        Artifact.load(copy)


def test_missing_library(copy: Path) -> None:
    (copy / LIBRARY).unlink()
    with pytest.raises(ArtifactError, match=r"model\.so"):
        Artifact.load(copy)


def test_tar_is_the_same_artifact(built: Path, tmp_path: Path) -> None:
    source = Artifact.load(built)
    for name in ("a.tar", "b.tar"):
        source.pack(tmp_path / name)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    loaded = Artifact.load(tmp_path / "a.tar")
    assert loaded.manifest == source.manifest
    assert loaded.library.read_bytes() == source.library.read_bytes()
    (tmp_path / "c.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:70000])
    with pytest.raises(ArtifactError, match=r"c\.tar"):
        Artifact.load(tmp_path / "c.tar")


def test_a_failed_export_leaves_the_old_artifact(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in copy.iterdir()}

    def interrupted() -> dict[str, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact_module, "_versions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compile_model(load_sample("resnet8-fashion"), "host", copy)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_recorded_accuracy_is_that_of_the_library(copy: Path) -> None:
    loaded = Artifact.load(copy)
    images = np.random.default_rng(0).normal(size=(3, 1, 28, 28)).astype(np.float32)
    device = open_device("local")
    right = loaded.predict(images, device).argmax(axis=1)
    labels = right.copy()
    labels[0] = (labels[0] + 1) % 10
    check = loaded.verify(images, labels, device)
    assert check.accuracy == pytest.approx(2 / 3)
    loaded.record(check)
    accuracy = Artifact.load(copy).manifest.accuracy
    assert accuracy is not None
    assert accuracy["value"] == check.accuracy
    assert accuracy["samples"] == 3


def test_images_of_another_shape(built: Path) -> None:
    with pytest.raises(DataError, match="20"):
        Artifact.load(built).predict(np.zeros((1, 1, 20, 20), np.float32), open_device("local"))
