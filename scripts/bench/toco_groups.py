"""Figures 9 and 10 of the TOCO paper: groups for vector units against Scalpel's rule, and their speed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from figures import Figure, Part
from toco_curves import (
    GRID,
    NETWORK_SEEDS,
    PRUNE,
    arrays,
    finished,
    magnitudes,
    network,
    plot_curves,
    prune_run,
    removed_at,
    score_curve,
    timed,
)

from tvm_compress.compression import compressed_model
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.passes.prune_weights import PruneWeights
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.twin import Twin


def figure9(seeds: int, folder: Path) -> Part:
    """Figures 9 and 10: groups for vector units against Scalpel's rule, and what a kernel gains from them."""
    runs = [
        finished(f"figure9-{seed}", lambda seed=seed: _figure9_seed(seed))
        for seed in range(min(seeds, NETWORK_SEEDS))
    ]
    gains = [removed_at(run["toco"], 1.0) - removed_at(run["scalpel"], 1.0) for run in runs]
    speed = finished("figure10", _figure10)
    plot_curves(
        folder / "toco-figure9.png",
        {name: [run[name] for run in runs] for name in ("toco", "scalpel")},
        "LeNet-5, Fashion-MNIST, groups of 2, no fine-tuning",
        70,
    )
    figures = [
        Figure(
            "Figure 9: groups of 2, rate at 1 point lost, TOCO less Scalpel's rule",
            100 * float(np.mean(gains)),
            "points",
            0.0,
            ">=",
            note=f"mean of {len(runs)} seeds, {100 * min(gains):.1f} to {100 * max(gains):.1f}; "
            f"TOCO removes {100 * np.mean([removed_at(r['toco'], 1.0) for r in runs]):.1f} %",
        )
    ]
    for device, row in speed.items():
        figures.append(
            Figure(
                f"Figure 10: LeNet-5 with pruned dense layers over dense, {device}",
                row["ratio"],
                "ratio",
                1.0,
                "<=",
                note=f"groups {row['group']}, dense layers {100 * row['removed']:.0f} % pruned, "
                f"{row['lost']:.2f} points lost without fine-tuning",
            )
        )
    return figures, {"runs": runs, "speed": speed}


def _figure9_seed(seed: int) -> dict[str, Any]:
    model, split = network("lenet5-fashion")
    settings = replace(PRUNE, group="simd-2", seed=seed)
    run = prune_run(model, split, settings, lost=12)
    _, test = arrays(split, settings)
    # Scalpel's rule: the root mean square of a group's weights.
    squares = {name: np.square(value) for name, value in magnitudes(model.module).items()}
    return {
        "seed": seed,
        "toco": run.curve,
        "scalpel": score_curve(model.module, squares, test, GRID, "simd-2"),
    }


def _figure10() -> dict[str, Any]:
    """Latency of LeNet-5 whose dense layers TOCO pruned by vectors until one point was lost."""
    model, split = network("lenet5-fashion")
    result = {}
    for device_name, target in (("local", "host"), ("emulated-a72", "raspberry-pi/4b-aarch64")):
        # What goes together are the vectors of the target.
        group = f"simd-{rules_for(parse_target(target)).fp32_lanes}"
        settings = replace(PRUNE, group=group)
        run = prune_run(model, split, settings, lost=1.5)
        good = [
            (point, state)
            for point, state in zip(run.curve[1:], run.states, strict=True)
            if point[1] >= run.curve[0][1] - 1
        ]
        point, (_, weights) = good[-1]
        dense_layers = {name: value != 0 for name, value in weights.items() if value.ndim == 2}
        pruned = PruneWeights(dense_layers)(model.module)
        removed = 1 - sum(map(np.count_nonzero, dense_layers.values())) / sum(
            m.size for m in dense_layers.values()
        )
        _, test = arrays(split, settings)
        accuracy = 100 * Twin(pruned).accuracy(*test, 1000)
        variants = {"dense": model, "pruned": compressed_model(model, CompressionPolicy(), pruned)}
        result[device_name] = {
            "group": group,
            "removed": float(removed),
            "lost": run.curve[0][1] - accuracy,
            "rate of all weights": point[0],
            **timed(variants, "pruned", target, device_name),
        }
    return result
