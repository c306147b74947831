"""Dense layers pruned by vectors against the dense kernel, on this machine and on the emulated Cortex-A72.

usage: python scripts/bench/sparse.py --json docs/figures/sparse.json [--quick] [--seeds N]
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import matplotlib.pyplot as plt
import numpy as np
import torch
from figures import Figure, write
from torch import nn

from tvm_compress.model import Model
from tvm_compress.passes.params import get_params
from tvm_compress.passes.pipeline import build
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.prune_weights import PruneWeights, find_masks
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import MeasurementSettings, open_device
from tvm_compress.rpc.measure import measure
from tvm_compress.schedules import sparse
from tvm_compress.schedules.target_rules import parse_target, rules_for

LAYERS = ((1024, 1024), (512, 512), (256, 784), (128, 128))
KEPT = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
DEVICES = {"local": "host", "emulated-a72": "raspberry-pi/4b-aarch64"}


def measure_layer(device: str, out: int, inputs: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Ratios of one layer, by the share of vectors that is left; the groups go at random."""
    target = parse_target(DEVICES[device])
    lanes = rules_for(target).fp32_lanes
    torch.manual_seed(seed)
    layer = nn.Sequential(nn.Flatten(), nn.Linear(inputs, out)).eval()
    dense = Model.from_torch(layer, (torch.zeros(1, inputs, 1, 1),)).module
    (weight,) = (name for name, value in get_params(dense).items() if value.ndim == 2)
    compiler = export_fcompile(str(target.attrs.get("mtriple", "")))
    libraries = {"dense": build(dense, target).export(folder / "dense.so", compiler)}
    lists = {}
    for kept in KEPT:
        site = SitePolicy(weight_pruning_ratio=1 - kept, group=f"simd-{lanes}")
        policy = CompressionPolicy(sites={weight.removesuffix(".weight"): site}, target=DEVICES[device])
        rng = np.random.default_rng(seed)
        masks = find_masks(dense, policy, {weight: rng.uniform(size=(out, inputs))})
        # The threshold is what is measured here: it must not choose the kernel.
        with patch.object(sparse, "PAYS_BELOW", 1.0):
            pruned = PruneWeights(masks)(dense)
            rows = sparse.find_rows(get_params(pruned)[weight], rules_for(target))
            assert rows is not None
            lists[kept] = rows.values.shape[1] / inputs
            libraries[f"{kept}"] = build(pruned, target).export(folder / f"{kept}.so", compiler)
    settings = MeasurementSettings(warmup=3, repeat=30 if device == "local" else 1, min_repeat_ms=5)
    found = measure(
        open_device(device), libraries, [np.ones((1, inputs, 1, 1), np.float32)], settings, "dense"
    )
    sparse_ones = {kept: found[f"{kept}"] for kept in KEPT}
    return [
        {
            "device": device, "out": out, "inputs": inputs, "seed": seed, "kept": kept, "lanes": lanes,
            "longest_list": lists[kept], "ratio": one.ratio, "latency": one.result.value,
            "spread": one.result.spread, "dense": found["dense"].result.value, "unit": one.result.unit,
        }
        for kept, one in sparse_ones.items()
    ]  # fmt: skip


def ratio_at(data: list[dict[str, Any]], device: str, kept: float, out: int) -> float:
    """Median over the seeds."""
    return float(
        np.median([d["ratio"] for d in data if (d["device"], d["kept"], d["out"]) == (device, kept, out)])
    )


def figures_of(data: list[dict[str, Any]], layers: tuple[tuple[int, int], ...]) -> list[Figure]:
    """What a layer gains from being sparse, and that the threshold loses nothing."""
    found = []
    for device in DEVICES:
        what = "time" if device == "local" else "estimated Cortex-A72 cycles (emulated)"
        for out, inputs in layers:
            for kept in (0.1, 0.5):
                value = ratio_at(data, device, kept, out)
                name = f"{inputs} -> {out}, {kept:.0%} of the vectors: {what}, sparse over dense"
                found.append(Figure(name, value, "ratio", 1.0, "<="))
        taken = [d["ratio"] for d in data if d["device"] == device and d["longest_list"] <= sparse.PAYS_BELOW]
        name = f"largest {what} ratio, sparse over dense, where the compiler takes the sparse kernel"
        note = f"longest list of at most {sparse.PAYS_BELOW} of the inputs, {len(taken)} layers"
        found.append(Figure(name, max(taken), "ratio", 1.0, "<=", note=note))
    return found


def plot(data: list[dict[str, Any]], path: Path) -> None:
    """Ratio against the share of vectors left."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    for axis, device in zip(axes, DEVICES, strict=True):
        for out, inputs in dict.fromkeys((d["out"], d["inputs"]) for d in data):
            axis.plot(
                KEPT, [ratio_at(data, device, k, out) for k in KEPT], marker="o", label=f"{inputs} to {out}"
            )
        axis.plot([0, 1], [0, 1], color="grey", linestyle=":", label="as many as are left")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=device, xlabel="share of vectors left", xlim=(0, 0.85), ylim=(0, 1.6))
    axes[0].set_ylabel("sparse over dense")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Run, write, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("sparse.json"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    layers = LAYERS[1:2] if arguments.quick else LAYERS
    data = []
    for seed in range(arguments.seeds):
        for device in DEVICES:
            for out, inputs in layers:
                with tempfile.TemporaryDirectory() as folder:
                    data += measure_layer(device, out, inputs, seed, Path(folder))
    settings = {"quick": arguments.quick, "seeds": arguments.seeds, "threads": 1, "warmup": 3, "repeat": 30}
    write(arguments.json, "sparse", settings, figures_of(data, layers), data)
    plot(data, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
