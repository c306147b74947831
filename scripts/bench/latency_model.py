"""What the latency model and the sums of kernels are worth, and what measuring costs.

usage: python scripts/bench/latency_model.py [--json docs/figures/latency_model.json] [--only local ...]
       [--kernels 1500] [--policies 24] [--seeds 3]

Parts: "local" and "emulated-a72" fit a model to kernels of ResNet-8, ResNet-18 of width 32, MobileNetV2 and
random networks, and compare it with measurements on policies that it never saw, also of a VGG-7 that no
kernel of the fit comes from; "warm" times one more policy of a search by kernels; "resnet18" times the
emulated board; "search-local" and "search-emulated-a72" compare `--latency hybrid` with `--latency measure`.
A part that is run replaces its own entries in the JSON. Timed kernels stay in the benches' cache, so that an
interrupted run goes on; "local", "warm" and "search-local" want a quiet machine.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import tvm
from bench_data import cache_folder
from figures import Figure, Part, parts_parser, run_parts
from networks import CIFAR, ConvNet, MobileNetV2, ResNet18
from train import as_model

from tvm_compress.cost.latency_model import LatencyModel
from tvm_compress.data.load import load_data
from tvm_compress.model import Model, load_model
from tvm_compress.passes.pipeline import build
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import MeasurementSettings, open_device
from tvm_compress.rpc.emulated_a72 import EmulatedA72
from tvm_compress.rpc.emulation_kit import prepare
from tvm_compress.rpc.store import MeasurementStore
from tvm_compress.schedules.target_rules import parse_target
from tvm_compress.search.environment import reward_of
from tvm_compress.search.latency import SHORT, THOROUGH, THOROUGH_PASSES, LatencyMeter
from tvm_compress.search.latency_fit import (
    Evaluation,
    errors_of,
    evaluate_latency_model,
    fit_latency_model,
    stored_kernels,
)
from tvm_compress.search.latency_sources import HybridLatency, KernelLatency, Latency, MeasuredLatency
from tvm_compress.search.results import SearchResult
from tvm_compress.search.run import run_search
from tvm_compress.search.sampling import KernelSampler
from tvm_compress.search.settings import DEFAULT_TARGETS, SearchSettings

SAMPLE = "sample:resnet8-fashion"
# Six convolutions and a dense layer: VGG-7 of an eighth of the usual width.
VGG7 = [16, 16, "M", 32, 32, "M", 64, 64, "M"]
UNSEEN = "VGG-7"
MOBILENET = "MobileNetV2 96"
# So many networks' kernels are timed again.
AGAIN = 12
GOALS = {"local": 0.85, "emulated-a72": 0.95}


def subjects() -> dict[str, Model]:
    """Networks by name; their weights are of no matter here."""
    torch.manual_seed(0)
    return {
        "ResNet-8": load_model(SAMPLE),
        "ResNet-18 w32": as_model(ResNet18().eval(), "cifar10"),
        MOBILENET: Model.from_torch(_mobilenet(), (torch.zeros(1, 3, 96, 96),)),
        UNSEEN: as_model(ConvNet(VGG7, [128], CIFAR).eval(), "cifar10"),
    }


def _mobilenet() -> MobileNetV2:
    network = MobileNetV2().eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            # Small enough to keep activations up: by those of a new network they all but vanish, and
            # what is left of them is less than the steps that biases need.
            layer.running_var.uniform_(0.05, 0.15)
    return network


def open_meter(device: str, model: Model, path: Path, settings: MeasurementSettings = SHORT) -> LatencyMeter:
    """Meter of a network whose measurements are kept; it takes as many passes as `tvm-compress cost`."""
    on, target, store = open_device(device), parse_target(DEFAULT_TARGETS[device]), MeasurementStore(path)
    return LatencyMeter(on, target, store, model.input_spec.shape, settings, THOROUGH_PASSES)


def quality(device: str, arguments: argparse.Namespace) -> Part:
    """Fit on one device, compare on policies that were not seen."""
    networks = subjects()
    seen = [network for name, network in networks.items() if name != UNSEEN]
    store = arguments.cache / f"latency_model-{device}.sqlite"
    start = time.perf_counter()
    with open_meter(device, seen[0], store) as meter:
        sampler = KernelSampler(seen, meter, 0)
        model = fit_latency_model(sampler, meter, arguments.kernels, 0, _tell(device))
        fitted = {kernel.key for kernel in stored_kernels(meter.store, meter.device, meter.target)}
    seconds = time.perf_counter() - start
    found: dict[str, Evaluation] = {}
    # What the fit has seen stays out of the comparison.
    with tempfile.TemporaryDirectory() as folder:
        for name, network in networks.items():
            with open_meter(device, network, Path(folder) / "unseen.sqlite") as meter:
                # MobileNetV2 has four times as many kernels as the others.
                policies = arguments.policies // (2 if name == MOBILENET else 1)
                found[name] = evaluate_latency_model(
                    model, network, meter, policies, 1, fitted, _tell(f"{device} {name}")
                )
    figures = _figures_of(device, found)
    if device == "local":
        again = _timed_again(seen[0], sampler, AGAIN)
        figures.append(
            Figure(
                "local: kernels that take the same within 10 % when they are timed again",
                float(np.mean(errors_of(again) <= 0.1)),
                "share",
                GOALS[device],
                ">=",
                note=f"{len(again)} kernels; no model can be better than this",
            )
        )
    pairs = {name: asdict(one) for name, one in found.items()}
    values = {
        "kernels": model.rows,
        "seconds": seconds,
        "summary": {name: one.summary() for name, one in found.items()},
        "pairs": pairs,
    }
    return figures, values


def _figures_of(device: str, found: dict[str, Evaluation]) -> list[Figure]:
    """Shares within 10 %, rank correlation and errors of sums, over all networks."""
    kernels = [pair for one in found.values() for pair in one.kernels]
    whole = [pair for one in found.values() for pair in one.networks]
    sums = [pair for one in found.values() for pair in one.sums]
    each = {name: one.summary() for name, one in found.items()}

    def by_network(what: str, factor: float = 100, digits: int = 1) -> str:
        return ", ".join(f"{name} {factor * one[what]:.{digits}f}" for name, one in each.items())

    return [
        Figure(
            f"{device}: kernels within 10 % of the measured time",
            float(np.mean(errors_of(kernels) <= 0.1)),
            "share",
            GOALS[device],
            ">=",
            note=f"{len(kernels)} kernels; {by_network('kernels_within')} %",
        ),
        Figure(
            f"{device}: networks within 10 %",
            float(np.mean(errors_of(whole) <= 0.1)),
            "share",
            0.95,
            ">=",
            note=f"{len(whole)} policies; {by_network('networks_within')} %",
        ),
        Figure(
            f"{device}: rank correlation of networks",
            min(one["networks_spearman"] for one in each.values()),
            "",
            0.98,
            ">=",
            note=f"least of {by_network('networks_spearman', 1, 3)}",
        ),
        Figure(
            f"{device}: sum of measured kernels against the network, median error",
            float(np.median(errors_of(sums))),
            "share",
            0.05,
            "<=",
            note=by_network("sums_median_error") + " %",
        ),
    ]


def _timed_again(model: Model, sampler: KernelSampler, count: int) -> list[tuple[float, float]]:
    """Pairs of times of the kernels of so many networks, each taken in a session of its own."""
    kernels = {kernel.key: kernel for _ in range(count) for kernel in sampler.draw()}
    times = []
    for _ in range(2):
        with (
            tempfile.TemporaryDirectory() as folder,
            open_meter("local", model, Path(folder) / "again.sqlite") as meter,
        ):
            times.append(meter.time_kernels(list(kernels.values())))
    return [
        (times[0][key].value, times[1][key].value) for key in kernels if key in times[0] and key in times[1]
    ]


def warm(arguments: argparse.Namespace) -> Part:
    """Seconds for the latency of one more policy of a search, by kernels and by whole networks."""
    model = load_model(SAMPLE)
    split = load_data(SAMPLE, model, 0)
    taken: dict[str, list[float]] = {}
    keys: list[str] = []
    for mode, source, episodes in (("kernels", KernelLatency, 60), ("measure", MeasuredLatency, 12)):
        taken[mode] = []
        # Whole networks, which a search by kernels measures now and then, are no part of a policy's latency.
        settings = SearchSettings(
            latency=mode, episodes=episodes, budget=0.45, finetune_epochs=0, refine=1, measure_every=10**6
        )
        with (
            tempfile.TemporaryDirectory() as folder,
            patch.object(source, "latency", _timed(source.latency, taken[mode], keys)),
        ):
            run_search(model, split, settings, Path(folder) / "study")
    last = float(np.median(taken["kernels"][30:60]))
    # Policies that did not come before in the same search.
    new = [taken["kernels"][n] for n in range(30, 60) if keys[n] not in keys[:n]]
    whole = float(np.median(taken["measure"][:12]))
    figures = [
        Figure(
            "local: latency of one more policy in a warm study (ResNet-8), median",
            last,
            "s",
            0.5,
            "<=",
            note=f"episodes 31 to 60 of a search by kernels; of the {len(new)} policies that were new "
            f"{np.median(new):.2f} s; build and measure: {whole:.2f} s, {whole / last:.1f} times as long",
        )
    ]
    return figures, {"seconds": taken, "new": new}


def _timed(latency: Callable[..., Any], seconds: list[float], keys: list[str]) -> Callable[..., Any]:
    """Wrap a latency source's method: what each call takes goes into a list, its key into another."""

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        found = latency(*arguments)
        seconds.append(time.perf_counter() - start)
        keys.append(arguments[2])
        return found

    return timed


