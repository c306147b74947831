"""Searches by whole networks and by the hybrid: their best rewards, and their time on latencies.

A part of `latency_model.py`.
"""

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tvm
from figures import Figure, Part
from latency_parts import SAMPLE, fitted_before, forgetful_board, open_meter

from tvm_compress.data.load import load_data
from tvm_compress.model import Model, load_model
from tvm_compress.passes.pipeline import build
from tvm_compress.search.environment import reward_of
from tvm_compress.search.latency import THOROUGH
from tvm_compress.search.latency_sources import HybridLatency, Latency, MeasuredLatency
from tvm_compress.search.results import SearchResult
from tvm_compress.search.run import run_search
from tvm_compress.search.settings import SearchSettings

# How a search takes its latencies: whole networks, the hybrid, that with a model that was fitted before.
MODES = {"measure": "measure", "hybrid": "hybrid", "fitted": "hybrid"}


def searches(device: str, arguments: argparse.Namespace) -> Part:
    """Best rewards and measuring time of a search by whole networks and by the hybrid.

    The model that was fitted before is the part `device`'s: its kernels come from the cache. All searches'
    best policies are measured once more, as whole networks and thoroughly, for rewards on the same footing.
    """
    model = load_model(SAMPLE)
    before = fitted_before(device, model, arguments.cache)
    rows = []
    for seed in range(arguments.seeds):
        for mode, latency in MODES.items():
            # As long as a search is by default.
            settings = SearchSettings(
                device=device, latency=latency, seed=seed, budget=0.45, finetune_epochs=0, refine=1
            )
            prior = before if mode == "fitted" else None
            source = HybridLatency if latency == "hybrid" else MeasuredLatency
            tried: list[tuple[float, tvm.IRModule]] = []
            with (
                tempfile.TemporaryDirectory() as folder,
                forgetful_board(Path(folder)),
                patch.object(source, "latency", _remembered(source.latency, settings, tried)),
            ):
                split = load_data(SAMPLE, model, seed)
                result = run_search(model, split, settings, Path(folder) / "study", latency_model=prior)
                again = _reward_again(result, tried, model, settings, Path(folder) / "again.sqlite")
            row = {"seed": seed, "latency": mode, "told": result.best_trial.reward, "reward": again}
            row |= {"seconds": result.seconds, "sum_errors": result.sum_errors, "drifts": result.drifts}
            row["kinds"] = dict(Counter(trial.result.latency_kind for trial in result.trials))
            rows.append(row)
            print(json.dumps(row), flush=True)
    reward = {m: [r["reward"] for r in rows if r["latency"] == m] for m in MODES}
    spent = {m: float(np.mean([r["seconds"]["latency"] for r in rows if r["latency"] == m])) for m in MODES}
    texts = {m: " ".join(f"{value:.3f}" for value in values) for m, values in reward.items()}
    spread = float(np.std(reward["measure"], ddof=1)) if arguments.seeds > 1 else 0.0
    figures = []
    for mode, what in (("hybrid", ""), ("fitted", f", with a model of {before.rows} kernels fitted before")):
        figures += [
            Figure(
                f"search on {device}: best reward, hybrid less measured, mean of the seeds{what}",
                float(np.mean(reward[mode]) - np.mean(reward["measure"])),
                "",
                -spread,
                ">=",
                note=f"hybrid {texts[mode]}, measured {texts['measure']}; "
                "the goal is the measured ones' standard deviation",
            ),
            Figure(
                f"search on {device}: time spent on latencies, hybrid over measured{what}",
                spent[mode] / spent["measure"],
                "ratio",
                0.2,
                "<=",
                note=f"{spent[mode]:.0f} s and {spent['measure']:.0f} s for 120 episodes, building included",
            ),
        ]
    return figures, {"runs": rows}


def _remembered(
    latency: Callable[..., Latency], settings: SearchSettings, tried: list[tuple[float, tvm.IRModule]]
) -> Callable[..., Latency]:
    """Wrap a latency source's method: each policy's reward and module go into a list."""

    def remembered(self: Any, module: tvm.IRModule, key: str, episode: int, accuracy: float) -> Latency:
        found = latency(self, module, key, episode, accuracy)
        tried.append((accuracy + settings.beta * abs(found.ratio / settings.budget - 1), module))
        return found

    return remembered


def _reward_again(
    result: SearchResult,
    tried: list[tuple[float, tvm.IRModule]],
    model: Model,
    settings: SearchSettings,
    path: Path,
) -> float:
    """Reward of a search's best policy by a measurement of its whole network, made after the search."""
    module = next(module for reward, module in tried if reward == result.best_trial.reward)
    with open_meter(settings.device, model, path, THOROUGH) as meter:
        meter.set_dense(model.module, "dense")
        measured = meter.measure(build(module, meter.target), "best")
        ratio = measured.value / meter.dense.value
    best = replace(result.best_trial.result, ratio=ratio)
    return reward_of(best, settings.budget, settings.beta)
