"""Fast LC on VGG-13 / CIFAR-10 (JPEG q75): seconds, error against compression, exact solutions, deployment.

usage: python scripts/bench/fastlc.py [--json docs/figures/fastlc.json] [--network vgg13] [--shared FOLDER]
           [--cache FOLDER] [--quick]

Seconds are processor seconds of one thread (the machine is shared), of the whole call after the curvature
file is written. Each point is kept in the cache folder, so that an interrupted run goes on. The network is
trained by train.py; nothing is trained here and no image is looked at after the curvature is computed.
"""

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_data import ROOT, cache_folder, kept, load_split
from figures import Figure, write
from train import as_model, load_network, load_resnet18

from tvm_compress.data.dataset import Split
from tvm_compress.fastlc.c_steps import Binary, CStep, FixedPoint, KMeans, Prune, Ternary
from tvm_compress.fastlc.compress import fast_lc
from tvm_compress.fastlc.curvature import Curvature, estimate_curvature
from tvm_compress.fastlc.exact import choose_exactly, prune_exactly
from tvm_compress.fastlc.learn import learn
from tvm_compress.fastlc.quadratic import QuadraticModel
from tvm_compress.fastlc.schemes import compress_weights
from tvm_compress.fastlc.settings import FastLcSettings
from tvm_compress.model import Model
from tvm_compress.passes.params import get_params, set_params
from tvm_compress.passes.pipeline import build
from tvm_compress.passes.sites import find_sites
from tvm_compress.rpc.device import MeasurementSettings, open_device
from tvm_compress.schedules.memory import memory_use
from tvm_compress.twin import Twin

RATIOS = (2.0, 4.0, 8.0, 16.0, 32.0)
IMAGES = 1024
# Width-1 VGG-13 for 32 x 32 images, whose seconds the poster tells; convolutions of 3 x 3, then dense layers.
FULL_WIDTH = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (512, 256), *[(512, 512)] * 3]
FULL_DENSE = [(512, 512), (512, 512), (10, 512)]