def resnet18(arguments: argparse.Namespace) -> Part:
    """The emulated board on ResNet-18 of width 32: with nothing known of its blocks, with them, and again."""
    model = subjects()["ResNet-18 w32"]
    target = parse_target(DEFAULT_TARGETS["emulated-a72"])
    x = np.sin(np.arange(3 * 32 * 32, dtype=np.float32)).reshape(1, 3, 32, 32)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = build(model.module, target).export(
            Path(folder) / "dense.so", export_fcompile(str(target.attrs["mtriple"]))
        )
        with _forgetful_board(Path(folder)):
            for what, remember in (
                ("cold", False),
                ("emulated again", False),
                ("kept", True),
                ("warm", True),
            ):
                start = time.perf_counter()
                with EmulatedA72(remember=remember).open() as session:
                    result = session.time(library, [x])
                seconds[what] = time.perf_counter() - start
                assert result.ok, result.error
    note = f"fp32, {result.value / 1e6:.1f} M estimated cycles"
    again = (
        f"the same library again; emulated again without its kept figure: {seconds['emulated again']:.1f} s"
    )
    return [
        Figure("emulated-a72: ResNet-18 width 32, cold", seconds["cold"], "s", 15, "<=", note=note),
        Figure("emulated-a72: ResNet-18 width 32, warm", seconds["warm"], "s", 2, "<=", note=again),
    ], {"seconds": seconds, "cycles": result.value}


