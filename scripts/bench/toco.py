"""Figures of the TOCO paper, one function each, and the solvers' speed.

usage: python scripts/bench/toco.py [--json docs/figures/toco.json] [--only solver|figure4 ...] [--seeds 5]

A part that is run replaces its own entries in the JSON; the others stay. Finished seeds are kept in
the benches' cache, so that an interrupted run goes on.
"""

import argparse
import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import Figure, Part, parts_parser, run_parts
from toco_agent import figure12
from toco_groups import figure9
from toco_networks import figure5, figure7, figure11
from toco_quantize import figure6
from toco_random import figure4

from tvm_compress.tolerance.closed_form import cost_of, logarithmic, quadratic
from tvm_compress.tolerance.solver import logarithmic_derivative, quadratic_derivative, solve

SOLVER_WEIGHTS = 11_000_000


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


PARTS: dict[str, Callable[[int, Path], Part]] = {
    "solver": solver,
    "figure4": figure4,
    "figure5": figure5,
    "figure6": figure6,
    "figure7": figure7,
    "figure9": figure9,
    "figure11": figure11,
    "figure12": figure12,
}


def main() -> None:
    """Run the parts that are asked for, write, print."""
    parser = parts_parser(__doc__, "toco", PARTS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--solver", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.solver:
        print(json.dumps(one_solver(*arguments.solver)))
        return
    parts = {name: partial(_run, part) for name, part in PARTS.items()}
    run_parts(arguments, "toco", {"seeds": arguments.seeds}, parts)


def _run(part: Callable[[int, Path], Part], arguments: argparse.Namespace) -> Part:
    return part(arguments.seeds, arguments.json.parent)


if __name__ == "__main__":
    main()
