"""What the kernels gain on whole networks: against the direct kernels, and against other runtimes.

usage: python scripts/bench/kernels.py [--only PART ...] [--threads N ...] [--json FILE] [--quick]

Each part measures by itself and keeps what the others left in the file. `fp32-x86` and `int8-x86` compare
with ONNX Runtime where that is installed (1.22.1 was used). Weights are random but for the sample's: they
change no time.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import kernel_peers
import numpy as np
import torch
import tvm
from figures import Figure, write_parts
from networks import ResNet18

from tvm_compress.calibration import calibrate
from tvm_compress.compression import uniform_policy
from tvm_compress.compressor import realize
from tvm_compress.model import Model
from tvm_compress.passes.pipeline import build, compress
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import MeasurementSettings, open_device
from tvm_compress.rpc.measure import measure
from tvm_compress.samples.load import sample_module
from tvm_compress.schedules import winograd
from tvm_compress.schedules.target_rules import parse_target

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {"local": "host", "emulated-a72": "raspberry-pi/4b-aarch64"}
ROUNDS = 5
# Inferences of a round.
CALLS = 40
# M estimated cycles of ncnn, the fastest peer, counted with the same emulator and block model: instructions
# only. And what is wanted of ours.
NCNN = {("ResNet-18 w32", "fp32"): 18.6, ("ResNet-18 w32", "int8"): 13.4}
NCNN |= {("ResNet-18 w64", "fp32"): 58.9, ("ResNet-18 w64", "int8"): 45.6}
GOALS = NCNN | {("ResNet-18 w64", "fp32"): 52.0, ("ResNet-18 w64", "int8"): 42.0}
Part = tuple[list[Figure], dict[str, Any]]


def networks(quick: bool) -> dict[str, tuple[torch.nn.Module, tuple[int, ...]]]:
    """The networks with the shapes of their inputs."""
    found: dict[str, tuple[torch.nn.Module, tuple[int, ...]]] = {
        "ResNet-8": (sample_module("resnet8-fashion"), (1, 1, 28, 28))
    }
    for width in (32,) if quick else (32, 64):
        torch.manual_seed(0)
        found[f"ResNet-18 w{width}"] = (ResNet18(width).eval(), (1, 3, 32, 32))
    return found


def network_module(network: torch.nn.Module, x: np.ndarray, scheme: str) -> tvm.IRModule:
    """The network in Relax, ready for the kernels."""
    model = Model.from_torch(network, (torch.zeros(x.shape),))
    if scheme == "fp32":
        return model.module
    policy = uniform_policy(model, target="host", weight_bits=8, activation_bits=8)
    return realize(compress(model.module, policy, calibration=lambda module: calibrate(module, x)))


def compile_both(module: tvm.IRModule, device: str, folder: Path) -> dict[str, Path]:
    """Libraries with the direct kernels alone, and with those that the target's table chooses."""
    target = parse_target(TARGETS[device])
    compiler = export_fcompile(str(target.attrs.get("mtriple", "")))
    libraries = {}
    for name in ("direct", "chosen"):
        direct = patch.object(winograd, "choose_algorithm", lambda *arguments: None)
        with direct if name == "direct" else nullcontext():
            libraries[name] = build(module, target).export(folder / f"{name}.so", compiler)
    return libraries


def time_network(network: torch.nn.Module, x: np.ndarray, scheme: str, threads: int) -> dict[str, Any]:
    """Fastest seconds of each round, of both libraries, of fp32 beside INT8, and of ONNX Runtime.

    They take turns: never at once, as threads that wait spin.
    """
    # Single inferences, as of ONNX Runtime.
    settings = MeasurementSettings(warmup=10, repeat=CALLS, min_repeat_ms=0, threads=threads)
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        libraries = compile_both(network_module(network, x, scheme), "local", folder)
        if scheme == "int8":
            (folder / "fp32").mkdir()
            libraries["fp32"] = compile_both(network_module(network, x, "fp32"), "local", folder / "fp32")[
                "chosen"
            ]
        peer = kernel_peers.sampler(network, x, scheme, threads, CALLS, folder)
        for _ in range(ROUNDS):
            for kernels, one in measure(open_device("local"), libraries, [x], settings).items():
                if not one.result.ok:
                    raise RuntimeError(f"{kernels}: {one.result.error}")
                samples.setdefault(kernels, []).append(min(one.result.samples))
            if peer is not None:
                samples.setdefault("ONNX Runtime", []).append(peer())
    return {"threads": threads, "samples": samples}


