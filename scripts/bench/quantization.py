"""Quantization of ResNet-20 and ResNet-18 w32, CIFAR-10 (JPEG q75): post-training, trained, and deployed.

usage: python scripts/bench/quantization.py [--json FILE] [--shared FOLDER] [--cache FOLDER] [--only PART]
                                            [--network NAME] [--points N] [--kept]

512 calibration images without labels give ranges, rounding and corrections. Accuracy is that of the integers
(the twin's, which the built library's equal), on 5,000 test images. `quantization_training.py` trains first.
Two networks of `quantization_others.py` (its first lines say what they need) get 8 bits without training.
Each point is kept in the cache folder: an interrupted run goes on; `--points N` stops after N new ones,
`--kept` writes what is there. The part "peer" needs the extra `bench` (ONNX Runtime).
"""

import argparse
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_data import ROOT, kept
from figures import Figure, write
from quantization_others import CLASSIFIER, EFFICIENTNET, TASKS
from quantization_training import (
    CALIBRATION_IMAGES,
    EPOCHS,
    NETWORKS,
    RATES,
    Task,
    adapted_task,
    policy_of,
    trained,
)

from tvm_compress.calibration import METHODS as CALIBRATIONS
from tvm_compress.compression import compressed_model
from tvm_compress.compressor import Compressor, PostTraining, realize
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.twin import Twin

PARTS = ("post-training", "peer", "trained", "artifact")
BASE = PostTraining()
BEST = PostTraining(weight_rounding="reconstruction", bias_correction=True)
# What is tried without training, by bits: options and the name of the row.
OPTIONS: dict[tuple[int, int], dict[str, PostTraining]] = {
    (8, 8): {f"range by {method}": PostTraining(calibration=method) for method in CALIBRATIONS}
    | {
        f"range by {method}, bias correction": PostTraining(calibration=method, bias_correction=True)
        for method in ("mse", "kl", "minmax")
    },
    (4, 8): {
        "nearest": BASE,
        "nearest, bias correction": PostTraining(bias_correction=True),
        "nearest, equalized": PostTraining(equalize=True),
        "nearest, equalized, bias correction": PostTraining(equalize=True, bias_correction=True),
        "reconstruction, bias correction": BEST,
    },
    (4, 4): {
        "nearest": BASE,
        "nearest, bias correction": PostTraining(bias_correction=True),
        "reconstruction, bias correction": BEST,
    },
    (2, 2): {"reconstruction, bias correction": BEST},
}
# What the larger network is spared.
ON_THE_SMALL_ONE_ONLY = (
    "range by percentile",
    "range by moving_average",
    "range by minmax, bias correction",
)
# Validation images, without labels, by which one of several options is chosen.
CHOSEN_BY = 1000
# Points of accuracy that may be lost.
POST_TRAINING_GOALS = {(8, 8): 0.3, (4, 8): 1.5, (4, 4): 1.5}
INT8_GOALS = {CLASSIFIER: 0.5, EFFICIENTNET: 1.0}
TRAINED_GOALS = {(4, 4): 1.5, (2, 2): 4.0}
# Where integers are compared, and on how many images.
DEVICES = ("local", "emulated-a72")
COMPARED = 256
IMPORT_IMAGES = 500


class EnoughError(Exception):
    """The points that were asked for are done."""


