"""Figures 5, 7, 8 and 11 of the TOCO paper: pruning of single weights of networks that train.py trains."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figure, Part
from toco_curves import (
    FINETUNE_EPOCHS,
    FINETUNE_IMAGES,
    GRID,
    NETWORK_SEEDS,
    PRUNE,
    Arrays,
    Curve,
    Run,
    arrays,
    finished,
    magnitudes,
    masked,
    network,
    plot_curves,
    prune_run,
    removed_at,
    score_curve,
    tune_pruned,
)

from tvm_compress.model import Model
from tvm_compress.passes.params import get_params
from tvm_compress.tolerance.baselines import global_masks, pruning_scores
from tvm_compress.twin import Twin


def left_ratio(ours: Curve, theirs: Curve, lost: float = 1.0) -> float:
    """Weights left by one method over those left by another, both at so many points lost."""
    return (1 - removed_at(ours, lost)) / (1 - removed_at(theirs, lost))


def figure5(seeds: int, folder: Path) -> Part:
    """Pruning of single weights of a VGG, without and with fine-tuning, against magnitude."""
    runs = [
        finished(f"figure5-{seed}", lambda seed=seed: _figure5_seed(seed))
        for seed in range(min(seeds, NETWORK_SEEDS))
    ]
    ratios = [left_ratio(run["toco"], run["magnitude"]) for run in runs]
    others = {
        name: np.mean([left_ratio(run[name], run["magnitude"]) for run in runs]) for name in ("obd", "mixed")
    }
    tuned = [pair["toco"] - pair["magnitude"] for run in runs for pair in run["finetuned"]]
    plot_curves(
        folder / "toco-figure5.png",
        {name: [run[name] for run in runs] for name in ("toco", "magnitude", "obd", "mixed")},
        "VGG (1/8 width), CIFAR-10 (JPEG q75), no fine-tuning",
        70,
    )
    figures = [
        Figure(
            "Figure 5: weights left at 1 point lost, TOCO over magnitude, no fine-tuning",
            float(np.mean(ratios)),
            "ratio",
            2 / 3,
            "<=",
            note=f"mean of {len(runs)} seeds, {min(ratios):.2f} to {max(ratios):.2f}; "
            f"in one step optimal brain damage: {others['obd']:.2f}, the best order: {others['mixed']:.2f}",
        ),
        Figure(
            "Figure 5: TOCO above magnitude at the same rate, fine-tuned",
            float(np.mean(tuned)),
            "points",
            -1.0,
            ">=",
            note=f"{FINETUNE_EPOCHS} epochs of {FINETUNE_IMAGES:,} images; least {min(tuned):.2f}",
        ),
    ]
    return figures, {"runs": runs}


def _figure5_seed(seed: int) -> dict[str, Any]:
    model, split = network("vgg-simple")
    settings = replace(PRUNE, seed=seed)
    start = time.process_time()
    run = prune_run(model, split, settings, lost=12)
    seconds = time.process_time() - start
    train, test = arrays(split, settings)
    curvature = pruning_scores(model.module, "obd", *train, seed)
    few = split.train.subset(FINETUNE_IMAGES, np.random.default_rng(seed))
    pairs = []
    for rate in (0.8, 0.9):
        reached = [(size, weights) for size, weights in run.states if size <= rate]
        if not reached:
            continue
        size, weights = reached[-1]
        pair: dict[str, Any] = {"rate": size}
        chosen = {
            "toco": {name: value != 0 for name, value in weights.items()},
            "magnitude": global_masks(magnitudes(model.module), size, "element"),
        }
        for name, masks in chosen.items():
            tuned = tune_pruned(model.module, masks, few, FINETUNE_EPOCHS, seed)
            pair[name] = 100 * Twin(tuned).accuracy(*test, 1000)
        pairs.append(pair)
    return {
        "seed": seed,
        "processor_seconds": seconds,
        "importance": _importance(model, run),
        "toco": run.curve,
        "magnitude": score_curve(model.module, magnitudes(model.module), test, GRID),
        "obd": score_curve(model.module, curvature, test, GRID),
        "mixed": score_curve(model.module, _mixed_scores(model, curvature), test, GRID),
        "finetuned": pairs,
    }


def _mixed_scores(model: Model, saliency: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """abs(w) times the root of its filter's mean sensitivity: the best fixed order found on this network.

    `saliency` is optimal brain damage's, h w² / 2; the sensitivity is the root of h.
    """
    scores = {}
    for name, weight in magnitudes(model.module).items():
        sensitivity = np.sqrt(2 * saliency[name]) / np.maximum(weight, 1e-12)
        mean = sensitivity.reshape(len(weight), -1).mean(axis=1)
        scores[name] = weight * np.sqrt(mean).reshape(-1, *[1] * (weight.ndim - 1))
    return scores


def figure7(seeds: int, folder: Path) -> Part:
    """Figures 7 and 8: how importance goes with the values of weights."""
    del seeds
    figures, data = [], {}
    found_in = {
        "lenet5-fashion": lambda: finished("figure7-lenet5", _lenet_importance),
        "vgg-simple": lambda: finished("figure5-0", lambda: _figure5_seed(0))["importance"],
    }
    for name, find in found_in.items():
        found = data[name] = find()
        layers = ", ".join(f"{value:.2f}" for value in found["by_layer"].values())
        figures.append(
            Figure(
                f"Figures 7 and 8, {name}: rank correlation of importance and abs(w)",
                found["spearman"],
                "",
                1.0,
                "<=",
                note=f"reported, no goal; by layer {layers}",
            )
        )
    _plot_importance(folder / "toco-figure7.png", data)
    return figures, {"networks": data}


def _lenet_importance() -> dict[str, Any]:
    model, split = network("lenet5-fashion")
    return _importance(model, prune_run(model, split, PRUNE, lost=12))


def _importance(model: Model, run: Run) -> dict[str, Any]:
    """How a run's importance goes with the values of the weights."""
    from scipy.stats import spearmanr

    params = get_params(model.module)
    # What never went is as important as anything can be.
    importance = {key: np.minimum(value, 1e6) for key, value in run.importance.items()}
    together = [np.concatenate([part[key].ravel() for key in importance]) for part in (importance, params)]
    bounds = np.quantile(np.abs(together[1]), np.linspace(0, 1, 41))
    place = np.clip(np.searchsorted(bounds, np.abs(together[1]), side="right") - 1, 0, 39)
    return {
        "spearman": float(spearmanr(together[0], np.abs(together[1])).statistic),
        "by_layer": {
            key: float(spearmanr(value.ravel(), np.abs(params[key]).ravel()).statistic)
            for key, value in importance.items()
        },
        "magnitude": [float(v) for v in bounds[:-1]],
        "pruned_share": [float(np.mean(together[0][place == k] < 1e6)) for k in range(40)],
        "removed": run.curve[-1][0],
    }


