"""`compress --method fastlc` as a user types it: with data once, then without."""

import json
from pathlib import Path

import numpy as np
import pytest

from tvm_compress.cli.main import main

SAMPLE = "sample:resnet8-fashion"
FASTLC = ["compress", SAMPLE, "--method", "fastlc"]


@pytest.fixture(scope="module")
def curvature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fastlc")
    path = folder / "curvature.safetensors"
    few = ["--images", "32", "--draws", "1", "--save-curvature", str(path)]
    assert main([*FASTLC, "--scheme", "prune", "--ratio", "2", *few, "-o", str(folder / "m"), "--json"]) == 0
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_compress_compile_verify_without_data(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, curvature: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_data(*_: object, **__: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr("tvm_compress.cli.load.load_data", no_data)
    capsys.readouterr()
    model, artifact = str(tmp_path / "model"), str(tmp_path / "artifact")
    made = call(
        capsys, *FASTLC, "--scheme", "kmeans", "--bits", "4", "--curvature", str(curvature), "-o", model
    )
    assert made["validation_accuracy"] is None
    assert made["compression"] > 7
    dense = call(capsys, "inspect", SAMPLE)
    assert made["metrics"]["parameter_bytes"] < 0.17 * dense["metrics"]["parameter_bytes"]
    inspected = call(capsys, "inspect", model)
    assert {site["policy"]["codebook_bits"] for site in inspected["sites"]} == {4}
    call(capsys, "compile", model, "-o", artifact)
    monkeypatch.undo()
    checked = call(capsys, "verify", artifact, "--model", model, "--data", SAMPLE, "--limit", "60")
    assert checked["agreement"] == 1.0


def test_with_data_the_accuracy_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    few = ["--images", "16", "--draws", "1"]
    made = call(capsys, *FASTLC, "--scheme", "low-rank", "--ratio", "1.5", *few, "-o", str(tmp_path / "m"))
    assert made["validation_accuracy"] > 0.2
    assert made["metrics"]["macs"] < 0.95 * call(capsys, "inspect", SAMPLE)["metrics"]["macs"]


def test_images_without_labels_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (60, 1, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", x=x)
    data = ["--data", str(tmp_path / "x.npz"), "--images", "32"]
    fewer = call(capsys, *FASTLC, *data, "--draws", "1", "--scheme", "kmeans", "-o", str(tmp_path / "m"))
    assert fewer["labels"] == fewer["curvature_labels"] == "model"
    toco = ["compress", SAMPLE, "--method", "toco", *data, "--iterations", "2", "-o", str(tmp_path / "t")]
    told = call(capsys, *toco)
    assert told["labels"] == told["loss_labels"] == "model"
    assert main([*toco]) == 0
    said = capsys.readouterr()
    assert "has no labels: the model's own predictions stand in" in said.err
    assert "by the model's own predictions" in said.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--scheme"]),
        (["--scheme", "magic"], ["magic", "kmeans"]),
        (["--scheme", "prune", "--bits", "4"], ["bits", "kmeans"]),
        (["--scheme", "low-rank", "--rank", "2", "--ratio", "4"], ["both"]),
        (["--scheme", "prune", "--keep", "layer9"], ["layer9"]),
        (["--scheme", "prune", "--curvature", "no/such/file"], ["no/such/file"]),
    ],
)
def test_bad_input(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, curvature: Path, options: list[str], words: list[str]
) -> None:
    capsys.readouterr()
    given = options if "--curvature" in options else [*options, "--curvature", str(curvature)]
    assert main([*FASTLC, *given, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "out").exists()


def test_curvature_of_another_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, curvature: Path
) -> None:
    pruned = tmp_path / "pruned"
    given = ["--scheme", "prune", "--curvature", str(curvature)]
    call(capsys, *FASTLC, *given, "-o", str(pruned))
    other = ["compress", str(pruned), "--method", "fastlc", *given, "-o", str(tmp_path / "out")]
    assert main(other) == 2
    assert "another model" in capsys.readouterr().err
    np.testing.assert_equal((tmp_path / "out").exists(), False)
