"""Figure 12 of the TOCO paper: against the pruning agent at equal latency, on the embedded sample."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from figures import Figure
from toco_curves import Part, finished, timed

from tvm_compress.compression import compress_model, compressed_model
from tvm_compress.data.dataset import Split
from tvm_compress.data.load import load_data
from tvm_compress.model import Model, load_model
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.tolerance.compress import toco
from tvm_compress.tolerance.settings import TocoSettings
from tvm_compress.twin import Twin

SAMPLE = "sample:resnet8-fashion"


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
    tuned = compress_model(model, policy, split, finetune_epochs=10)
    ours = {"seconds": time.perf_counter() - start, "images": len(split.test)}
    ours["accuracy"] = Twin(tuned.module).accuracy(split.test.normalized(), split.test.y)
    ours |= timed({"dense": model, "pruned": tuned}, "pruned", "host", "local")
    return {"agent": agent, "toco": ours}


def _channels_of_equal_latency(model: Model, split: Split, ratio: float) -> CompressionPolicy:
    """TOCO with rising loss bounds until the library is as fast as asked for."""
    for bound in (1.2, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0):
        settings = TocoSettings(group="channel", loss_bound=bound, sigma=1.1, images=1024)
        result = toco(model.module, split, settings)
        pruned = compressed_model(model, result.policy, result.module)
        if timed({"dense": model, "pruned": pruned}, "pruned", "host", "local")["ratio"] <= ratio:
            break
    return result.policy
