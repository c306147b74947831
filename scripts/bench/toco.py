"""Figures of the TOCO paper, one function each, and the solvers' speed.

usage: python scripts/bench/toco.py [--json docs/figures/toco.json] [--only solver|figure4 ...] [--seeds 5]

A part that is run replaces its own entries in the JSON; the others stay. Finished seeds are kept in
the benches' cache, so that an interrupted run goes on.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from bench_data import ROOT, cache_folder
from figures import Figure, write
from random_data import make_random, sigmoid_layer

from tvm_compress.files import write_text
from tvm_compress.passes.params import get_params, set_params
from tvm_compress.tolerance.algorithm1 import Algorithm1
from tvm_compress.tolerance.baselines import global_masks
from tvm_compress.tolerance.closed_form import cost_of, logarithmic, quadratic
from tvm_compress.tolerance.compression_models import Pruning
from tvm_compress.tolerance.grouping import Grouping
from tvm_compress.tolerance.settings import TocoSettings
from tvm_compress.tolerance.solver import logarithmic_derivative, quadratic_derivative, solve
from tvm_compress.twin import Twin

Part = tuple[list[Figure], dict[str, Any]]

SOLVER_WEIGHTS = 11_000_000
# Sparsities at which Figure 4's curves are read, and those that the claim is about.
GRID = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.96, 0.97, 0.98, 0.99)
CLAIMED = (0.9, 0.92, 0.94, 0.96, 0.97, 0.98, 0.99)


def solver(seeds: int, folder: Path) -> Part:
    """Time and memory of the solvers on 11 million weights, each in a process of its own."""
    del seeds, folder
    runs = []
    for kind in ("logarithmic", "quadratic"):
        for method in ("closed", "general"):
            command = [sys.executable, __file__, "--solver", kind, method]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout))
    goals = {"closed": 1.0, "general": 10.0}
    note = "cpu seconds are those of all threads; the machine was shared with other work"
    figures = [
        Figure(
            f"{run['method']} form, {run['kind']}, 11 M float32 weights"
            if run["method"] == "closed"
            else f"general solver, {run['kind']}, 11 M float32 weights",
            run["seconds"],
            "s",
            goals[run["method"]],
            "<=",
            note=f"{note}: {run['cpu_seconds']:.1f} cpu s",
        )
        for run in runs
    ]
    figures.append(
        Figure(
            "solvers: peak memory, inputs included",
            max(r["memory_ratio"] for r in runs),
            "x weights",
            10,
            "<=",
        )
    )
    worst = max(r["difference"] for r in runs if r["method"] == "general")
    figures.append(Figure("general solver against closed form", worst, "relative", 1e-5, "<="))
    return figures, {"runs": runs}


def one_solver(kind: str, method: str) -> dict[str, Any]:
    """Solve one large problem; the best of three runs counts, as others use the machine."""
    rng = np.random.default_rng(0)
    n = SOLVER_WEIGHTS
    g = (rng.normal(size=n) * np.exp(rng.normal(size=n)) * 1e-3).astype(np.float32)
    distance = np.abs(rng.normal(size=n) * 0.05).astype(np.float32)
    h = np.exp(rng.normal(size=n)).astype(np.float32)
    upper = np.minimum(distance, np.float32(0.08))
    budget = 0.1 * cost_of(np.abs(g), upper)
    solvers: dict[str, Callable[[], np.ndarray]] = {
        "logarithmic closed": lambda: logarithmic(g, budget, upper),
        "quadratic closed": lambda: quadratic(g, budget, distance, h, upper),
        "logarithmic general": lambda: solve(logarithmic_derivative, g, budget, upper, threads=2),
        "quadratic general": lambda: solve(quadratic_derivative(distance, h), g, budget, upper, threads=2),
    }
    seconds, cpu = [], []
    for _ in range(3):
        start, start_cpu = time.perf_counter(), time.process_time()
        result = solvers[f"{kind} {method}"]()
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    tracemalloc.start()
    solvers[f"{kind} {method}"]()
    peak = tracemalloc.get_traced_memory()[1] / (4 * n)
    tracemalloc.stop()
    other = solvers[f"{kind} closed"]() if method == "general" else result
    # Of a quadratic, tolerances near 0 are differences of numbers near d: relative to d, not to themselves.
    scale = other if kind == "logarithmic" else distance
    return {
        "kind": kind,
        "method": method,
        "weights": n,
        "seconds": min(seconds),
        "cpu_seconds": min(cpu),
        # In sizes of the weights, gradients, bounds and (quadratic) distances and curvatures included.
        "memory_ratio": peak + (2 if kind == "logarithmic" else 4),
        "difference": float((np.abs(result - other) / np.maximum(scale, np.float32(1e-30))).max()),
        "budget_used": cost_of(np.abs(g), result) / budget,
    }


def figure4(seeds: int, folder: Path) -> Part:
    """Active against random batches against magnitude on the Random data set."""
    runs = []
    for seed in range(seeds):
        runs.append(_finished(f"figure4-{seed}", lambda seed=seed: _figure4_seed(seed)))
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


def _finished(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Result of a run, read from the cache where the same code has finished it before."""
    sources = [*sorted((ROOT / "tvm_compress" / "tolerance").glob("*.py")), Path(__file__)]
    sources.append(Path(__file__).with_name("random_data.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    file = cache_folder() / "toco" / f"{name}-{digest}.json"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_text(file, json.dumps(run()) + "\n")
    return json.loads(file.read_text(encoding="utf-8"))


def _figure4_seed(seed: int) -> dict[str, Any]:
    start = time.perf_counter()
    x, y, test_x, test_y = make_random(seed)
    module = sigmoid_layer(x, y, seed)
    dense = 100 * Twin(module).accuracy(test_x, test_y, 8192)
    curves = {"magnitude": _magnitude_curve(module, test_x, test_y)}
    for sampling in ("active", "random"):
        settings = TocoSettings(
            loss_bound=6.0,
            sigma=1.05,
            trust_radius=0.25,
            iterations=400,
            sampling=sampling,
            images=0,
            share=0.01,
            batches=1,
            memory=0.0,
            batch_size=32,
            seed=seed,
        )
        curves[sampling] = _toco_curve(module, settings, (x, y), (test_x, test_y))
    return {"seed": seed, "dense": dense, "seconds": time.perf_counter() - start, "curves": curves}


def _toco_curve(
    module: tvm.IRModule,
    settings: TocoSettings,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
) -> list[tuple[float, float]]:
    """Run Algorithm 1 and return (sparsity, test accuracy in %) after every accepted iteration."""
    twin = Twin(module)
    grouping = Grouping(module, "element", tuple(twin.trainable()))
    loop = Algorithm1(twin, Pruning(grouping), *train, settings)
    state = loop.start()
    judge = Twin(module)
    curve = [(0.0, 100 * judge.accuracy(*test, 8192))]
    for iteration in loop.run(state):
        if iteration.accepted and 1 - iteration.size > curve[-1][0]:
            with torch.no_grad():
                for name, weight in state.compressed.weights.items():
                    judge.tensors[name].copy_(torch.from_numpy(weight))
            curve.append((1 - iteration.size, 100 * judge.accuracy(*test, 8192)))
    return curve


def _magnitude_curve(module: tvm.IRModule, x: np.ndarray, y: np.ndarray) -> list[tuple[float, float]]:
    weights = {name: value for name, value in get_params(module).items() if value.ndim > 1}
    scores = {name: np.abs(value) for name, value in weights.items()}
    curve = []
    for sparsity in (0.0, *GRID):
        masks = global_masks(scores, sparsity, "element")
        pruned = set_params(module, {name: value * masks[name] for name, value in weights.items()})
        curve.append((sparsity, 100 * Twin(pruned).accuracy(x, y, 8192)))
    return curve


def _read(curve: list[tuple[float, float]]) -> np.ndarray:
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


PARTS: dict[str, Callable[[int, Path], Part]] = {"solver": solver, "figure4": figure4}


def main() -> None:
    """Run the parts that are asked for, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "figures" / "toco.json")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--solver", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.solver:
        print(json.dumps(one_solver(*arguments.solver)))
        return
    data: dict[str, dict[str, Any]] = {}
    if arguments.json.exists():
        data = {one["part"]: one for one in json.loads(arguments.json.read_text(encoding="utf-8"))["data"]}
    for part in arguments.only:
        figures, values = PARTS[part](arguments.seeds, arguments.json.parent)
        data[part] = {"part": part, "figures": [asdict(figure) for figure in figures], **values}
        ordered = [data[name] for name in PARTS if name in data]
        everything = [Figure(**figure) for one in ordered for figure in one["figures"]]
        write(arguments.json, "toco", {"seeds": arguments.seeds}, everything, ordered)


if __name__ == "__main__":
    main()
