"""Writes `report.html`, one self-contained file, and its pictures as PNGs beside it."""

import base64
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from tvm_compress.calibration import RangeReport
from tvm_compress.errors import SettingError
from tvm_compress.files import replacing, write_text
from tvm_compress.report.data import ReportData, Variant
from tvm_compress.report.plots import all_plots, ranges

CAPTIONS = {
    "accuracy_latency": "Accuracy against latency: every trial (validation accuracy), the Pareto front, "
    "and the models that were built (test accuracy).",
    "policy": "The chosen policy per site: channels kept, weight bits, activation bits.",
    "ranges": "Calibration: the part of each tensor's observed range that its integers cover, before any "
    "fine-tuning, and the share of its values outside of it.",
    "rewards": "Reward over the episodes.",
    "sensitivity": "Sensitivity: how far the output moves when one site alone is compressed.",
}


def format_latency(value: float, unit: str) -> str:
    """Text of a latency: milliseconds for seconds, millions for estimated cycles."""
    return (
        f"{value * 1e3:.4g} ms"
        if unit == "seconds"
        else f"{value / 1e6:.4g} M estimated Cortex-A72 cycles (emulated)"
    )


def _count(value: float | None) -> str:
    if value is None:
        return "-"
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{suffix}"
    return f"{value:.4g}"


def table_rows(dense: Variant, best: Variant) -> list[tuple[str, str, str, str]]:
    """Rows (quantity, dense, compressed, ratio) of the final table, for the page and for the terminal."""
    rows = [
        (
            "test accuracy",
            f"{100 * dense.accuracy:.2f} %",
            f"{100 * best.accuracy:.2f} %",
            f"{100 * (best.accuracy - dense.accuracy):+.2f} points",
        ),
        (
            "latency (median ± MAD)",
            f"{format_latency(dense.latency, dense.latency_unit)} ± {_spread(dense)}",
            f"{format_latency(best.latency, best.latency_unit)} ± {_spread(best)}",
            f"{best.latency / dense.latency:.3f}",
        ),
    ]
    labels = {
        "emulated_cycles": "estimated Cortex-A72 cycles (emulated)",
        "macs": "MACs",
        "bops": "BOPs",
        "parameter_bytes": "parameter bytes",
        "library_bytes": "library file bytes",
        "esn_a": "ESN_a",
        "esn_d": "ESN_d [bits]",
    }
    for attribute, label in labels.items():
        before, after = getattr(dense, attribute), getattr(best, attribute)
        if before is None and after is None:
            continue
        ratio = f"{after / before:.3f}" if before and after is not None else "-"
        rows.append((label, _count(before), _count(after), ratio))
    return rows


def _spread(variant: Variant) -> str:
    if variant.latency_unit == "seconds":
        return f"{variant.latency_spread * 1e3:.2g}"
    return f"{variant.latency_spread:.2g}"


def write_ranges(rows: Sequence[RangeReport], path: str | Path) -> None:
    """Write a plot of calibrated ranges, as PNG.

    Raises
    ------
    SettingError
        If the extra `report` (matplotlib) is not installed.
    """
    png = ranges(rows)
    with replacing(path) as temporary:
        temporary.write_bytes(png)


def write_report(data: ReportData, path: str | Path) -> Path:
    """Write the page at `path` and the PNGs into the folder `figures` beside it; return `path`.

    Raises
    ------
    SettingError
        If the extra `report` (jinja2, matplotlib) is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise SettingError(
            "The report needs jinja2, which is not installed.",
            "Install the extra: pip install 'tvm_compress[report]'.",
        ) from error
    path = Path(path)
    plots = all_plots(data)
    folder = path.parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, png in plots.items():
        with replacing(folder / f"{name}.png") as temporary:
            temporary.write_bytes(png)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (resources.files("tvm_compress.report") / "report.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        data=data,
        rows=table_rows(data.dense, data.best),
        plots=[
            (CAPTIONS[name], base64.b64encode(plots[name]).decode("ascii"))
            for name in CAPTIONS
            if name in plots
        ],
    )
    write_text(path, page)
    return path
