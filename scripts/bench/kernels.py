"""What the kernels gain on whole networks: against direct ones, other runtimes, and few bits against INT8.

usage: python scripts/bench/kernels.py [--only PART ...] [--threads N ...] [--json FILE] [--quick]

Each part measures by itself and keeps what the others left in the file. Whole networks are compared with the
other runtimes that are installed (extra `bench`): timed on x86 (kernel_peers.py), counted on the emulated
Cortex-A72 (kernel_peers_a72.py). Weights are random but for the sample's: they change no time.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import kernel_build
import kernel_loops
import kernel_stack
import kernel_stages
import numpy as np
import torch
from figures import Figure, Part, parts_parser, run_parts
from kernel_networks import BITS, compile_library, make, realized
from kernel_peers import PEERS, Start, fastest, installed, start_peer, versions
from kernel_peers_a72 import count_peers

from tvm_compress.rpc.device import LatencyResult, MeasurementSettings, open_device
from tvm_compress.rpc.measure import measure
from tvm_compress.schedules import winograd

ROUNDS = 3
# Inferences of a turn: as many as take so many seconds, within the limits.
TURN_SECONDS, FEWEST_CALLS, MOST_CALLS = 0.4, 5, 40
RESNETS = ("ResNet-8", "ResNet-18 w32", "ResNet-18 w64")
SMALL = ("ResNet-8 32x32x3", "MobileNetV2 96", "MobileNetV2 224")
ON_X86 = ("ResNet-18 w64", "ResNet-18 w32", *SMALL, "ResNet-50 224")
# Those that direct kernels are compared on.
WITH_DIRECT = (*RESNETS, "ResNet-8 32x32x3")
# Most of a peer's time; of the fastest peer's, 1, where nothing stands here.
X86_GOALS = {("ResNet-18 w64", "fp32"): {"ONNX Runtime": 0.65}}
X86_GOALS[("ResNet-18 w64", "int8")] = {"ONNX Runtime": 0.95, "XNNPACK": 0.95}
# M estimated cycles, instructions only, where less is wanted than the fastest peer takes.
A72_GOALS = {("ResNet-18 w64", "fp32"): 52.0, ("ResNet-18 w64", "int8"): 42.0}
# With the waits for memory: of each kernel the larger of its instructions' cycles and its memory's.
A72_MEMORY_GOALS = {("ResNet-18 w64", "fp32"): 60.0}
# Bits of weights and activations: most of our INT8's time on x86, and M estimated cycles on the Cortex-A72.
FEW_BITS_X86 = {(1, 1): 0.22, (2, 1): 0.38, (2, 2): 0.65, (2, 4): 0.8}
FEW_BITS_A72 = {(4, 5): 36.0, (2, 5): 36.0, (2, 2): 32.0, (1, 1): 12.0}


def compile_network(name: str, scheme: str, device: str, folder: Path) -> dict[str, Path]:
    """Libraries with the kernels that the target's table chooses and, of some networks, with direct ones."""
    module = realized(*make(name), *BITS[scheme])
    libraries = {"chosen": compile_library(module, device, folder / f"{scheme}.so")}
    if name in WITH_DIRECT:
        with patch.object(winograd, "choose_algorithm", lambda *arguments: None):
            libraries["direct"] = compile_library(module, device, folder / f"{scheme}-direct.so")
    return libraries


def checked(result: LatencyResult) -> LatencyResult:
    """The result, if there is one."""
    if not result.ok:
        raise RuntimeError(str(result.error))
    return result


def take_turn(library: Path, x: np.ndarray, threads: int, calls: int) -> float:
    """Fastest of single inferences, as of the peers: seconds."""
    settings = MeasurementSettings(warmup=3, repeat=calls, min_repeat_ms=0, threads=threads)
    return min(checked(measure(open_device("local"), {"": library}, [x], settings)[""].result).samples)


def time_in_turns(
    libraries: Mapping[str, Path], peers: Mapping[str, Start], x: np.ndarray, threads: int
) -> dict[str, list[float]]:
    """Fastest seconds of each round. They take turns, never at once: threads that wait spin."""
    first = next(iter(libraries.values()))
    calls = int(TURN_SECONDS / take_turn(first, x, threads, 1))
    calls = max(FEWEST_CALLS, min(MOST_CALLS, calls))
    samples: dict[str, list[float]] = {name: [] for name in (*libraries, *peers)}
    for _ in range(ROUNDS):
        for name, library in libraries.items():
            samples[name].append(take_turn(library, x, threads, calls))
        for name, start in peers.items():
            samples[name].append(fastest(start(threads), calls))
    return samples


