"""What the kernels gain on whole networks: against the direct kernels, and against other runtimes.

usage: python scripts/bench/kernels.py [--only PART ...] [--threads N ...] [--json FILE] [--quick]

Each part measures by itself and keeps what the others left in the file. `fp32-x86` compares with ONNX Runtime
where that is installed (1.22.1 was used). Weights are random but for the sample's: they change no time.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from figures import Figure, write_parts
from networks import ResNet18

from tvm_compress.model import Model
from tvm_compress.passes.pipeline import build
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


def compile_both(
    module: torch.nn.Module, shape: tuple[int, ...], device: str, folder: Path
) -> dict[str, Path]:
    """Libraries with the direct kernels alone, and with those that the target's table chooses."""
    target = parse_target(TARGETS[device])
    relax_module = Model.from_torch(module, (torch.zeros(shape),)).module
    compiler = export_fcompile(str(target.attrs.get("mtriple", "")))
    libraries = {}
    for name in ("direct", "chosen"):
        direct = patch.object(winograd, "choose_algorithm", lambda *arguments: None)
        with direct if name == "direct" else nullcontext():
            libraries[name] = build(relax_module, target).export(folder / f"{name}.so", compiler)
    return libraries


def onnx_runtime(
    module: torch.nn.Module, x: np.ndarray, threads: int, folder: Path
) -> Callable[[], float] | None:
    """Function that starts ONNX Runtime, times its inferences and ends it: seconds. None without it."""
    try:
        import onnxruntime
    except ImportError:
        return None
    path = folder / "network.onnx"
    torch.onnx.export(module, (torch.from_numpy(x),), path, dynamo=True, external_data=False, verbose=False)

    def sample() -> float:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: x}
        times = []
        for _ in range(10 + CALLS):
            start = time.perf_counter()
            session.run(None, feed)
            times.append(time.perf_counter() - start)
        return min(times[10:])

    return sample


def time_network(module: torch.nn.Module, shape: tuple[int, ...], threads: int) -> dict[str, Any]:
    """Fastest seconds of each round, of both libraries and of ONNX Runtime.

    They take turns: never at once, as threads that wait spin.
    """
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    # Single inferences, as of ONNX Runtime.
    settings = MeasurementSettings(warmup=10, repeat=CALLS, min_repeat_ms=0, threads=threads)
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        libraries = compile_both(module, shape, "local", folder)
        peer = onnx_runtime(module, x, threads, folder)
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


def fp32_x86(arguments: argparse.Namespace) -> Part:
    """Networks in fp32 on this machine."""
    figures, rows = [], []
    for name, (module, shape) in networks(arguments.quick).items():
        for threads in arguments.threads:
            row = {"network": name} | time_network(module, shape, threads)
            rows.append(row)
            print(json.dumps(row), flush=True)
            milliseconds = {k: f"{1e3 * min(v):.3g} ms" for k, v in row["samples"].items()}
            for reference, peer in (("direct", ""), ("ONNX Runtime", _onnx_runtime_version())):
                if reference in row["samples"]:
                    figures.append(
                        Figure(
                            f"x86 fp32, {name}, {threads} thread{'s' * (threads > 1)}: chosen kernels over "
                            f"{'direct ones' if reference == 'direct' else reference}",
                            ratio(row["samples"], reference),
                            "of the time",
                            1.0,
                            "<=",
                            peer,
                            f"{milliseconds['chosen']} and {milliseconds[reference]}",
                        )
                    )
    return figures, {"runs": rows}


def _onnx_runtime_version() -> str:
    try:
        import onnxruntime
    except ImportError:
        return ""
    return f"ONNX Runtime {onnxruntime.__version__}"


def fp32_a72(arguments: argparse.Namespace) -> Part:
    """Networks in fp32 on the emulated Cortex-A72."""
    figures, rows = [], []
    for name, (module, shape) in networks(arguments.quick).items():
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        with tempfile.TemporaryDirectory() as folder:
            libraries = compile_both(module, shape, "emulated-a72", Path(folder))
            found = measure(open_device("emulated-a72"), libraries, [x], reference="direct")
        if not all(one.result.ok for one in found.values()):
            raise RuntimeError(f"{name}: {[one.result.error for one in found.values()]}")
        cycles = {kernels: one.result.value for kernels, one in found.items()}
        chosen = found["chosen"].result.breakdown.values()
        bound = sum(part["cycles"] for part in chosen if part["memory_cycles"] > part["compute_cycles"])
        row = {"network": name, "cycles": cycles, "memory_bound": bound}
        rows.append(row)
        print(json.dumps(row), flush=True)
        note = (
            f"{cycles['chosen'] / 1e6:.3g} M and {cycles['direct'] / 1e6:.3g} M estimated cycles (emulated)"
        )
        share = f"{bound / cycles['chosen']:.0%} of them in kernels that wait for memory"
        figures.append(
            Figure(
                f"Cortex-A72 fp32, {name}: chosen kernels over direct ones",
                cycles["chosen"] / cycles["direct"], "of the cycles", 1.0, "<=", note=f"{note}; {share}",
            )
        )  # fmt: skip
    return figures, {"runs": rows}


PARTS: dict[str, Callable[[argparse.Namespace], Part]] = {"fp32-x86": fp32_x86, "fp32-a72": fp32_a72}


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
