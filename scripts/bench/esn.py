"""Prune-then-quantize against quantize-only and prune-only on ResNet-18 w32, CIFAR-10 (JPEG q75).

usage: python scripts/bench/esn.py [--json docs/figures/esn.json] [--shared FOLDER] [--cache FOLDER] [--quick]

What is trained or evaluated is kept in the cache folder, so that an interrupted run goes on. Fine-tuning is
short: 15,000 of the training images, 4 epochs, one thread; the paper takes 4 epochs of ImageNet.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_data import ROOT, cache_folder, cifar10, kept
from figures import Figure, write
from train import as_model, load_resnet18

from tvm_compress.compression import compile_model, compressed_model, twin_logits
from tvm_compress.data.dataset import Split
from tvm_compress.metrics.esn import esn_a, esn_a_from_noise, mid_rise
from tvm_compress.metrics.esn_training import EsnRecord
from tvm_compress.model import Model
from tvm_compress.passes.params import get_params
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.passes.sites import find_sites
from tvm_compress.prune_then_quantize import EsnSettings, Slim, prune, quantize
from tvm_compress.rpc.device import MeasurementSettings, open_device
from tvm_compress.twin import Twin

CONTROL = "quantize-only, trained as long"
WIDTHS = (0.5, 0.25)
BITS = (1, 2, 3, 4, 8, 32)
MEAN_BITS = (1.5, 2.5)
TRAINED = EsnSettings(epochs=4, learning_rate=0.05, augment="shift", images=512)
IMAGES = 15_000
# Low cost is here: at most what the whole network would cost at two bits, of the eight it needs.
LOW_COST = 0.25
# A low-cost point is of use if it loses no more accuracy than this.
USEFUL = 0.05
# Deployed and timed on this machine: (series, width, weight bits, activation bits).
DEPLOYED = (
    ("quantize-only", 1.0, 4, 8),
    ("quantize-only", 1.0, 4, 4),
    ("prune-then-quantize", 0.5, 4, 8),
    ("prune-then-quantize", 0.5, 4, 4),
    ("prune-then-quantize", 0.25, 4, 8),
)


@dataclass
class Bench:
    """What every part needs: the dense model, the data, and where results are kept."""

    dense: Model
    split: Split
    folder: Path
    settings: EsnSettings

    def slim(self, width: float, trained: bool = True) -> Slim:
        """Pruned and fine-tuned network of a width, trained at most once; untrained only at width 1."""
        if not trained:
            return Slim(self.dense.module, CompressionPolicy(), EsnRecord(()))
        path = self.folder / f"slim-{width:g}"
        if not (path / "training.json").is_file():
            start = time.process_time()
            slim = prune(
                self.dense.module,
                self.split,
                replace(self.settings, width=width),
                lambda epoch: print(f"width {width:g}: epoch {epoch}", flush=True),
            )
            compressed_model(self.dense, slim.policy, slim.module).save(path)
            slim.record.save(path / "training.json")
            (path / "seconds.txt").write_text(f"{time.process_time() - start:.0f}\n")
        model = Model.load(path)
        policy = CompressionPolicy.from_json(str(model.metadata["policy"]))
        return Slim(model.module, policy, EsnRecord.load(path / "training.json"))

    def quantized(self, slim: Slim, **bits: Any) -> tuple[Model, dict[str, Any]]:
        """Quantized model and its costs."""
        settings = replace(self.settings, **bits)
        result = quantize(slim, self.split.train, settings)
        return compressed_model(self.dense, result.policy, result.module), result.summary

    def point(
        self, series: str, slim: Slim, width: float, record: EsnRecord | None = None, **bits: Any
    ) -> dict[str, Any]:
        """Accuracy and costs of one quantization, evaluated at most once."""
        name = "-".join([series, f"{width:g}", *(f"{key}{value:g}" for key, value in sorted(bits.items()))])
        path = self.folder / f"{name}.json"
        return kept(path, lambda: self._point(series, slim, width, record, bits))

    def _point(
        self, series: str, slim: Slim, width: float, record: EsnRecord | None, bits: dict[str, Any]
    ) -> dict[str, Any]:
        model, summary = self.quantized(slim, width=width, record=record, **bits)
        test = self.split.test
        accuracy = Twin(model.module).accuracy(test.normalized(), test.y)
        costs = {key: summary[key] for key in ("esn_a", "esn_d", "esn_d_filters")}
        result = {"series": series, "width": width, **bits, "accuracy": accuracy, **costs}
        if "bits_by_site" in summary:
            result["bits_by_site"] = summary["bits_by_site"]
        return result


def curves(bench: Bench, control: bool) -> list[dict[str, Any]]:
    """Every point of the three strategies, of both controls, and of the allocation from training."""
    points = []
    dense = bench.slim(1.0, trained=False)
    for bits in BITS:
        points.append(bench.point("quantize-only", dense, 1.0, weight_bits=bits))
    # The fat network gets bits by layer too, from the slim one's training: only proportions are taken.
    record = bench.slim(WIDTHS[0]).record
    for mean in MEAN_BITS:
        bits = {"weight_bits": mean, "allocate": True}
        points.append(bench.point("quantize-only", dense, 1.0, **bits, record=record))
    points.append(bench.point("quantize-only", dense, 1.0, weight_bits=4, activation_bits=4))
    for width in WIDTHS:
        slim = bench.slim(width)
        for bits in BITS:
            series = "prune-only" if bits == 32 else "prune-then-quantize"
            points.append(bench.point(series, slim, width, weight_bits=bits))
        for mean in MEAN_BITS:
            points.append(bench.point("allocated", slim, width, weight_bits=mean, allocate=True))
        if width == 0.5:
            points.append(bench.point("prune-then-quantize", slim, width, weight_bits=4, activation_bits=4))
    if control:
        trained = bench.slim(1.0)
        for bits in BITS[:-1]:
            points.append(bench.point(CONTROL, trained, 1.0, weight_bits=bits))
    return points


def deployed(bench: Bench) -> dict[str, Any]:
    """Compile, verify and time the dense network and some points in one session on this machine."""
    device = open_device("local", threads=1)
    test = bench.split.test.take(slice(0, None, 10))
    artifacts, rows = {}, {}
    for series, width, bits, activation_bits in ((("dense", 1.0, 32, 32)), *DEPLOYED):
        name = f"{series} {width:g} w{bits} a{activation_bits}"
        if series == "dense":
            model = bench.dense
        else:
            slim = bench.slim(width, trained=width < 1)
            model, _ = bench.quantized(slim, width=width, weight_bits=bits, activation_bits=activation_bits)
        path = bench.folder / ("artifact-" + name.replace(" ", "-"))
        artifacts[name] = compile_model(model, "host", path)
        check = artifacts[name].verify(test.normalized(), test.y, device, twin_logits(model, test))
        rows[name] = {
            "series": series,
            "width": width,
            "weight_bits": bits,
            "activation_bits": activation_bits,
            "agreement": check.agreement,
            "images": check.samples,
            "esn_d_filters": artifacts[name].manifest.metrics["esn_d_filters"],
        }
        print(name, rows[name], flush=True)
    first = next(iter(artifacts))
    timing = MeasurementSettings(threads=1, warmup=3, repeat=30, min_repeat_ms=20)
    others = {name: artifact for name, artifact in artifacts.items() if name != first}
    times = artifacts[first].benchmark(device, others, timing)
    for name, row in rows.items():
        time_of = times["this" if name == first else name]
        row |= {"milliseconds": 1e3 * time_of.value, "spread": 1e3 * time_of.spread}
    return {"rows": rows, "timing": timing.to_dict()}


def pseudo_code_differences(model: Model) -> int:
    """Weights of the whole network for which our mid-rise quantizer differs from the paper's appendix A."""
    params, differing = get_params(model.module), 0
    for site in find_sites(model.module):
        w = params[site.weight].astype(np.float64)
        delta = np.abs(w).max() / 8
        axes = tuple(range(1, w.ndim))
        w_int = np.floor(w / delta) + 0.5
        w_int[np.all(np.abs(w) < delta / 2, axis=axes)] = 0
        differing += int((mid_rise(w, np.full(len(w), delta)) != w_int).sum())
    return differing