def on_x86(scheme: str, arguments: argparse.Namespace) -> Part:
    """Networks on this machine."""
    figures, rows = [], []
    for name in SMALL[:1] if arguments.quick else ON_X86:
        network, x = make(name)
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            libraries = compile_network(name, scheme, "local", folder)
            if scheme == "int8" and name in WITH_DIRECT:
                libraries["fp32"] = compile_library(realized(network, x), "local", folder / "fp32.so")
            peers = {peer: start_peer(peer, network, x, scheme, folder) for peer in installed(scheme)}
            for threads in arguments.threads:
                samples = time_in_turns(libraries, peers, x, threads)
                row = {"network": name, "threads": threads, "samples": samples}
                rows.append(row)
                print(json.dumps(row), flush=True)
                figures += x86_figures(name, scheme, threads, {k: min(v) for k, v in samples.items()})
    return figures, {"runs": rows}


def x86_figures(name: str, scheme: str, threads: int, seconds: Mapping[str, float]) -> list[Figure]:
    """Ours over peers with goals of their own, or the fastest peer, and over other kernels of ours."""
    goals = X86_GOALS.get((name, scheme), {})
    peers = [peer for peer in PEERS if peer in seconds]
    others = {peer: (peer, goals[peer]) for peer in peers if peer in goals}
    if peers and not others:
        best = min(peers, key=lambda peer: seconds[peer])
        others[best] = (f"the fastest peer ({best})", 1.0)
    if threads == 1:
        known = {"direct": ("direct ones", 1.0), "fp32": ("those of fp32", 1.0)}
        others |= {kernels: known[kernels] for kernels in known if kernels in seconds}
    return [
        Figure(
            f"x86 {scheme}, {name}, {threads} thread{'s' * (threads > 1)}: chosen kernels over {described}",
            seconds["chosen"] / seconds[other], "of the time", goal, "<=", versions(other),
            f"{1e3 * seconds['chosen']:.3g} ms and {1e3 * seconds[other]:.3g} ms",
        )
        for other, (described, goal) in others.items()
    ]  # fmt: skip


def few_bits_x86(arguments: argparse.Namespace) -> Part:
    """ResNet-18 with few bits, first and last layer INT8, beside INT8 with the kernels chosen."""
    network, x = make("ResNet-18 w32" if arguments.quick else "ResNet-18 w64")
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        libraries = {
            bits_name(bits): compile_library(
                realized(network, x, *bits), "local", Path(folder) / f"{bits_name(bits)}.so"
            )
            for bits in (BITS["int8"], *FEW_BITS_X86)
        }
        samples = time_in_turns(libraries, {}, x, 1)
    seconds = {kernels: min(values) for kernels, values in samples.items()}
    for bits, goal in FEW_BITS_X86.items():
        found, int8 = seconds[bits_name(bits)], seconds[bits_name(BITS["int8"])]
        figures.append(
            Figure(
                f"x86 ResNet-18 w64 {bits_name(bits)}, 1 thread: over our INT8",
                found / int8, "of the time", goal, "<=",
                note=f"{1e3 * found:.3g} ms and {1e3 * int8:.3g} ms",
            )
        )  # fmt: skip
    return figures, {"samples": samples}


def bits_name(bits: tuple[int, int]) -> str:
    """Such as W2A5, for weights of 2 and activations of 5 bits."""
    return "W{}A{}".format(*bits)


def count_cycles(libraries: Mapping[str, Path], x: np.ndarray) -> dict[str, LatencyResult]:
    """Estimated Cortex-A72 cycles of libraries, by kernel."""
    found = measure(open_device("emulated-a72"), libraries, [x])
    return {name: checked(one.result) for name, one in found.items()}


def summed(result: LatencyResult, name: str) -> float:
    """Sum over all kernels of a part of their cycles."""
    return sum(part[name] for part in result.breakdown.values())


def on_a72(names: Sequence[str], schemes: Sequence[str], arguments: argparse.Namespace) -> Part:
    """Networks on the emulated Cortex-A72."""
    figures, rows = [], []
    for name, scheme in product(names[: 1 if arguments.quick else None], schemes):
        network, x = make(name)
        with tempfile.TemporaryDirectory() as folder:
            found = count_cycles(compile_network(name, scheme, "emulated-a72", Path(folder)), x)
        chosen = found["chosen"]
        peers = count_peers(network, x, scheme)
        row: dict[str, Any] = {"network": name, "scheme": scheme}
        row["cycles"] = {kernels: result.value for kernels, result in found.items()}
        row["memory_bound"] = sum(
            part["cycles"]
            for part in chosen.breakdown.values()
            if part["memory_cycles"] > part["compute_cycles"]
        )
        row |= {kind: summed(chosen, kind) for kind in ("compute_cycles", "memory_cycles")}
        row["peers"] = {peer: cost.to_dict() for peer, cost in peers.items()}
        rows.append(row)
        print(json.dumps(row), flush=True)
        figures += a72_figures(row)
    return figures, {"runs": rows}


