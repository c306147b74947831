"""`compress` without training, and models that come quantized, by the command line."""

import json
from pathlib import Path

import onnx
import pytest

from tests.tvm_compress.test_importer_qdq import network
from tvm_compress.cli.main import main

SAMPLE = "sample:resnet8-fashion"
BITS = ["--weight-bits", "4", "--activation-bits", "8", "--images", "64"]


def test_every_option_together_as_json_and_as_a_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = [*BITS, "--calibration", "kl", "--equalize", "--weight-rounding", "reconstruction"]
    out = str(tmp_path / "model")
    assert main(["compress", SAMPLE, "-o", out, *options, "--bias-correction", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {site: row for row in result["calibration"] for site in row["sites"]}
    assert {"conv1", "layer2.0.short.0", "fc"} <= set(rows)
    assert all(0 <= row["clipped"] < 0.5 and row["bits"] == 8 for row in rows.values())
    assert all(row["seen_low"] <= row["low"] <= 0 < row["high"] <= row["seen_high"] for row in rows.values())
    assert result["validation_accuracy"] > 0.6
    plot = tmp_path / "ranges.png"
    options = ["--calibration", "minmax", "--calibration-plot", str(plot)]
    assert main(["compress", SAMPLE, "-o", out, *BITS, *options]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Calibrated inputs" in printed
    assert "layer1.0.conv1" in printed


def test_unknown_methods_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "model")
    assert main(["compress", SAMPLE, "-o", out, *BITS, "--calibration", "sideways"]) == 2
    assert "Known are: mse, kl" in capsys.readouterr().err
    assert main(["compress", SAMPLE, "-o", out, "--weight-bits", "8", "--activation-bits", "4"]) == 2
    assert "8-bit weights with 4-bit activations" in capsys.readouterr().err
    assert main(["compress", SAMPLE, "-o", out, *BITS[:-1], "0"]) == 2
    assert "images is 0" in capsys.readouterr().err
    assert not Path(out).exists()


def test_plots_that_cannot_be_are_refused_first(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, plot = str(tmp_path / "model"), str(tmp_path / "ranges.png")
    for arguments, text in (
        ([*BITS, "--calibration-plot", str(tmp_path / "none" / "ranges.png")], "a folder that exists"),
        ([*BITS, "--calibration-plot", str(tmp_path / "ranges.svg")], "must be a PNG file"),
        (["--calibration-plot", plot], "and nothing is"),
        (["--method", "toco", "--calibration-plot", plot], "does not go with --method toco"),
    ):
        assert main(["compress", SAMPLE, "-o", out, *arguments]) == 2
        assert text in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_quantized_onnx_file_is_inspected_and_compiled(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "qdq.onnx"
    onnx.save(network(), str(path))
    assert main(["inspect", str(path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["stage"] == "qdq"
    assert main(["compile", str(path), "-o", str(tmp_path / "artifact"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["library_bytes"] > 0
    manifest = json.loads((tmp_path / "artifact" / "manifest.json").read_text())
    assert {site["scheme"] for site in manifest["policy"]["sites"].values()} == {"int8"}
