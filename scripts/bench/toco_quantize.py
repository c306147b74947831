"""Figure 6 of the TOCO paper: size against accuracy of fine-grained quantization, beside binary networks."""

from pathlib import Path
from typing import Any

import numpy as np
from figures import Figure, Part
from toco_curves import (
    FINETUNE_EPOCHS,
    FINETUNE_IMAGES,
    PRUNE,
    arrays,
    finished,
    network,
    plot_curves,
    prune_run,
    toco_curve,
    tune_pruned,
)
from train import load_network

from tvm_compress.passes.params import get_params, set_params
from tvm_compress.passes.sites import find_sites
from tvm_compress.tolerance.bits import quantize_uniform
from tvm_compress.tolerance.compression_models import Quantization
from tvm_compress.tolerance.settings import TocoSettings
from tvm_compress.twin import Twin


def figure6(seeds: int, folder: Path) -> Part:
    """Size against accuracy of fine-grained quantization, beside networks trained with binary weights."""
    del seeds
    figures, data = [], {}
    for name in ("lenet5-fashion", "vgg-simple"):
        data[name] = finished(f"figure6-{name}", lambda name=name: _quantized(name))
        data[name] |= finished(f"figure6-pruned-{name}", lambda name=name: _pruned_and_quantized(name))
        for binary in ("binaryconnect", "bnn"):
            record = load_network(f"{name}-{binary}")[1]
            accuracy = 100 * record["test_accuracy"]
            data[name][binary] = [[1.0, accuracy]]
            above = max(point[1] for point in data[name]["pruned, tuned, quantized"] if point[0] <= 1)
            figures.append(
                Figure(
                    f"Figure 6, {name}: front at 1 bit per weight or less, above {binary}",
                    above - accuracy,
                    "points",
                    0.0,
                    ">=",
                    note=f"{above:.2f} against {accuracy:.2f} %; dense "
                    f"{data[name]['element'][0][1]:.2f} %; masks and codebooks counted",
                )
            )
        plot_curves(
            folder / f"toco-figure6-{name}.png", {k: [v] for k, v in data[name].items()}, name, 40, bits=True
        )
    return figures, {"networks": data}


def _quantized(name: str) -> dict[str, Any]:
    """Curves of (bits per weight, accuracy %)."""
    model, split = network(name)
    params = get_params(model.module)
    weights = {site.weight: params[site.weight] for site in find_sites(model.module)}
    found: dict[str, Any] = {}
    for group, percentile in (("element", 0.0), ("filter", 0.0), ("layer", 0.0), ("layer", 50.0)):
        settings = TocoSettings(
            objective="quantize",
            group=group,
            percentile=percentile,
            loss_bound=4.0,
            sigma=1.1,
            iterations=60,
            trust_radius=1.0,
        )
        train, test = arrays(split, settings)
        compression = Quantization(weights, group, percentile)
        label = group if not percentile else f"{group}, percentile {percentile:g}"
        found[label] = toco_curve(model.module, compression, settings, train, test, 0.1).curve
    return found


def _pruned_and_quantized(name: str) -> dict[str, Any]:
    """Both of TOCO's objectives, one after the other: zeros cost their place in a mask only."""
    model, split = network(name)
    # What is lost here comes back by fine-tuning: far enough for the highest rate.
    run = prune_run(model, split, PRUNE, lost=70, step=0.02)
    _, test = arrays(split, PRUNE)
    few = split.train.subset(FINETUNE_IMAGES, np.random.default_rng(0))
    points = []
    for rate in (0.8, 0.9, 0.95):
        _, weights = min(run.states, key=lambda state: abs(state[0] - rate))
        masks = {name: value != 0 for name, value in weights.items()}
        tuned = tune_pruned(model.module, masks, few, 2 * FINETUNE_EPOCHS)
        params = get_params(tuned)
        for bits in (2, 3, 4, 5):
            quantized = {name: _rounded(params[name], mask, bits) for name, mask in masks.items()}
            points.append(
                (
                    _stored_bits(masks, bits),
                    100 * Twin(set_params(tuned, quantized)).accuracy(*test, 1000),
                )
            )
    return {"pruned, tuned, quantized": sorted(points)}


def _rounded(weight: np.ndarray, mask: np.ndarray, bits: int) -> np.ndarray:
    """Weights that are left, in the levels of TOCO's uniform quantizer between their extremes."""
    result = np.zeros_like(weight)
    left = weight[mask]
    result[mask] = quantize_uniform(left, np.full(left.shape, bits))
    return result


def _stored_bits(masks: dict[str, np.ndarray], bits: int) -> float:
    """Bits per weight: those of the weights left, the masks' entropy, and two fp32 numbers for a layer."""
    total = 0.0
    for mask in masks.values():
        share = np.clip(mask.mean(), 1e-9, 1 - 1e-9)
        entropy = -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
        total += mask.size * (share * bits + entropy) + 64
    return total / sum(mask.size for mask in masks.values())
