"""The main job on the embedded sample, small: search, artifacts, report."""

import json
from pathlib import Path
from typing import Any

import pytest

from tvm_compress.artifact import Artifact
from tvm_compress.cli.main import main

SAMPLE = "sample:resnet8-fashion"
FAST = ["--warmup", "2", "--finetune-epochs", "1"]


def search(capsys: pytest.CaptureFixture[str], folder: Path, study: str, *extra: str) -> dict[str, Any]:
    arguments = ["search", SAMPLE, "--study", study, "--studies", str(folder), "--json", *FAST, *extra]
    assert main(arguments) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_search_on_this_machine_builds_and_reports(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    summary = search(capsys, tmp_path, "s", "--agent", "joint", "--episodes", "3", "--budget", "0.4")
    assert len(summary["trials"]) == 3
    for variant in ("dense", "best"):
        assert summary[variant]["latency_unit"] == "seconds"
        assert set(summary[variant]) >= {"accuracy", "latency", "macs", "bops", "bytes"}
    assert summary["dense"]["accuracy"] >= 0.9
    assert summary["agreement"]["artifact-host"] >= 0.995
    paths = summary["paths"]
    page = Path(paths["report"]).read_text()
    data = json.loads((tmp_path / "s" / "report.json").read_text())
    quantized = {bar["name"] for bar in data["sites"] if bar["scheme"] != "fp32"}
    assert {site for row in data["ranges"] for site in row["sites"]} == quantized
    assert page.count("data:image/png;base64,") >= 3
    artifact = Artifact.load(paths["artifacts"]["host"])
    assert artifact.manifest.accuracy is not None
    assert artifact.manifest.accuracy["value"] == summary["best"]["accuracy"]
    assert json.loads(Path(paths["policy"]).read_text())["version"] == 1
    assert main(["report", "s", "--studies", str(tmp_path), "--json"]) == 0
    assert Path(json.loads(capsys.readouterr().out)["report"]).read_text() == page
    # The same name with other settings is refused.
    arguments = ["search", SAMPLE, "--study", "s", "--studies", str(tmp_path), "--agent", "pruning"]
    assert main(arguments) == 2
    assert "agent" in capsys.readouterr().err


def test_emulated_board_is_searched_and_its_artifact_verified(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """That one seed gives one result there, also when killed, is tested on a small network (test_search)."""
    device = ["--device", "emulated-a72", "--agent", "quantization"]
    summary = search(capsys, tmp_path, "s", *device, "--episodes", "2")
    assert summary["best"]["latency_unit"] == "estimated_cycles"
    assert summary["best"]["emulated_cycles"] == summary["best"]["latency"]
    assert summary["ratio"] == summary["best"]["latency"] / summary["dense"]["latency"]
    assert summary["agreement"]["artifact-rpi4"] == 1.0
