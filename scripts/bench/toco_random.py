"""Figure 4 of the TOCO paper: active against random batches against magnitude on the Random data set."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figure, Part
from random_data import make_random, sigmoid_layer
from toco_curves import Curve, finished, magnitudes, score_curve, toco_curve

from tvm_compress.tolerance.compression_models import Pruning
from tvm_compress.tolerance.grouping import Grouping
from tvm_compress.tolerance.settings import TocoSettings
from tvm_compress.twin import Twin

# Sparsities at which the curves are read, and those that the claim is about.
GRID = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.96, 0.97, 0.98, 0.99)
CLAIMED = (0.9, 0.92, 0.94, 0.96, 0.97, 0.98, 0.99)


def figure4(seeds: int, folder: Path) -> Part:
    """Active against random batches against magnitude on the Random data set."""
    runs = []
    for seed in range(seeds):
        runs.append(finished(f"figure4-{seed}", lambda seed=seed: _figure4_seed(seed)))
        read = {name: _read(curve).round(2).tolist() for name, curve in runs[-1]["curves"].items()}
        print(json.dumps(runs[-1] | {"curves": read}), flush=True)
    accuracy = {
        name: np.array([_read(run["curves"][name]) for run in runs])
        for name in ("active", "random", "magnitude")
    }
    _plot_figure4(folder / "toco-figure4.png", accuracy)
    figures = [
        Figure("Figure 4: accuracy of the dense layer", _mean([r["dense"] for r in runs]), "%", 95, ">=")
    ]
    figures[0] = Figure(
        figures[0].id, figures[0].value, "%", 94, ">=", note="the paper trains to 95 %; mean of the seeds"
    )
    for better, worse in (("active", "random"), ("random", "magnitude")):
        gaps = {s: accuracy[better][:, GRID.index(s)] - accuracy[worse][:, GRID.index(s)] for s in CLAIMED}
        least = min(gaps, key=lambda s: float(gaps[s].mean()))
        mean = float(np.mean([gap.mean() for gap in gaps.values()]))
        figures.append(
            Figure(
                f"Figure 4: {better} above {worse}, mean over sparsities from 90 %",
                mean,
                "points",
                0.0,
                ">=",
                note=f"least at {100 * least:.0f} %: {gaps[least].mean():.2f} "
                f"(standard deviation {gaps[least].std(ddof=1) if seeds > 1 else 0:.2f} over {seeds} seeds)",
            )
        )
    table = {name: {"mean": v.mean(0).tolist(), "std": v.std(0).tolist()} for name, v in accuracy.items()}
    return figures, {"sparsity": list(GRID), "accuracy": table, "runs": runs}


def _figure4_seed(seed: int) -> dict[str, Any]:
    start = time.perf_counter()
    x, y, test_x, test_y = make_random(seed)
    module = sigmoid_layer(x, y, seed)
    dense = 100 * Twin(module).accuracy(test_x, test_y, 8192)
    grouping = Grouping(module, "element", tuple(Twin(module).trainable()))
    curves = {"magnitude": score_curve(module, magnitudes(module), (test_x, test_y), GRID)}
    for sampling in ("active", "random"):
        settings = TocoSettings(
            loss_bound=6.0,
            sigma=1.05,
            trust_radius=0.25,
            iterations=400,
            sampling=sampling,
            sensitivity="weight",
            images=0,
            share=0.01,
            batches=1,
            memory=0.0,
            batch_size=32,
            seed=seed,
        )
        run = toco_curve(module, Pruning(grouping), settings, (x, y), (test_x, test_y), 1e-4)
        curves[sampling] = run.curve
    return {"seed": seed, "dense": dense, "seconds": time.perf_counter() - start, "curves": curves}


def _read(curve: Curve) -> np.ndarray:
    """Accuracy at the sparsities of `GRID`, read between the points of a curve; its end holds beyond it."""
    points = np.array(curve)
    return np.interp(GRID, points[:, 0], points[:, 1])


def _mean(values: list[float]) -> float:
    return float(np.mean(values))


def _plot_figure4(path: Path, accuracy: dict[str, np.ndarray]) -> None:
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(6, 4), layout="constrained")
    axes = plot.subplots()
    labels = {"active": "TOCO, active", "random": "TOCO, random batches", "magnitude": "magnitude"}
    for name, values in accuracy.items():
        spread = values.std(axis=0)
        axes.errorbar(100 * np.array(GRID), values.mean(axis=0), yerr=spread, label=labels[name], capsize=2)
    axes.set(
        xlabel="weights removed (%)", ylabel="test accuracy (%)", title="Random data set, no fine-tuning"
    )
    axes.legend()
    axes.grid(alpha=0.3)
    plot.savefig(path, dpi=110)