@dataclass
class Bench:
    """The tasks, and how many new points may still be measured."""

    shared: Path | None
    cache: Path | None
    points: int
    kept_only: bool
    networks: list[str]
    missing: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tasks = {
            name: TASKS[name](self.cache) if name in TASKS else adapted_task(name, self.shared, self.cache)
            for name in self.networks
        }

    def point(self, path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Give a point that is kept, or measure it; None where only kept ones are wanted."""
        if not path.is_file() and self.kept_only:
            self.missing.append(f"{path.parent.name}/{path.stem}")
            return None
        if not path.is_file():
            if self.points == 0:
                raise EnoughError
            self.points -= 1
        return kept(path, make)


def few_bit_policy(task: Task, bits: tuple[int, int]) -> CompressionPolicy:
    """`policy_of`, but the first and last site keep 8-bit weights, as they do where kernels decide."""
    policy = policy_of(task.model, bits)
    edges = {next(iter(policy.sites)), list(policy.sites)[-1]}
    eight = SitePolicy(scheme="int8", weight_bits=8, activation_bits=8)
    sites = {name: eight if name in edges else site for name, site in policy.sites.items()}
    return CompressionPolicy(sites=sites, target=policy.target)


def post_training(task: Task, bits: tuple[int, int], how: PostTraining, name: str) -> dict[str, Any]:
    """Accuracy after quantization without training."""
    policy = few_bit_policy(task, bits)
    start = time.process_time()
    module = Compressor(task.model.module, task.calibration, None, how).quantize(task.model.module, policy)
    seconds = time.process_time() - start
    accuracy = task.evaluate(compressed_model(task.model, policy, module))
    x = task.split.validation.subset(CHOSEN_BY, np.random.default_rng(0)).normalized()
    return {
        "kind": "post-training",
        "network": task.name,
        "bits": f"W{bits[0]}A{bits[1]}",
        "options": name,
        "accuracy": accuracy,
        "divergence": divergence(Twin(task.model.module).predict(x), Twin(realize(module)).predict(x)),
        "processor_seconds": seconds,
    }


def divergence(dense: np.ndarray, quantized: np.ndarray) -> float:
    """Mean KL divergence of the quantized network's answers from the dense one's, from logits [N, O]."""
    wanted, found = (torch.from_numpy(x).double().log_softmax(1) for x in (dense, quantized))
    return float((wanted.exp() * (wanted - found)).sum(1).mean())


def qat(task: Task, bits: tuple[int, int]) -> dict[str, Any]:
    """Accuracy after the training that `quantization_training.py` did."""
    return {
        "kind": "trained",
        "network": task.name,
        "bits": f"W{bits[0]}A{bits[1]}",
        "images_seen": EPOCHS * len(task.split.train),
        "accuracy": task.evaluate(trained(task, bits)),
    }


def measure(bench: Bench, parts: list[str]) -> list[dict[str, Any]]:
    """Give the points of some parts, with each network's dense accuracy first."""
    points: list[dict[str, Any] | None] = []
    for task in bench.tasks.values():
        x, y = task.split.test.normalized(), task.split.test.y
        dense = bench.point(
            task.folder / "dense.json",
            lambda t=task, x=x, y=y: {
                "kind": "dense",
                "network": t.name,
                "accuracy": Twin(t.model.module).accuracy(x, y),
            },
        )
        points.append(dense)
    for task in bench.tasks.values():
        for part, (path, make) in jobs(task):
            if part in parts:
                points.append(bench.point(path, make))
    return [point for point in points if point is not None]


Job = tuple[Path, Callable[[], dict[str, Any]]]


def jobs(task: Task) -> list[tuple[str, Job]]:
    """Give everything to measure of a network, with its part; the cheapest first."""
    from quantization_artifact import POLICIES, compare
    from quantization_peer import METHODS, quantize

    found: list[tuple[str, Job]] = []

    def add(part: str, name: str, make: Callable[[], dict[str, Any]]) -> None:
        slug = "".join(c if c.isalnum() else "-" for c in name)
        found.append((part, (task.folder / f"{part}-{slug}.json", make)))

    for bits in (bits for name, bits in RATES if name == task.name):
        add("trained", f"w{bits[0]}a{bits[1]}", lambda b=bits: qat(task, b))
    for bits, options in OPTIONS.items():
        if task.name in TASKS and bits != (8, 8):
            continue
        for name, how in options.items():
            if task.name != NETWORKS[0] and name in ON_THE_SMALL_ONE_ONLY:
                continue
            key = f"w{bits[0]}a{bits[1]} {name}"
            add("post-training", key, lambda b=bits, h=how, n=name: post_training(task, b, h, n))
    # Entropy keeps what all layers give on all images: more than 20 GB with images of this size.
    for method in METHODS[:1] if task.name == EFFICIENTNET else METHODS:
        add("peer", method, lambda m=method: quantize(task, m, IMPORT_IMAGES))
    if task.name == NETWORKS[-1]:
        for device, policy in itertools.product(DEVICES, POLICIES):
            make = lambda p=policy, d=device: compare(task, p, d, COMPARED)  # noqa: E731
            add("artifact", f"{policy} {device}", make)
    return found


def figures_of(points: list[dict[str, Any]], networks: list[str]) -> list[Figure]:
    """The issue's figures."""
    figures = []
    for network in networks:
        # The photos are too few for an accuracy: answers are compared with the dense network's.
        what = "agreement" if network == EFFICIENTNET else "accuracy"
        mine = [p for p in points if p.get("network") == network]
        dense = next(p["accuracy"] for p in mine if p["kind"] == "dense")
        peers = [p for p in mine if p["kind"] == "peer"]
        best_peer = max(peers, key=lambda p: p["accuracy"], default=None)

        def lost(point: dict[str, Any], dense: float = dense) -> tuple[float, str]:
            said = f"{100 * point['accuracy']:.2f} %, dense {100 * dense:.2f} %"
            return 100 * (dense - point["accuracy"]), f"{point.get('options', '')}; {said}".strip("; ")

        without_training = POST_TRAINING_GOALS | ({(8, 8): INT8_GOALS[network]} if network in TASKS else {})
        for kind, goals in (("post-training", without_training), ("trained", TRAINED_GOALS)):
            for bits, goal in goals.items():
                name = f"W{bits[0]}A{bits[1]}"
                here = [p for p in mine if p["kind"] == kind and p["bits"] == name]
                # Of what is offered with bias correction: what is nearest to the dense network elsewhere.
                offered = [p for p in here if "bias correction" in p.get("options", "")]
                nearest = min(offered, key=lambda p: p["divergence"], default=None)
                # At 8 bits the default stands beside it.
                default = here[:1] if kind == "trained" or bits == (8, 8) else []
                for chosen in (*default, *([] if nearest is None else [nearest])):
                    value, note = lost(chosen)
                    if kind == "trained":
                        note += f", {chosen['images_seen']:,} images seen"
                    corrected = ", bias corrected" if bits == (8, 8) and chosen is nearest else ""
                    title = f"{network}, {name} {kind}{corrected}: {what} lost"
                    figures.append(Figure(title, value, "points", goal, "<=", note=note))
                if bits == (8, 8) and best_peer is not None and nearest is not None:
                    gain = 100 * (nearest["accuracy"] - best_peer["accuracy"])
                    note = f"{nearest['options']}: {100 * nearest['accuracy']:.2f} %; "
                    note += f"{best_peer['peer']} (best of {len(peers)}): {100 * best_peer['accuracy']:.2f} %"
                    title = f"{network}, W8A8: above ONNX Runtime's static quantization"
                    figures.append(Figure(title, gain, "points", 0.0, ">=", best_peer["peer"], note))
        for peer in peers:
            title = f"{network}, file of {peer['peer']}: sites in integers"
            share = peer["imported_integer_sites"] / peer["imported_sites"]
            agreed = f"{100 * peer['imported_agreement']:.1f} % of {peer['imported_images']}"
            note = f"answers as ONNX Runtime's: {agreed}"
            figures.append(Figure(title, share, "share", 1.0, "==", peer["peer"], note))
    return figures + artifact_figures([p for p in points if p["kind"] == "artifact"])


def options_table(points: list[dict[str, Any]]) -> list[list[str]]:
    """Everything that was tried without training, for the documentation."""
    rows = [["network", "bits", "without training", "accuracy", "divergence x 1000"]]
    dense = {p["network"]: f"{100 * p['accuracy']:.2f} %" for p in points if p["kind"] == "dense"}
    for network, accuracy in dense.items():
        rows.append([network, "float", "dense", accuracy, "0"])
        for point in points:
            if point.get("network") != network or point["kind"] not in ("post-training", "peer"):
                continue
            bits, said = point.get("bits", "W8A8"), point.get("options", point.get("peer"))
            far = f"{1000 * point['divergence']:.3g}" if "divergence" in point else ""
            rows.append([network, bits, said, f"{100 * point['accuracy']:.2f} %", far])
    return rows


def artifact_figures(points: list[dict[str, Any]]) -> list[Figure]:
    """Sites whose integers differ, and stored bytes against the policy's, by device and policy."""
    figures = []
    for point in points:
        where = f"{point['policy']}, {point['device']}"
        note = f"{point['sites']} sites, {point['images']} images"
        title = f"{where}: sites whose integers differ from the twin's"
        figures.append(Figure(title, point["differing_sites"], "sites", 0, "==", note=note))
    for point in points:
        where = f"{point['policy']}, {point['device']}"
        ratio = point["rodata_bytes"] / point["policy_bytes"]
        note = f"{point['rodata_bytes']:,} bytes of read-only data, {point['constant_bytes']:,} are constants"
        title = f"{where}: bytes in the file over bits / 8 and scales"
        figures.append(Figure(title, ratio, "x", 1.05, "<=", note=note))
    return figures


def main() -> None:
    """Run, write, print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    known = [*NETWORKS, *TASKS]
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "figures" / "quantization.json")
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--only", choices=PARTS, action="append", help="repeatable; all by default")
    parser.add_argument("--network", choices=known, action="append", help="repeatable; all by default")
    parser.add_argument("--points", type=int, default=-1, help="at most so many new ones")
    parser.add_argument("--kept", action="store_true", help="measure nothing, write the points that are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    networks = arguments.network or known
    bench = Bench(arguments.shared, arguments.cache, arguments.points, arguments.kept, networks)
    try:
        points = measure(bench, arguments.only or list(PARTS))
    except EnoughError:
        return
    settings = {
        "networks": "ResNet-20 (adapted to these images) and ResNet-18 w32, CIFAR-10 (JPEG q75); "
        "rapidocr's direction classifier, rendered lines; EfficientNet-Lite0, crops of 10 photos",
        "calibration images": CALIBRATION_IMAGES,
        "test images": {name: len(task.split.test) for name, task in bench.tasks.items()},
        "first and last site": "8 bits",
        "not measured": bench.missing,
    }
    table = {"kind": "table", "table": options_table(points)}
    write(arguments.json, "quantization", settings, figures_of(points, networks), [*points, table])


if __name__ == "__main__":
    main()
