"""Post-training quantization of ResNet-18 w32, CIFAR-10 (JPEG q75), by how weights are rounded.

usage: python scripts/bench/quantization.py [--json FILE] [--shared FOLDER] [--cache FOLDER]

Nothing is trained: 512 calibration images without labels give ranges and the rounding of weights. Accuracy is
that of the integers, on 5,000 test images. Each point is kept in the cache folder.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from bench_data import ROOT, cache_folder, cifar10, kept
from figures import Figure, write
from train import as_model, load_resnet18

from tvm_compress.compression import compress_model, uniform_policy
from tvm_compress.compressor import PostTraining, realize
from tvm_compress.data.dataset import Split
from tvm_compress.model import Model
from tvm_compress.twin import Twin
from tvm_compress.weight_rounding import METHODS

BITS = ((8, 8), (6, 6), (4, 6), (4, 4), (3, 6), (3, 3), (2, 6))
IMAGES = 512
# Points that may be lost without training (issue of quantization), by (weight, activation) bits.
GOALS = {(8, 8): 0.3}


def point(model: Model, split: Split, bits: tuple[int, int], method: str) -> dict[str, Any]:
    """Accuracy of one policy for all sites that can be so; the first and last stay as their kernels allow."""
    policy = uniform_policy(model, target="host", weight_bits=bits[0], activation_bits=bits[1])
    start = time.process_time()
    compressed = compress_model(
        model, policy, split, images=IMAGES, post_training=PostTraining(weight_rounding=method)
    )
    seconds = time.process_time() - start
    twin = Twin(realize(compressed.module))
    accuracy = twin.accuracy(split.test.normalized(), split.test.y)
    found = {"weight_bits": bits[0], "activation_bits": bits[1], "rounding": method}
    return {**found, "accuracy": accuracy, "processor_seconds": seconds}


def figures_of(dense: float, points: list[dict[str, Any]]) -> list[Figure]:
    """Points lost by the best rounding, and what rounding for the outputs gains over the nearest."""
    figures = []
    for weight_bits, activation_bits in BITS:
        here = {
            p["rounding"]: p["accuracy"]
            for p in points
            if (p["weight_bits"], p["activation_bits"]) == (weight_bits, activation_bits)
        }
        name = f"W{weight_bits}A{activation_bits}"
        if (weight_bits, activation_bits) in GOALS:
            lost, goal = 100 * (dense - here["nearest"]), GOALS[weight_bits, activation_bits]
            figures.append(Figure(f"{name}: accuracy lost, to the nearest", lost, "points", goal, "<="))
        for method in METHODS[1:]:
            gain = 100 * (here[method] - here["nearest"])
            note = f"{100 * here['nearest']:.2f} to {100 * here[method]:.2f} %; dense {100 * dense:.2f} %"
            figures.append(Figure(f"{name}: gained by {method}", gain, "points", 0.0, ">=", note=note))
    return figures


def main() -> None:
    """Run, write, print."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "figures" / "quantization.json")
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    split = cifar10(arguments.shared, arguments.cache)
    model = as_model(load_resnet18(arguments.shared), "cifar10")
    folder = cache_folder(arguments.cache) / "quantization"
    x, y = split.test.normalized(), split.test.y
    dense = kept(folder / "dense.json", lambda: {"accuracy": Twin(model.module).accuracy(x, y)})["accuracy"]
    points = [
        kept(
            folder / f"w{bits[0]}a{bits[1]}-{method}.json",
            lambda bits=bits, method=method: point(model, split, bits, method),
        )
        for bits in BITS
        for method in METHODS
    ]
    settings = {"network": "ResNet-18 w32, CIFAR-10 (JPEG q75)", "test images": len(y), "images": IMAGES}
    write(arguments.json, "quantization", settings, figures_of(dense, points), points)


if __name__ == "__main__":
    main()