# How a search takes its latencies: whole networks, the hybrid, that with a model that was fitted before.
MODES = {"measure": "measure", "hybrid": "hybrid", "fitted": "hybrid"}


def searches(device: str, arguments: argparse.Namespace) -> Part:
    """Best rewards and measuring time of a search by whole networks and by the hybrid.

    The model that was fitted before is the part `device`'s: its kernels come from the cache. All searches'
    best policies are measured once more, as whole networks and thoroughly, for rewards on the same footing.
    """
    model = load_model(SAMPLE)
    before = _fitted_before(device, model, arguments)
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
                _forgetful_board(Path(folder)),
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


def _fitted_before(device: str, model: Model, arguments: argparse.Namespace) -> LatencyModel:
    """Model fitted to all kernels that the part `device` has timed."""
    with open_meter(device, model, arguments.cache / f"latency_model-{device}.sqlite") as meter:
        kernels = stored_kernels(meter.store, meter.device, meter.target)
    fitted = LatencyModel(meter.device.unit)
    return fitted.fit(fitted.rows_of(kernels, [kernel.value for kernel in kernels]))


@contextmanager
def _forgetful_board(folder: Path) -> Iterator[None]:
    """Let the emulated board keep what it ran in its own folder: it shall know nothing of other searches."""
    kit = replace(prepare(), cache=folder / "cache")
    with patch("tvm_compress.rpc.emulated_a72.prepare", lambda: kit):
        yield


PARTS: dict[str, Callable[[argparse.Namespace], Part]] = {
    "local": lambda arguments: quality("local", arguments),
    "emulated-a72": lambda arguments: quality("emulated-a72", arguments),
    "warm": warm,
    "resnet18": resnet18,
    "search-local": lambda arguments: searches("local", arguments),
    "search-emulated-a72": lambda arguments: searches("emulated-a72", arguments),
}


def _tell(what: str) -> Callable[[int, int], None]:
    return lambda done, total: print(f"{what}: {done} of {total}", flush=True)


def plot(path: Path, data: dict[str, dict[str, Any]]) -> None:
    """Predicted against measured, kernels and networks, a row for each device."""
    from matplotlib.figure import Figure as Plot

    devices = [name for name in GOALS if name in data]
    canvas = Plot(figsize=(8, 3.6 * len(devices)), layout="constrained")
    grid = canvas.subplots(len(devices), 2, squeeze=False)
    for row, device in zip(grid, devices, strict=True):
        for axes, what in zip(row, ("kernels", "networks"), strict=True):
            for name, pairs in data[device]["pairs"].items():
                predicted, measured = np.array(pairs[what]).T
                axes.loglog(measured, predicted, ".", markersize=3, label=name)
            low, high = axes.get_xlim()
            axes.plot([low, high], [low, high], color="0.6", linewidth=0.8)
            axes.set(xlabel="measured", ylabel="predicted", title=f"{device}, {what}")
            axes.legend(fontsize=8)
    canvas.savefig(path, dpi=90)


def main() -> None:
    """Run the parts that are asked for, write, print."""
    parser = parts_parser(__doc__, "latency_model", PARTS)
    parser.add_argument("--kernels", type=int, default=1500)
    parser.add_argument("--policies", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"kernels": arguments.kernels, "policies": arguments.policies, "seeds": arguments.seeds}
    run_parts(arguments, "latency_model", settings, PARTS)
    data = {one["part"]: one for one in json.loads(arguments.json.read_text(encoding="utf-8"))["data"]}
    if set(GOALS) & set(data):
        plot(arguments.json.with_name("latency-model.png"), data)


if __name__ == "__main__":
    main()