def ratio(samples: dict[str, list[float]], reference: str) -> float:
    """Fastest time of the chosen kernels over the reference's: other work only adds to times."""
    return min(samples["chosen"]) / min(samples[reference])


def on_x86(scheme: str, arguments: argparse.Namespace) -> Part:
    """Networks on this machine."""
    figures, rows = [], []
    references = {"direct": ("direct ones", ""), "fp32": ("those of fp32", "")}
    references["ONNX Runtime"] = ("ONNX Runtime", kernel_peers.version())
    for name, (network, shape) in networks(arguments.quick).items():
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        for threads in arguments.threads:
            row = {"network": name} | time_network(network, x, scheme, threads)
            rows.append(row)
            print(json.dumps(row), flush=True)
            milliseconds = {k: f"{1e3 * min(v):.3g} ms" for k, v in row["samples"].items()}
            what = f"x86 {scheme}, {name}, {threads} thread{'s' * (threads > 1)}: chosen kernels over"
            figures += [
                Figure(
                    f"{what} {described}",
                    ratio(row["samples"], reference),
                    "of the time",
                    1.0,
                    "<=",
                    peer,
                    f"{milliseconds['chosen']} and {milliseconds[reference]}",
                )
                for reference, (described, peer) in references.items()
                if reference in row["samples"]
            ]
    return figures, {"runs": rows}


def on_a72(scheme: str, arguments: argparse.Namespace) -> Part:
    """Networks on the emulated Cortex-A72."""
    figures, rows = [], []
    for name, (network, shape) in networks(arguments.quick).items():
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        with tempfile.TemporaryDirectory() as folder:
            libraries = compile_both(network_module(network, x, scheme), "emulated-a72", Path(folder))
            found = measure(open_device("emulated-a72"), libraries, [x], reference="direct")
        if not all(one.result.ok for one in found.values()):
            raise RuntimeError(f"{name}: {[one.result.error for one in found.values()]}")
        cycles = {kernels: one.result.value for kernels, one in found.items()}
        chosen = found["chosen"].result.breakdown.values()
        bound = sum(part["cycles"] for part in chosen if part["memory_cycles"] > part["compute_cycles"])
        compute = sum(part["compute_cycles"] for part in chosen)
        row = {"network": name, "cycles": cycles, "memory_bound": bound, "compute_cycles": compute}
        rows.append(row)
        print(json.dumps(row), flush=True)
        note = (
            f"{cycles['chosen'] / 1e6:.3g} M and {cycles['direct'] / 1e6:.3g} M estimated cycles (emulated); "
            f"{bound / cycles['chosen']:.0%} of them in kernels that wait for memory"
        )
        figures.append(
            Figure(
                f"Cortex-A72 {scheme}, {name}: chosen kernels over direct ones",
                cycles["chosen"] / cycles["direct"], "of the cycles", 1.0, "<=", note=note,
            )
        )  # fmt: skip
        if (name, scheme) in NCNN:
            figures.append(
                Figure(
                    f"Cortex-A72 {scheme}, {name}: instructions only",
                    compute / 1e6, "M estimated cycles (emulated)", GOALS[name, scheme], "<=",
                    "ncnn, counted with the same emulator", f"ncnn {NCNN[name, scheme]} M",
                )
            )  # fmt: skip
    return figures, {"runs": rows}


PARTS: dict[str, Callable[[argparse.Namespace], Part]] = {
    f"{scheme}-{machine}": partial(measured, scheme)
    for scheme in ("fp32", "int8")
    for machine, measured in (("x86", on_x86), ("a72", on_a72))
}


def main() -> None:
    """Run the parts that are asked for, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "figures" / "kernels.json")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="2 needs an idle machine")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write_parts(
        arguments.json,
        "kernels",
        {"rounds": ROUNDS, "quick": arguments.quick},
        list(PARTS),
        lambda part: PARTS[part](arguments),
        arguments.only,
    )


if __name__ == "__main__":
    main()