@dataclass
class Bench:
    """What every part needs."""

    dense: Model
    split: Split
    curvature: Path
    folder: Path

    def accuracy(self, module: Any) -> float:
        """Share of the test images that are classified right, float32."""
        test = self.split.test
        return Twin(module).accuracy(test.normalized(), test.y)

    def kept(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Result of an earlier run, or of `make` now."""
        return kept(self.folder / f"{name}.json", make)

    def point(self, series: str, **settings: Any) -> dict[str, Any]:
        """Accuracy, storage and seconds of Fast LC with these settings."""

        def make() -> dict[str, Any]:
            images = settings.get("reestimate_batch_norm")
            start = time.process_time()
            result = fast_lc(
                self.dense.module,
                self.split if images else None,
                FastLcSettings(**settings),
                self.curvature,
            )
            seconds = time.process_time() - start
            return {
                "series": series,
                "settings": settings,
                "processor_seconds": seconds,
                "accuracy": self.accuracy(result.module),
                **{key: value for key, value in result.summary.items() if key != "scheme"},
            }

        return self.kept("-".join([series, *(f"{k}{v}" for k, v in sorted(settings.items()))]), make)

    def direct(self, series: str, name: str, step: CStep | float, compression: float) -> dict[str, Any]:
        """The same for direct compression: no curvature; a number prunes so much by magnitude."""

        def make() -> dict[str, Any]:
            params = get_params(self.dense.module)
            weights = {site.weight: params[site.weight] for site in find_sites(self.dense.module)}
            if isinstance(step, float):
                flat = np.concatenate([value.ravel() for value in weights.values()])
                flat = Prune(int(flat.size / step))(flat)
                ends = np.cumsum([value.size for value in weights.values()])
                parts = np.split(flat, ends[:-1])
                changed = {k: p.reshape(v.shape) for (k, v), p in zip(weights.items(), parts, strict=True)}
            else:
                changed = {k: step(v.astype(np.float64)).astype(np.float32) for k, v in weights.items()}
            return {
                "series": series,
                "accuracy": self.accuracy(set_params(self.dense.module, changed)),
                "compression": compression,
            }

        return self.kept(f"{series}-{name}", make)


def curves(bench: Bench, quick: bool) -> list[dict[str, Any]]:
    """Every point of the error-against-compression figure."""
    points = []
    for ratio in RATIOS[:2] if quick else RATIOS:
        pruned = bench.point("prune", scheme="prune", ratio=ratio)
        points += [
            pruned,
            bench.point("prune, damping 1", scheme="prune", ratio=ratio, damping=1.0),
            bench.point(
                "prune, statistics taken again", scheme="prune", ratio=ratio, reestimate_batch_norm=True
            ),
            bench.point("prune, gradient followed", scheme="prune", ratio=ratio, use_gradient=True),
            bench.direct("magnitude", f"{ratio:g}", ratio, pruned["compression"]),
        ]
    for bits in (1, 4, 8) if quick else (1, 2, 3, 4, 5, 6, 8):
        made = bench.point("kmeans", scheme="kmeans", bits=bits)
        points += [made, bench.direct("kmeans, direct", f"{bits}", KMeans(bits), made["compression"])]
    for bits in (4,) if quick else (2, 3, 4, 5, 6, 8):
        made = bench.point("fixed", scheme="fixed", bits=bits)
        points += [made, bench.direct("fixed, direct", f"{bits}", FixedPoint(bits), made["compression"])]
    for scheme, step in (("binary", Binary()), ("ternary", Ternary())):
        made = bench.point(scheme, scheme=scheme)
        points += [made, bench.direct(f"{scheme}, direct", "0", step, made["compression"])]
    for ratio in RATIOS[: 2 if quick else 3]:
        points += [
            bench.point("low-rank", scheme="low-rank", ratio=ratio),
            bench.point("low-rank, spatial", scheme="low-rank", ratio=ratio, factorization="spatial"),
            bench.point("low-rank+sparse", scheme="low-rank+sparse", ratio=ratio),
        ]
    return points


def exact_gap() -> float:
    """Largest gap of loss between exact solutions or the loop and enumeration, on models of 12 weights."""
    worst = 0.0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        h = rng.gamma(0.5, 2.0, 12)
        model = QuadraticModel(rng.normal(size=12), 0.3 * rng.normal(size=12) * np.sqrt(h), h)
        for count in (3, 6, 9):
            best = min(
                model.loss(np.where(np.isin(np.arange(12), chosen), model.target, 0.0))
                for chosen in itertools.combinations(range(12), count)
            )
            for found in (prune_exactly(model, count), learn(model, Prune(count)).value):
                worst = max(worst, abs(model.loss(found) - best))
        best = min(model.loss(np.array(signs)) for signs in itertools.product((-1.0, 1.0), repeat=12))
        for found in (choose_exactly(model), learn(model, Binary(scaled=False)).value):
            worst = max(worst, abs(model.loss(found) - best))
    return worst


def full_width_seconds() -> dict[str, float]:
    """Processor seconds for weights of VGG-13's full shapes; random values, since only the time is asked."""
    rng = np.random.default_rng(0)
    models = {}
    for index, shape in enumerate([(*s, 3, 3) for s in FULL_WIDTH] + FULL_DENSE):
        w = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
        models[f"layer{index}"] = QuadraticModel.damped(w, np.zeros(shape), rng.gamma(0.3, 1.0, shape), 0.1)
    seconds: dict[str, float] = {"weights": sum(model.weights.size for model in models.values())}
    for settings in (
        FastLcSettings("prune", ratio=4.0),
        FastLcSettings("kmeans", bits=1),
        FastLcSettings("kmeans", bits=4),
        FastLcSettings("kmeans", bits=8),
        FastLcSettings("fixed", bits=4),
    ):
        start = time.process_time()
        compress_weights(models, [], settings)
        seconds[f"{settings.scheme}{settings.bits or ''}"] = time.process_time() - start
        print("full width", settings.scheme, settings.bits, seconds, flush=True)
    return seconds


def deployed(bench: Bench, quick: bool) -> list[dict[str, Any]]:
    """Bytes and latency of libraries with codebook and low-rank weights, beside the dense one."""
    variants: dict[str, Any] = {"dense": bench.dense.module}
    for name, settings in {
        "kmeans 1 bit": {"scheme": "kmeans", "bits": 1},
        "kmeans 4 bits": {"scheme": "kmeans", "bits": 4},
        "kmeans 4 bits, per channel": {"scheme": "kmeans", "bits": 4, "granularity": "channel"},
        "kmeans 8 bits": {"scheme": "kmeans", "bits": 8},
        "low-rank 4x": {"scheme": "low-rank", "ratio": 4.0},
        "low-rank 4x, spatial": {"scheme": "low-rank", "ratio": 4.0, "factorization": "spatial"},
    }.items():
        variants[name] = fast_lc(bench.dense.module, None, FastLcSettings(**settings), bench.curvature).module
    rows = [{"name": name} for name in variants]
    x = [bench.split.test.normalized(slice(0, 1))]
    devices = (
        [("host", "local")] if quick else [("host", "local"), ("raspberry-pi/4b-aarch64", "emulated-a72")]
    )
    for target, device_name in devices:
        device = open_device(device_name)
        with tempfile.TemporaryDirectory() as folder:
            libraries = {}
            for row, (name, module) in zip(rows, variants.items(), strict=True):
                path = Path(folder) / f"{len(libraries)}.so"
                compiled = build(module, target)
                compiled.export(path, _linker(target))
                libraries[name] = (path, x)
                row[f"library_bytes_{device_name}"] = path.stat().st_size
                row[f"constant_bytes_{device_name}"] = memory_use(compiled.module, compiled.target).constants
            settings = MeasurementSettings(threads=1, warmup=3, repeat=30, min_repeat_ms=20)
            with device.open(settings) as session:
                timed = session.time_many(libraries)
        for row in rows:
            row[f"latency_{device_name}"] = timed[row["name"]].value
            row[f"unit_{device_name}"] = timed[row["name"]].unit
        print(json.dumps(rows, indent=1), flush=True)
    return rows


def _linker(target: str) -> Any:
    from tvm_compress.rpc.cross_compile import export_fcompile
    from tvm_compress.schedules.target_rules import parse_target

    return export_fcompile(str(parse_target(target).attrs.get("mtriple", "")))


def drop(points: list[dict[str, Any]], dense: float, series: str, **settings: Any) -> float:
    """Points of accuracy that one setting loses."""
    found = next(p for p in points if p["series"] == series and settings.items() <= p["settings"].items())
    return 100 * (dense - found["accuracy"])


def make_figures(
    points: list[dict[str, Any]],
    dense: float,
    seconds: dict[str, float],
    rows: list[dict[str, Any]],
    sites_weights: int,
) -> list[Figure]:
    """The figures of the issue."""
    pruning = max(p["processor_seconds"] for p in points if p["series"] == "prune")
    quantizing = max(p["processor_seconds"] for p in points if p["series"] in ("kmeans", "fixed"))
    wide = f"{seconds['weights'] / 1e6:.1f} M weights, random"
    figures = [
        Figure("exact solutions and loop against enumeration", exact_gap(), "loss", 1e-9, "<="),
        Figure("pruning after curvature", pruning, "s", 1.0, "<=", "poster: 1 s"),
        Figure("quantization after curvature", quantizing, "s", 20.0, "<=", "poster: 120 s"),
        Figure("pruning, full-width VGG-13", seconds["prune"], "s", 1.0, "<=", note=wide),
        Figure(
            "quantization, full-width VGG-13",
            max(value for key, value in seconds.items() if key.startswith(("kmeans", "fixed"))),
            "s",
            20.0,
            "<=",
            note=wide,
        ),
    ]
    for ratio in (2.0, 4.0):
        lost = drop(points, dense, "prune", ratio=ratio)
        figures.append(Figure(f"accuracy lost, pruned {ratio:g}x", lost, "points", 0.5, "<="))
    for bits in (8, 4):
        lost = drop(points, dense, "kmeans", bits=bits)
        figures.append(
            Figure(f"accuracy lost, kmeans {bits} bits ({32 // bits}x)", lost, "points", 0.5, "<=")
        )
    for ratio in (2.0, 4.0):
        lost = drop(points, dense, "low-rank", ratio=ratio)
        figures.append(Figure(f"accuracy lost, low rank {ratio:g}x", lost, "points", 0.5, "<="))
    by_name = {row["name"]: row for row in rows}
    for name, bits in (("kmeans 1 bit", 1), ("kmeans 4 bits", 4), ("kmeans 8 bits", 8)):
        # Weights as they are stored, biases and codebooks included.
        share = by_name[name]["constant_bytes_local"] / (4 * sites_weights)
        figures.append(
            Figure(f"bytes of constants, {name}", share, "of fp32 weights", bits / 32 + 0.02, "<=")
        )
    return figures


def plot(points: list[dict[str, Any]], dense: float, path: Path) -> None:
    """Error against compression, as on the poster."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    shown = (
        ("prune", "prune, damping 1", "magnitude", "low-rank", "low-rank, spatial", "low-rank+sparse"),
        ("kmeans", "kmeans, direct", "fixed", "fixed, direct", "binary", "ternary"),
    )
    for axis, names in zip(axes, shown, strict=True):
        for name in names:
            chosen = sorted((p for p in points if p["series"] == name), key=lambda p: p["compression"])
            axis.plot(
                [p["compression"] for p in chosen],
                [100 * (1 - p["accuracy"]) for p in chosen],
                marker="o",
                linestyle="--" if name in ("magnitude",) or "direct" in name else "-",
                label=name,
            )
        axis.axhline(100 * (1 - dense), color="grey", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xlabel("compression of the weights (stored bits, masks and codebooks included)")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test error, %")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Run everything and write the JSON and the plot."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "figures" / "fastlc.json")
    parser.add_argument("--network", default="vgg13", help="of train.py, or resnet18")
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cache = cache_folder(arguments.cache)
    if arguments.network == "resnet18":
        network, record = load_resnet18(arguments.shared), {"note": "ResNet-18 w32", "data": "cifar10"}
    else:
        network, record = load_network(arguments.network, cache)
    dense = as_model(network, "cifar10")
    split = load_split("cifar10", arguments.shared, cache)
    if arguments.quick:
        split = replace(split, test=split.test.subset(500, np.random.default_rng(0)))
    folder = cache / f"fastlc-{arguments.network}{'-quick' if arguments.quick else ''}"
    folder.mkdir(exist_ok=True)
    bench = Bench(dense, split, folder / "curvature.safetensors", folder)
    images = 64 if arguments.quick else IMAGES

    def compute() -> dict[str, Any]:
        some = split.train.subset(images, np.random.default_rng(0))
        start = time.process_time()
        found = estimate_curvature(dense.module, some.normalized(), some.y)
        taken = time.process_time() - start
        found.save(bench.curvature)
        return {"processor_seconds": taken, "images": images, "accuracy_dense": bench.accuracy(dense.module)}

    curvature = bench.kept("curvature", compute)
    Curvature.load(bench.curvature).check(dense.module)
    points = curves(bench, arguments.quick)
    seconds = bench.kept("full-width-seconds", full_width_seconds)
    rows = bench.kept("deployed", lambda: {"rows": deployed(bench, arguments.quick)})["rows"]
    sizes = sum(int(np.prod(site.weight_shape)) for site in find_sites(dense.module))
    figures = make_figures(points, curvature["accuracy_dense"], seconds, rows, sizes)
    data = [{"curvature": curvature}, {"full_width_seconds": seconds}, *rows, *points]
    settings = {
        "network": arguments.network,
        "note": record["note"],
        "weights": sizes,
        "test_images": len(split.test),
        "defaults": {k: v for k, v in asdict(FastLcSettings("prune")).items() if v is not None},
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write(arguments.json, "fastlc", settings, figures, data)
    plot(points, curvature["accuracy_dense"], arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