def identity_error() -> float:
    """Largest relative error of equation 4 on normal weights, for steps whose noise is uniform."""
    w = np.random.default_rng(0).normal(size=(64, 64, 3, 3))
    errors = []
    for step in (0.01, 0.03, 0.1, 0.2, 0.4):
        levels = mid_rise(w, np.full(64, step))
        noise = float(np.square(w - step * levels).sum())
        right = esn_a_from_noise(float(np.square(w).sum()), noise, w.size)
        errors.append(abs(esn_a(levels) / right - 1))
    return max(errors)


def cheapest(points: Sequence[dict[str, Any]], series: Sequence[str], accuracy: float) -> float:
    """Least ESN'_d of the points of some series that are at least so accurate; infinite without any."""
    costs = [p["esn_d_filters"] for p in points if p["series"] in series and p["accuracy"] >= accuracy]
    return min(costs, default=float("inf"))


def figures_of(bench: Bench, points: list[dict[str, Any]], timed: dict[str, Any]) -> list[Figure]:
    """Figures of the issue; "at equal accuracy" means the cheapest point that is at least as accurate."""
    whole = next(
        p for p in points if p["series"] == "quantize-only" and p["weight_bits"] == 8 and p["width"] == 1
    )
    ours = ("prune-then-quantize", "allocated")
    low = [
        p for p in points if p["series"] in ours and p["esn_d_filters"] <= LOW_COST * whole["esn_d_filters"]
    ]
    finest = max(low, key=lambda p: p["accuracy"])

    def saved(series: Sequence[str], point: dict[str, Any]) -> float:
        return cheapest(points, series, point["accuracy"]) / point["esn_d_filters"]

    def at(point: dict[str, Any]) -> str:
        return (
            f"at {100 * point['accuracy']:.2f} %: width {point['width']:g}, {point['weight_bits']:g} bits"
            + (" in the mean" if point.get("allocate") else "")
        )

    quantize_only = ["quantize-only", *{p["series"] for p in points if p["series"] == CONTROL}]
    useful = [p for p in low if whole["accuracy"] - p["accuracy"] <= USEFUL] or [finest]
    best = max(useful, key=lambda p: saved(quantize_only, p))
    # Prune-only ends at the dense network, which is a point of its own.
    prune_only = [*points, {**whole, "series": "prune-only"}]
    rows = timed["rows"]
    slow, fast = rows["quantize-only 1 w4 a8"], rows["prune-then-quantize 0.5 w4 a8"]
    agreement = min(row["agreement"] for row in rows.values())
    return [
        Figure(
            "ESN'_d of quantize-only / prune-then-quantize, largest",
            saved(quantize_only, best),
            "x",
            2,
            ">=",
            "2x (ImageNet)",
            at(best),
        ),
        Figure(
            "the same at the most accurate low-cost point",
            saved(quantize_only, finest),
            "x",
            2,
            ">=",
            note=at(finest),
        ),
        Figure(
            "ESN'_d of prune-only / prune-then-quantize",
            cheapest(prune_only, ("prune-only",), best["accuracy"]) / best["esn_d_filters"],
            "x",
            2,
            ">=",
            "",
            at(best) + ", floats counted as 8 bits",
        ),
        Figure(
            "test accuracy lost in the low-cost region",
            100 * (whole["accuracy"] - finest["accuracy"]),
            "points",
            2,
            "<=",
            note="most accurate point of at most a quarter of the 8-bit network's ESN'_d",
        ),
        Figure(
            "latency of width 0.5 / width 1, both 4-bit weights",
            fast["milliseconds"] / slow["milliseconds"],
            "ratio",
            0.5,
            "<=",
            note="local device, INT8 kernels, one thread",
        ),
        Figure("agreement of the artifacts with the twin", agreement, "share", 0.995, ">="),
        Figure(
            "weights that differ from the paper's pseudo-code",
            pseudo_code_differences(bench.dense),
            "weights",
            0,
            "==",
        ),
        Figure("error of equation 4 on uniform noise", 100 * identity_error(), "%", 2, "<="),
    ]