def a72_figures(row: Mapping[str, Any]) -> list[Figure]:
    """Chosen kernels over direct ones, and beside peers: instructions alone, and with waits for memory."""
    name, scheme, cycles = row["network"], row["scheme"], row["cycles"]
    figures = []
    if "direct" in cycles:
        millions = (f"{cycles[kernels] / 1e6:.3g} M" for kernels in ("chosen", "direct"))
        figures.append(
            Figure(
                f"Cortex-A72 {scheme}, {name}: chosen kernels over direct ones",
                cycles["chosen"] / cycles["direct"], "of the cycles", 1.0, "<=",
                note=f"{' and '.join(millions)} estimated cycles (emulated); "
                f"{row['memory_bound'] / cycles['chosen']:.0%} of them in kernels that wait for memory",
            )
        )  # fmt: skip
    # All kernels count as one where it is not known of a peer where each of its kernels ends.
    terms = {
        "instructions only": ("compute_cycles", row["compute_cycles"], A72_GOALS),
        "with waits for memory, all kernels as one": (
            "cycles",
            max(row["compute_cycles"], row["memory_cycles"]),
            {},
        ),
        "with waits for memory, kernel by kernel": ("cycles_by_layer", cycles["chosen"], A72_MEMORY_GOALS),
    }
    for title, (kind, value, goals) in terms.items():
        others = {peer: cost[kind] / 1e6 for peer, cost in row["peers"].items() if kind in cost}
        best = min(others, key=lambda peer: others[peer], default="")
        goal = goals.get((name, scheme), others.get(best))
        if goal is None:
            continue
        figures.append(
            Figure(
                f"Cortex-A72 {scheme}, {name}: {title}",
                value / 1e6, "M estimated cycles (emulated)", goal, "<=", versions(best),
                "; ".join(f"{peer} {others[peer]:.3g} M" for peer in sorted(others, key=others.__getitem__)),
            )
        )  # fmt: skip
    return figures


def few_bits_a72(arguments: argparse.Namespace) -> Part:
    """ResNet-18 with few bits, first and last layer INT8, on the emulated Cortex-A72."""
    network, x = make("ResNet-18 w32" if arguments.quick else "ResNet-18 w64")
    with tempfile.TemporaryDirectory() as folder:
        libraries = {
            bits_name(bits): compile_library(
                realized(network, x, *bits), "emulated-a72", Path(folder) / f"{bits_name(bits)}.so"
            )
            for bits in FEW_BITS_A72
        }
        found = count_cycles(libraries, x)
    figures = [
        Figure(
            f"Cortex-A72 ResNet-18 w64 {bits_name(bits)}, first and last layer INT8",
            found[bits_name(bits)].value / 1e6, "M estimated cycles (emulated)", goal, "<=",
        )
        for bits, goal in FEW_BITS_A72.items()
    ]  # fmt: skip
    return figures, {"breakdown": {name: result.breakdown for name, result in found.items()}}


PARTS: dict[str, Callable[[argparse.Namespace], Part]] = {
    "fp32-x86": partial(on_x86, "fp32"),
    "fp32-a72": partial(on_a72, RESNETS, ("fp32",)),
    "int8-x86": partial(on_x86, "int8"),
    "int8-a72": partial(on_a72, RESNETS, ("int8",)),
    "small-a72": partial(on_a72, SMALL, ("fp32", "int8")),
    "few-bits-x86": few_bits_x86,
    "few-bits-a72": few_bits_a72,
    "loops-a72": kernel_loops.part,
    "stages-a72": kernel_stages.part,
    "stack": kernel_stack.part,
    "build": kernel_build.part,
}


def main() -> None:
    """Run the parts that are asked for, write, print."""
    parser = parts_parser(__doc__, "kernels", PARTS)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2], help="2 needs an idle machine")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"rounds": ROUNDS, "quick": arguments.quick}
    run_parts(arguments, "kernels", settings, PARTS)


if __name__ == "__main__":
    main()
