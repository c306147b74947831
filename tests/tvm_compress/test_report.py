"""The report: one self-contained page, the same bytes for the same data, every figure present."""

import json
from pathlib import Path

import numpy as np
import pytest

from tvm_compress.calibration import RangeReport
from tvm_compress.report.data import ReportData, SiteBar, TrialPoint, Variant
from tvm_compress.report.html import format_latency, table_rows, write_report


def variant(name: str, accuracy: float, latency: float, **costs: float) -> Variant:
    return Variant(name, accuracy, latency, latency / 50, "seconds", **costs)


@pytest.fixture
def data() -> ReportData:
    rng = np.random.default_rng(0)
    trials = [
        TrialPoint(
            i, float(rng.normal()), float(rng.uniform(0.5, 0.9)), float(rng.uniform(0.2, 0.9)), kind, i < 3
        )
        for i, kind in enumerate(["measured", "predicted"] * 5)
    ]
    sites = [
        SiteBar("conv1", 16, 16, "int8", 8, 8),
        SiteBar("layer1.0.conv1", 64, 32, "bitserial", 2, 3),
        SiteBar("fc <10>", 10, 10, "fp32", 32, 32, "input channels % 32 = 0 does not hold"),
    ]
    return ReportData(
        title="A search",
        study="s1",
        seed=7,
        budget=0.4,
        dense=variant("dense", 0.92, 4e-4, macs=1e7, emulated_cycles=2.5e6, parameter_bytes=3e5),
        best=variant("compressed", 0.915, 1.2e-4, macs=3e6, emulated_cycles=9e5, parameter_bytes=2e4),
        trials=trials,
        sites=sites,
        sensitivity={
            "conv1": {"weights 4 bit": 0.1, "weights 2 bit": 0.9},
            "fc <10>": {"weights 4 bit": 0.0},
        },
        ranges=[
            RangeReport(("conv1",), 8, -1.5, 3.0, -1.2, 2.5, 0.012),
            RangeReport(
                ("layer1.0.conv1", "layer1.0.shortcut.conv1 with a long name"), 3, 0.0, 0.04, 0.0, 0.03, 0.0
            ),
        ],
        pareto=[1, 4],
        chosen=4,
        agreement={"artifact-host": 1.0},
        settings={"threads": "2", "agent": "joint"},
    )


def test_page_is_self_contained_and_complete(data: ReportData, tmp_path: Path) -> None:
    page = write_report(data, tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "http" not in page.lower()
    assert "fc &lt;10&gt;" in page
    assert "92.00 %" in page
    assert "-0.50 points" in page
    assert "0.300" in page
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == [
        "accuracy_latency.png",
        "policy.png",
        "ranges.png",
        "rewards.png",
        "sensitivity.png",
    ]
    assert not list(tmp_path.glob("**/*.part"))


def test_same_data_same_bytes(data: ReportData, tmp_path: Path) -> None:
    first = write_report(data, tmp_path / "a.html").read_bytes()
    assert write_report(data, tmp_path / "b.html").read_bytes() == first


def test_page_from_the_stored_data_is_the_same(data: ReportData, tmp_path: Path) -> None:
    first = write_report(data, tmp_path / "a.html").read_bytes()
    again = ReportData.from_json(data.to_json())
    assert write_report(again, tmp_path / "b.html").read_bytes() == first


def test_data_of_studies_without_ranges_is_read(data: ReportData, tmp_path: Path) -> None:
    values = json.loads(data.to_json())
    del values["ranges"]
    write_report(ReportData.from_json(json.dumps(values)), tmp_path / "a.html")
    assert not (tmp_path / "figures" / "ranges.png").exists()


def test_units_never_mix() -> None:
    assert format_latency(0.0012, "seconds") == "1.2 ms"
    assert "estimated Cortex-A72 cycles (emulated)" in format_latency(2.5e6, "estimated_cycles")
    rows = dict(
        (r[0], r[1:]) for r in table_rows(variant("dense", 0.9, 1.0), variant("compressed", 0.9, 0.5))
    )
    assert rows["latency (median ± MAD)"][2] == "0.500"
    assert "MACs" not in rows
