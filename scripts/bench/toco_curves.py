"""What the parts of toco.py share: curves of accuracy while something is pruned, and kept results."""

import hashlib
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from bench_data import ROOT, cache_folder, kept, load_split
from train import NETWORKS, as_model, load_network

from tvm_compress.compression import compile_model
from tvm_compress.data.dataset import Dataset, Split
from tvm_compress.finetune import finetune
from tvm_compress.model import Model
from tvm_compress.passes.params import get_params, set_params
from tvm_compress.passes.sites import find_sites
from tvm_compress.rpc.device import MeasurementSettings, open_device
from tvm_compress.tolerance.algorithm1 import Algorithm1, State
from tvm_compress.tolerance.baselines import global_masks
from tvm_compress.tolerance.compress import HoldWeights
from tvm_compress.tolerance.compression_models import CompressionModel, Pruning
from tvm_compress.tolerance.grouping import Grouping
from tvm_compress.tolerance.settings import TocoSettings
from tvm_compress.twin import Twin

Arrays = tuple[np.ndarray, np.ndarray]
Masks = dict[str, np.ndarray]

# How many seeds the figures of trained networks take.
NETWORK_SEEDS = 2
# Rates at which methods that prune at once are looked at.
GRID = (0.1, 0.2, 0.3, *np.round(np.arange(0.4, 0.98, 0.03), 2).tolist())
# Loss bounds so high that accuracy, not the bound, ends the curves.
PRUNE = TocoSettings(loss_bound=8.0, sigma=1.08, iterations=120, batches=8, images=1024)
FINETUNE_EPOCHS = 2
FINETUNE_IMAGES = 15_000

# (size, test accuracy in %): size is the share of the weights that is removed, or the bits per weight.
Curve = list[tuple[float, float]]


@dataclass
class Run:
    """What `toco_curve` saw."""

    curve: Curve
    states: list[tuple[float, dict[str, np.ndarray]]] = field(default_factory=list)
    importance: dict[str, np.ndarray] = field(default_factory=dict)


