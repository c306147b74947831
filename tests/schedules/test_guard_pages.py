"""Kernels neither read nor write outside of their arrays: beside these lie pages that end the process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run_batch(*names: str) -> list[dict[str, Any]]:
    result = subprocess.run(
        [sys.executable, "-m", "tests.schedules.guarded_kernels", *names],
        cwd=ROOT,
        env=os.environ | {"TVM_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rows: list[dict[str, Any]] = json.loads(result.stdout)
    return rows


# Processes take longer to start than most kernels to be built: few batches, and some for each of two workers.
@pytest.mark.parametrize(
    "batches",
    [
        ("fp32", "winograd_fp32", "elementwise"),
        ("int8", "integer_winograd", "integer_depthwise", "low_bits"),
    ],
    ids="+".join,
)
def test_kernels_stay_within_their_arrays(batches: tuple[str, ...]) -> None:
    rows = run_batch(*batches)
    assert len(rows) >= 24
    wrong = [
        f"{row['kernels'][-1:]} ({row['case']}, at the {row['placement']} of its pages): {row['outcome']}"
        for row in rows
        if row["outcome"] != "right"
    ]
    assert not wrong, "\n".join(wrong)


def test_what_leaves_its_arrays_is_found() -> None:
    found = {(row["case"], row["placement"]): row["outcome"] for row in run_batch("faults")}
    died, beside = "died of SIGSEGV", "wrote beside an array"
    assert found == {
        ("reads behind", "end"): died,
        ("reads behind", "begin"): "wrong result",
        ("reads in front of", "end"): "wrong result",
        ("reads in front of", "begin"): died,
        ("writes behind", "end"): died,
        ("writes behind", "begin"): beside,
        ("writes in front of", "end"): beside,
        ("writes in front of", "begin"): died,
        ("writes its input", "end"): died,
        ("writes its input", "begin"): died,
    }
