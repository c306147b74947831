"""Figure 12 of the TOCO paper: against the pruning agent at equal latency, on the embedded sample."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from figures import Figure, Part
from toco_curves import arrays, finished, timed

from tvm_compress.compression import compress_model, compressed_model
from tvm_compress.data.dataset import Split
from tvm_compress.data.load import load_data
from tvm_compress.metrics.cost import macs
from tvm_compress.model import Model, load_model
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.prune_channels import PruneChannels
from tvm_compress.passes.sites import find_sites
from tvm_compress.tolerance.algorithm1 import Algorithm1
from tvm_compress.tolerance.compression_models import Pruning
from tvm_compress.tolerance.grouping import Grouping
from tvm_compress.tolerance.settings import TocoSettings
from tvm_compress.twin import Twin

SAMPLE = "sample:resnet8-fashion"
# The library is timed again after this share of the multiplications has gone.
STEP = 0.1
# Of fine-tuning, as the search's default for what it has chosen.
EPOCHS = 6


def figure12(seeds: int, folder: Path) -> Part:
    """TOCO against the pruning agent at equal latency, on the embedded sample."""
    del seeds, folder
    found = finished("figure12", _figure12)
    return [
        Figure(
            "Figure 12: accuracy, TOCO less the pruning agent, at equal latency",
            100 * (found["toco"]["accuracy"] - found["agent"]["accuracy"]),
            "points",
            -0.5,
            ">=",
            note=f"ratios {found['toco']['ratio']:.3f} and {found['agent']['ratio']:.3f}, "
            f"{found['toco']['images']} test images",
        ),
        Figure(
            "Figure 12: time, TOCO over the pruning agent",
            found["toco"]["seconds"] / found["agent"]["seconds"],
            "ratio",
            0.25,
            "<=",
            note=f"{found['toco']['seconds']:.0f} s and {found['agent']['seconds']:.0f} s, with fine-tuning",
        ),
    ], found


def _figure12() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        words = ["search", SAMPLE, "--agent", "pruning", "--budget", "0.5", "--episodes", "30"]
        words += ["--study", "agent", "--studies", folder, "--json"]
        command = [sys.executable, "-c", "from tvm_compress.cli.main import entry; entry()", *words]
        start = time.perf_counter()
        done = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        agent = {
            "seconds": time.perf_counter() - start,
            "ratio": done["ratio"],
            "accuracy": done["best"]["accuracy"],
        }
    model = load_model(SAMPLE)
    split = load_data(SAMPLE, model, 0)
    start = time.perf_counter()
    policy = _channels_of_equal_latency(model, split, agent["ratio"])
    tuned = compress_model(model, policy, split, finetune_epochs=EPOCHS)
    ours = {"seconds": time.perf_counter() - start, "images": len(split.test)}
    ours["accuracy"] = Twin(tuned.module).accuracy(split.test.normalized(), split.test.y)
    ours |= timed({"dense": model, "pruned": tuned}, "pruned", "host", "local")
    return {"agent": agent, "toco": ours}


def _channels_of_equal_latency(model: Model, split: Split, ratio: float) -> CompressionPolicy:
    """Let TOCO prune channels, in large steps, until the library is as fast as asked for.

    What goes is what is multiplied most often; the loss may grow as far as that takes, fine-tuning follows.
    """
    settings = TocoSettings(
        group="channel",
        worth="operations",
        loss_bound=1e4,
        sigma=2.0,
        step=0.2,
        iterations=200,
        images=512,
        batches=2,
    )
    grouping = Grouping(model.module, settings.group, tuple(Twin(model.module).trainable()))
    train, _ = arrays(split, settings)
    loop = Algorithm1(Twin(model.module), Pruning(grouping, by_operations=True), *train, settings)
    state, looked_at = loop.start(), float(macs(find_sites(model.module)))
    policy = CompressionPolicy()
    for iteration in loop.run(state):
        if not iteration.accepted:
            continue
        masks = {name: weight != 0 for name, weight in state.compressed.weights.items()}
        kept = grouping.kept_channels(masks, settings.rounding, state.importance.values())
        tried = _policy(grouping, kept)
        module = PruneChannels(tried)(model.module)
        operations = macs(find_sites(module))
        if operations > (1 - STEP) * looked_at:
            continue
        looked_at, policy = operations, tried
        pruned = compressed_model(model, policy, module)
        if timed({"dense": model, "pruned": pruned}, "pruned", "host", "local")["ratio"] <= ratio:
            break
    return policy


def _policy(grouping: Grouping, kept: Mapping[str, tuple[int, ...]]) -> CompressionPolicy:
    """Policy that keeps these channels of each coupled set."""
    return CompressionPolicy(
        sites={
            site: SitePolicy(kept=channels, group="channel")
            for name, channels in kept.items()
            for site in grouping.producers(name)
        }
    )
