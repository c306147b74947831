"""`compress --method toco` as a user types it."""

import json
from pathlib import Path

import pytest

from tvm_compress.cli.main import main

SAMPLE = "sample:resnet8-fashion"
FEW = ["--images", "96", "--iterations", "4", "--sigma", "1.2", "--loss-bound", "1.5"]


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "options",
    [["--objective", "prune", "--group", "filter"], ["--objective", "quantize", "--percentile", "60"]],
)
def test_compress_compile_verify(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str]
) -> None:
    model, artifact, trials = (str(tmp_path / name) for name in ("model", "artifact", "trials"))
    arguments = ["compress", SAMPLE, "--method", "toco", *FEW, *options, "-o", model, "--trials", trials]
    made = call(capsys, *arguments)
    lines = (tmp_path / "trials" / "trials.jsonl").read_text().splitlines()
    assert made["iterations"] == len(lines) == 4
    assert made["loss_after"] <= 1.5 * made["loss_before"]
    sites = call(capsys, "inspect", model)["sites"]
    key = "weight_pruning_ratio" if options[1] == "prune" else "note"
    assert any(key in site["policy"] for site in sites)
    call(capsys, "compile", model, "-o", artifact)
    checked = call(capsys, "verify", artifact, "--model", model, "--data", SAMPLE, "--limit", "20")
    assert checked["agreement"] == 1.0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--loss-bound", "0.9"], "loss_bound"),
        (["--group", "rows"], "rows"),
        (["--objective", "shrink"], "shrink"),
        (["--sampling", "some"], "some"),
    ],
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], word: str
) -> None:
    out = tmp_path / "out"
    assert main(["compress", SAMPLE, "--method", "toco", *options, "-o", str(out)]) == 2
    assert word in capsys.readouterr().err
    assert not out.exists()
