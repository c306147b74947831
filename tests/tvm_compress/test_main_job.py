"""The main job on the embedded sample, small: search, resume, artifacts, report; same seed, same result."""

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


def essence(summary: dict[str, Any]) -> list[tuple[float, float, float]]:
    return [(t["reward"], t["accuracy"], t["ratio"]) for t in summary["trials"]]


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
    assert page.count("data:image/png;base64,") >= 3
    artifact = Artifact.load(paths["artifacts"]["host"])
    assert artifact.manifest.accuracy is not None
    assert artifact.manifest.accuracy["value"] == summary["best"]["accuracy"]
    assert json.loads(Path(paths["policy"]).read_text())["version"] == 1
    assert main(["report", "s", "--studies", str(tmp_path), "--json"]) == 0
    assert Path(json.loads(capsys.readouterr().out)["report"]).read_text() == page


def test_other_settings_under_the_same_name_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    search(capsys, tmp_path, "s", "--agent", "pruning", "--episodes", "1")
    arguments = ["search", SAMPLE, "--study", "s", "--studies", str(tmp_path), "--agent", "joint"]
    assert main(arguments) == 2
    assert "agent" in capsys.readouterr().err


def test_emulated_board_repeats_and_resumes_to_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In one go, or stopped after two episodes and started again: the same policies and rewards."""
    device = ["--device", "emulated-a72", "--agent", "joint"]
    whole = search(capsys, tmp_path, "whole", *device, "--episodes", "4")
    search(capsys, tmp_path, "halves", *device, "--episodes", "2")
    halves = search(capsys, tmp_path, "halves", *device, "--episodes", "4")
    assert essence(whole) == essence(halves)
    assert whole["best"]["latency_unit"] == "estimated_cycles"
    policies = [Path(s["paths"]["policy"]).read_text() for s in (whole, halves)]
    assert policies[0] == policies[1]
    assert whole["agreement"]["artifact-rpi4"] == 1.0