def figure11(seeds: int, folder: Path) -> Part:
    """TOCO against optimal brain damage on a multilayer perceptron of 16,000 parameters."""
    runs = [
        finished(f"figure11-{seed}", lambda seed=seed: _figure11_seed(seed))
        for seed in range(min(seeds, NETWORK_SEEDS))
    ]
    names = ("toco", "obd", "obd, repeated", "magnitude")
    plot_curves(
        folder / "toco-figure11.png",
        {name: [run[name] for run in runs] for name in names},
        "MLP 196-77-10, Fashion-MNIST, no fine-tuning",
        60,
    )
    mean = {name: float(np.mean([removed_at(run[name], 1.0) for run in runs])) for name in names}
    return [
        Figure(
            f"Figure 11: rate at 1 point lost, TOCO less {name}",
            100 * (mean["toco"] - mean[name]),
            "points",
            0.0,
            ">=",
            note=f"{100 * mean['toco']:.1f} and {100 * mean[name]:.1f} %, mean of {len(runs)} seeds",
        )
        for name in names[1:]
    ], {"runs": runs}


def _figure11_seed(seed: int) -> dict[str, Any]:
    model, split = network("mlp16k-fashion")
    settings = replace(PRUNE, seed=seed)
    train, test = arrays(split, settings)
    obd = pruning_scores(model.module, "obd", *train, seed)
    return {
        "seed": seed,
        "toco": prune_run(model, split, settings, lost=20).curve,
        "obd": score_curve(model.module, obd, test, GRID),
        "obd, repeated": _repeated_obd(model, train, test, seed),
        "magnitude": score_curve(model.module, magnitudes(model.module), test, GRID),
    }


def _repeated_obd(model: Model, train: Arrays, test: Arrays, seed: int) -> Curve:
    """Optimal brain damage with its curvature taken again after every few per cent."""
    module = model.module
    curve = [(0.0, 100 * Twin(module).accuracy(*test, 1000))]
    for rate in GRID:
        masks = global_masks(pruning_scores(module, "obd", *train, seed), rate, "element")
        module = masked(module, masks)
        curve.append((rate, 100 * Twin(module).accuracy(*test, 1000)))
    return curve


def _plot_importance(path: Path, data: dict[str, dict[str, Any]]) -> None:
    """Share of the weights that went, by magnitude."""
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(6, 4), layout="constrained")
    axes = plot.subplots()
    for name, found in data.items():
        axes.plot(
            np.arange(40) / 40, found["pruned_share"], label=f"{name}, {100 * found['removed']:.0f} % removed"
        )
    axes.set(xlabel="rank of abs(w) in the network", ylabel="share that TOCO removed")
    axes.legend()
    axes.grid(alpha=0.3)
    plot.savefig(path, dpi=90)
