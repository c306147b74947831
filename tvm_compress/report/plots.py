"""The report's pictures, drawn from ReportData with matplotlib and returned as PNG bytes."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tvm_compress.calibration import RangeReport
from tvm_compress.errors import SettingError
from tvm_compress.report.data import ReportData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#22303c"
GRID = "#d9dfe4"
MAIN = "#1f6f8b"
ACCENT = "#d1495b"
SOFT = "#9fb8c4"
SCHEME_COLOURS = {"fp32": "#9fb8c4", "int8": "#1f6f8b", "bitserial": "#e0a030"}


def _bare_figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SettingError(
            "The report needs matplotlib, which is not installed.",
            "Install the extra: pip install 'tvm_compress[report]'.",
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _style(ax: "Axes") -> None:
    ax.grid(True, color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=INK, labelsize=9)


def _figure(width: float, height: float, rows: int = 1) -> "tuple[Figure, Sequence[Axes]]":
    figure = _bare_figure(width, height)
    axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
    for ax in axes:
        _style(ax)
    return figure, list(axes)


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    # No date and no version in the file: the same data gives the same bytes.
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def rewards(data: ReportData) -> bytes:
    """Reward of every episode and the best so far."""
    figure, (ax,) = _figure(7.2, 3.2)
    episodes = np.array([t.episode for t in data.trials])
    reward = np.array([t.reward for t in data.trials])
    warm = np.array([t.warmup for t in data.trials], dtype=bool)
    ax.plot(episodes[warm], reward[warm], "o", color=SOFT, ms=4, label="random warm-up")
    ax.plot(episodes[~warm], reward[~warm], "o", color=MAIN, ms=4, label="agent")
    if len(reward):
        ax.step(
            episodes, np.maximum.accumulate(reward), where="post", color=ACCENT, lw=1.6, label="best so far"
        )
        # A few hopeless policies would flatten everything else: the axis follows the bulk.
        low = float(np.quantile(reward, 0.05))
        ax.set_ylim(min(low, float(reward.max()) - 0.5) - 0.1, float(reward.max()) + 0.15)
    ax.set_xlabel("episode")
    ax.set_ylabel("reward")
    ax.legend(frameon=False, fontsize=9)
    return _png(figure)


def accuracy_against_latency(data: ReportData) -> bytes:
    """Every trial, the Pareto front, the budget and the chosen policy."""
    figure, (ax,) = _figure(7.2, 4.0)
    for kind, marker in (("measured", "o"), ("summed", "+"), ("predicted", "x")):
        points = [t for t in data.trials if t.latency_kind == kind]
        if points:
            ax.plot(
                [t.latency_ratio for t in points],
                [100 * t.accuracy for t in points],
                marker,
                color=SOFT,
                ms=5,
                label=f"trial ({kind} latency)",
            )
    front = sorted((t for t in data.trials if t.episode in set(data.pareto)), key=lambda t: t.latency_ratio)
    if front:
        ax.plot(
            [t.latency_ratio for t in front],
            [100 * t.accuracy for t in front],
            "-o",
            color=MAIN,
            ms=5,
            lw=1.4,
            label="Pareto front",
        )
    for trial in data.trials:
        if trial.episode == data.chosen:
            ax.plot(
                trial.latency_ratio,
                100 * trial.accuracy,
                "o",
                color=ACCENT,
                ms=9,
                label="chosen (before fine-tuning)",
            )
    ratio = data.best.latency / data.dense.latency
    ax.plot(ratio, 100 * data.best.accuracy, "*", color=ACCENT, ms=15, label="compressed, fine-tuned (test)")
    ax.plot(1.0, 100 * data.dense.accuracy, "s", color=INK, ms=7, label="dense (test)")
    ax.axvline(data.budget, color=ACCENT, lw=1, ls="--", label=f"budget {data.budget:g}")
    ax.set_xlabel("latency against dense, same schedules and threads (T_P / T_0)")
    ax.set_ylabel("accuracy [%]")
    ax.legend(frameon=False, fontsize=8)
    return _png(figure)


def _bars(ax: "Axes", values: Sequence[int], colours: Sequence[str]) -> None:
    ax.bar(range(len(values)), values, color=colours, width=0.72)
    for x, value in enumerate(values):
        ax.text(x, value, str(value), ha="center", va="bottom", fontsize=8, color=INK)
    ax.set_xticks(range(len(values)))
    ax.grid(False, axis="x")


def policy(data: ReportData) -> bytes:
    """The chosen policy: channels kept, weight bits and activation bits per site (search paper, Figure 3)."""
    from matplotlib.patches import Patch

    sites = data.sites
    figure, (top, middle, bottom) = _figure(max(7.2, 0.55 * len(sites)), 6.6, rows=3)
    colours = [SCHEME_COLOURS.get(s.scheme, INK) for s in sites]
    top.bar(range(len(sites)), [s.channels_total for s in sites], color="#e8edf0", width=0.72)
    _bars(top, [s.channels_kept for s in sites], colours)
    top.set_ylabel("channels kept")
    for ax, bits, label in (
        (middle, [s.weight_bits for s in sites], "weight bits"),
        (bottom, [s.activation_bits for s in sites], "activation bits"),
    ):
        _bars(ax, bits, colours)
        ax.set_ylabel(label)
        ax.set_ylim(0, max(bits) * 1.18)
    for ax in (top, middle):
        ax.set_xticklabels([])
    bottom.set_xticklabels([s.name for s in sites], rotation=45, ha="right", fontsize=8)
    handles = [
        Patch(color=colour, label=scheme)
        for scheme, colour in SCHEME_COLOURS.items()
        if any(s.scheme == scheme for s in sites)
    ]
    top.legend(handles=handles, frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return _png(figure)


def sensitivity(data: ReportData) -> bytes:
    """Mean KL divergence from the dense model with one site compressed, per site and kind of compression."""
    names = list(data.sensitivity)
    labels = list(dict.fromkeys(label for row in data.sensitivity.values() for label in row))
    values = np.array(
        [[data.sensitivity[n].get(label, np.nan) for label in labels] for n in names], dtype=float
    )
    figure, (ax,) = _figure(max(7.2, 0.32 * len(labels) + 2.5), 0.36 * len(names) + 2.4)
    ax.grid(False)
    shown = np.log10(np.maximum(values, 1e-6))
    image = ax.imshow(shown, aspect="auto", cmap="viridis", vmin=-6, vmax=max(0.0, float(np.nanmax(shown))))
    ax.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(image, ax=ax, label="log10 of the mean KL divergence")
    return _png(figure)


def ranges(rows: Sequence[RangeReport]) -> bytes:
    """What was seen of each quantized tensor, what of it the integers cover, and the share that is clipped.

    Each tensor is drawn in units of its largest magnitude, which stands beside its name: tensors of one
    network differ by orders of magnitude.
    """
    figure = _bare_figure(8.4, 0.3 * len(rows) + 1.6)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    place = np.arange(len(rows))
    largest = np.array([max(abs(row.seen_low), abs(row.seen_high), 1e-30) for row in rows])
    for low, high, colour, height, label in (
        ([row.seen_low for row in rows], [row.seen_high for row in rows], SOFT, 0.72, "seen"),
        ([row.low for row in rows], [row.high for row in rows], MAIN, 0.36, "covered by the integers"),
    ):
        width = (np.array(high) - np.array(low)) / largest
        left.barh(place, width, left=np.array(low) / largest, color=colour, height=height, label=label)
    names = [_shortened(", ".join(row.sites)) for row in rows]
    left.set_yticks(
        place, [f"{n}  ±{b:.3g}, {row.bits} bit" for n, b, row in zip(names, largest, rows, strict=True)]
    )
    left.invert_yaxis()
    left.set_xlim(-1.08, 1.08)
    left.set_xlabel("range, in units of the largest magnitude")
    clipped = [100 * row.clipped for row in rows]
    right.barh(place, clipped, color=ACCENT, height=0.5)
    for y, share in zip(place, clipped, strict=True):
        right.text(share, y, f" {share:.3g} %", va="center", fontsize=8, color=INK)
    right.set_xlim(0, max(*clipped, 1e-3) * 1.35)
    right.set_xlabel("values clipped [%]")
    for ax in (left, right):
        _style(ax)
        ax.grid(False, axis="y")
    left.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return _png(figure)


def _shortened(name: str, longest: int = 40) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"


def all_plots(data: ReportData) -> dict[str, bytes]:
    """Every picture that the data allows: file name without ending -> PNG bytes."""
    plots = {"policy": policy(data)} if data.sites else {}
    if data.trials:
        plots["rewards"] = rewards(data)
        plots["accuracy_latency"] = accuracy_against_latency(data)
    if data.sensitivity:
        plots["sensitivity"] = sensitivity(data)
    if data.ranges:
        plots["ranges"] = ranges(data.ranges)
    return plots