def plot(points: list[dict[str, Any]], timed: dict[str, Any], path: Path) -> None:
    """Accuracy against ESN'_d, and against measured latency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for point in points:
        if point.get("activation_bits", 8) == 8 and point["series"] != "prune-only":
            groups.setdefault((point["series"], point["width"]), []).append(point)
    groups[("prune-only", 0.0)] = [p for p in points if p["series"] == "prune-only"]
    colours = {1.0: "tab:green", 0.375: "tab:orange", 0.5: "tab:red", 0.25: "tab:purple", 0.0: "tab:blue"}
    styles = {"allocated": ":", CONTROL: "--"}
    for (series, width), group in groups.items():
        group.sort(key=lambda p: p["esn_d_filters"])
        label = series + (f", width {width:g}" if 0 < width < 1 else "")
        costs = [p["esn_d_filters"] / 1e6 for p in group]
        shares = [100 * p["accuracy"] for p in group]
        left.plot(costs, shares, styles.get(series, "-"), marker="o", ms=4, color=colours[width], label=label)
    left.set(xlabel="ESN'_d (million MAC x bit)", ylabel="test accuracy (%)", xscale="log")
    left.legend(fontsize=7)
    accuracies = {
        (p["width"], p["weight_bits"], p.get("activation_bits", 8)): p["accuracy"]
        for p in points
        if p["series"] in ("quantize-only", "prune-then-quantize")
    }
    for name, row in timed["rows"].items():
        bits = 8 if row["activation_bits"] == 32 else row["activation_bits"]
        share = 100 * accuracies[row["width"], row["weight_bits"], bits]
        right.errorbar(row["milliseconds"], share, xerr=row["spread"], fmt="o", color=colours[row["width"]])
        right.annotate(
            name, (row["milliseconds"], share), fontsize=6, xytext=(4, -8), textcoords="offset points"
        )
    right.set(xlabel="measured latency (ms, local device, one thread)")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run, write, plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "figures" / "esn.json")
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--quick", action="store_true", help="little data and one epoch, to try the script")
    parser.add_argument("--control", action="store_true", help="train the whole network as long, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    split = cifar10(arguments.shared, arguments.cache)
    images, settings = IMAGES, TRAINED
    if arguments.quick:
        images, settings = 1000, replace(TRAINED, epochs=1, images=128)
        split = replace(split, test=split.test.take(slice(0, None, 10)))
    split = replace(split, train=split.train.subset(images, np.random.default_rng(0)))
    folder = cache_folder(arguments.cache) / f"esn-{images}-{settings.epochs}"
    folder.mkdir(exist_ok=True)
    bench = Bench(as_model(load_resnet18(arguments.shared), "cifar10"), split, folder, settings)
    points = curves(bench, arguments.control)
    timed = kept(folder / "deployed.json", lambda: deployed(bench))
    training = [
        {
            "width": width,
            "epochs": [
                {"epoch": e.epoch, "esn_a": e.esn_a, **e.means} for e in bench.slim(width).record.epochs
            ],
        }
        for width in (*WIDTHS, 1.0)[: None if arguments.control else -1]
    ]
    said = {
        "network": "ResNet-18 w32, CIFAR-10 (JPEG q75)",
        "quick": arguments.quick,
        "training images": images,
        "epochs": settings.epochs,
        "learning rate": settings.learning_rate,
        "test images": len(split.test),
        "images for statistics": settings.images,
        "activation bits": "8 unless a point says otherwise",
        "first and last layer": "8 bits",
        "timing": timed["timing"],
    }
    data = [*points, *timed["rows"].values(), *training]
    write(arguments.json, "esn", said, figures_of(bench, points, timed), data)
    plot(points, timed, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