def finished(name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Result of a run, read from the cache where the same code has finished it before."""
    sources = sorted((ROOT / "tvm_compress" / "tolerance").glob("*.py"))
    sources += [Path(__file__), Path(run.__code__.co_filename)]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    return kept(cache_folder() / "toco" / f"{name}-{digest}.json", run)


def toco_curve(
    module: tvm.IRModule,
    model: CompressionModel,
    settings: TocoSettings,
    train: Arrays,
    test: Arrays,
    step: float,
    until: Callable[[Curve], bool] = lambda curve: False,
) -> Run:
    """Run Algorithm 1; return accuracy and weights after every `step` of size, until a condition holds."""
    pruning = settings.objective == "prune"
    twin = Twin(module)
    loop = Algorithm1(twin, model, *train, settings)
    state = loop.start()
    judge = Twin(module)
    found = Run([(0.0 if pruning else model.size(state.compressed), 100 * judge.accuracy(*test, 1000))])
    for iteration in loop.run(state):
        size = 1 - iteration.size if pruning else iteration.size
        if not iteration.accepted or abs(size - found.curve[-1][0]) < step:
            continue
        found.curve.append((size, 100 * accuracy_of(judge, state, test)))
        found.states.append((size, state.compressed.weights))
        if until(found.curve):
            break
    found.importance = state.importance.values()
    return found


def accuracy_of(judge: Twin, state: State, test: Arrays) -> float:
    """Test accuracy of a state's weights, in a twin of the same module."""
    with torch.no_grad():
        for name, weight in state.compressed.weights.items():
            judge.tensors[name].copy_(torch.from_numpy(weight))
    return judge.accuracy(*test, 1000)


def score_curve(
    module: tvm.IRModule,
    scores: Mapping[str, np.ndarray],
    test: Arrays,
    sparsities: Sequence[float],
    group: str = "element",
) -> Curve:
    """Accuracy when the groups of the lowest scores go at once."""
    curve = []
    for sparsity in (0.0, *sparsities):
        masks = global_masks(scores, sparsity, group)
        pruned = masked(module, masks)
        removed = 1 - sum(map(np.count_nonzero, masks.values())) / sum(m.size for m in masks.values())
        curve.append((float(removed), 100 * Twin(pruned).accuracy(*test, 1000)))
    return curve


def masked(module: tvm.IRModule, masks: Mapping[str, np.ndarray]) -> tvm.IRModule:
    """Module with zeros where masks are False; on the way the shapes stay, unlike with the kernels' pass."""
    params = get_params(module)
    return set_params(module, {name: params[name] * mask for name, mask in masks.items()})


def magnitudes(module: tvm.IRModule) -> dict[str, np.ndarray]:
    """abs(w) of every site."""
    params = get_params(module)
    return {site.weight: np.abs(params[site.weight]) for site in find_sites(module)}


def removed_at(curve: Curve, lost: float) -> float:
    """Share of weights removed where a curve first falls `lost` points below its start."""
    points = sorted(curve)
    limit = points[0][1] - lost
    for (low, above), (high, below) in itertools.pairwise(points):
        if below < limit:
            return low + (high - low) * (above - limit) / (above - below)
    return points[-1][0]


def network(name: str) -> tuple[Model, Split]:
    """A trained network and its data."""
    data = NETWORKS[name].data
    return as_model(load_network(name)[0], data), load_split(data)


def arrays(split: Split, settings: TocoSettings) -> tuple[Arrays, Arrays]:
    """The training images that TOCO draws from, and all test images."""
    train = split.train.subset(settings.images, np.random.default_rng(settings.seed))
    return (train.normalized(), train.y), (split.test.normalized(), split.test.y)


def prune_run(model: Model, split: Split, settings: TocoSettings, lost: float, step: float = 0.01) -> Run:
    """TOCO until `lost` points of test accuracy are lost (looked at for the curve only)."""
    grouping = Grouping(model.module, settings.group, tuple(Twin(model.module).trainable()))
    train, test = arrays(split, settings)

    def enough(curve: Curve) -> bool:
        return curve[-1][1] < curve[0][1] - lost

    return toco_curve(model.module, Pruning(grouping), settings, train, test, step, enough)


def timed(variants: dict[str, Model], name: str, target: str, device_name: str) -> dict[str, Any]:
    """Latency of one variant and of "dense", timed in turns."""
    device = open_device(device_name)
    with tempfile.TemporaryDirectory() as folder:
        artifacts = {key: compile_model(model, target, Path(folder) / key) for key, model in variants.items()}
        timing = MeasurementSettings(threads=1, warmup=3, repeat=30, min_repeat_ms=20)
        times = artifacts[name].benchmark(device, {"dense": artifacts["dense"]}, timing)
    return {
        "latency": times["this"].value,
        "dense_latency": times["dense"].value,
        "unit": times["this"].unit,
        "ratio": times["this"].value / times["dense"].value,
    }


def plot_curves(
    path: Path, curves: dict[str, Sequence[Curve]], title: str, floor: float, bits: bool = False
) -> None:
    """Curves of accuracy, a colour for each name, a line for each seed."""
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(6, 4), layout="constrained")
    axes = plot.subplots()
    for number, (name, runs) in enumerate(curves.items()):
        for place, curve in enumerate(runs):
            x, y = np.array(sorted(curve)).T
            axes.plot(
                x if bits else 100 * x,
                y,
                color=f"C{number}",
                marker="o" if bits else "",
                markersize=3,
                linewidth=1,
                label=name if place == 0 else None,
            )
    label = "bits per weight" if bits else "weights removed (%)"
    axes.set(xlabel=label, ylabel="test accuracy (%)", title=title)
    axes.set_ylim(bottom=floor)
    if bits:
        axes.set_xscale("log", base=2)
    axes.legend()
    axes.grid(alpha=0.3)
    plot.savefig(path, dpi=90)


def tune_pruned(
    module: tvm.IRModule, masks: Masks, train: Dataset, epochs: int, seed: int = 0
) -> tvm.IRModule:
    """Fine-tune what masks leave of a module."""
    pruned = masked(module, masks)
    held = {name: get_params(pruned)[name] for name in masks}
    observer = HoldWeights(pruned, held, zeros_only=True)
    return finetune(pruned, train, epochs, seed=seed, augment="shift", observer=observer)
