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
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from bench_data import cache_folder
from figures import Figure, Part, parts_parser, run_parts
from latency_parts import SAMPLE, forgetful_board, open_meter, store_of
from latency_searches import searches
from networks import CIFAR, ConvNet, MobileNetV2, ResNet18
from train import as_model

from tvm_compress.data.load import load_data
from tvm_compress.model import Model, load_model
from tvm_compress.passes.pipeline import build
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.emulated_a72 import EmulatedA72
from tvm_compress.schedules.target_rules import parse_target
from tvm_compress.search.latency_fit import (
    Evaluation,
    errors_of,
    evaluate_latency_model,
    fit_latency_model,
    stored_kernels,
)
from tvm_compress.search.latency_sources import KernelLatency, MeasuredLatency
from tvm_compress.search.run import run_search
from tvm_compress.search.sampling import KernelSampler
from tvm_compress.search.settings import DEFAULT_TARGETS, SearchSettings

# Six convolutions and a dense layer: VGG-7 of an eighth of the usual width.
VGG7 = [16, 16, "M", 32, 32, "M", 64, 64, "M"]
UNSEEN = "VGG-7"
# The policies are drawn from it. What weights from afar take was worked out on those of seed 1.
POLICY_SEED = 2
# So many networks' kernels are timed again.
AGAIN = 12
GOALS = {"local": 0.85, "emulated-a72": 0.95}


def subjects() -> dict[str, Model]:
    """Networks by name; their weights are of no matter here."""
    torch.manual_seed(0)
    return {
        "ResNet-8": load_model(SAMPLE),
        "ResNet-18 w32": as_model(ResNet18().eval(), "cifar10"),
        "MobileNetV2 96": Model.from_torch(_mobilenet(), (torch.zeros(1, 3, 96, 96),)),
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


def quality(device: str, arguments: argparse.Namespace) -> Part:
    """Fit on one device, compare on policies that were not seen."""
    networks = subjects()
    seen = [network for name, network in networks.items() if name != UNSEEN]
    store = store_of(device, arguments.cache)
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
                found[name] = evaluate_latency_model(
                    model, network, meter, arguments.policies, POLICY_SEED, fitted, _tell(f"{device} {name}")
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
        with forgetful_board(Path(folder)):
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
