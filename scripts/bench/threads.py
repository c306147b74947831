"""How networks scale with threads: the share of each thread, counted from the loops, and times of 1 and 2.

usage: python scripts/bench/threads.py [--only PART ...] [--json FILE] [--quick]

`balance` counts and repeats to the bit. `x86` measures on this machine: as far as its cores go.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
from figures import Figure, Part, parts_parser, run_parts
from kernel_networks import BITS, make, realized

from tvm_compress.passes.pipeline import build, lower
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import MeasurementSettings, open_device
from tvm_compress.schedules.apply import kernel_infos
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.schedules.threads import kernel_work, written_lines

RPI4 = "raspberry-pi/4b-aarch64"
THREADS = (1, 2, 3, 4)
ROUNDS = 7
# Largest share of a thread over the mean that is wanted of a whole network.
EVEN = 1.1


def modules(quick: bool) -> dict[str, tuple[tvm.IRModule, np.ndarray]]:
    """The networks, in fp32 and INT8, with an input."""
    found = {}
    for name in ("ResNet-18 w32",) if quick else ("ResNet-18 w32", "ResNet-18 w64"):
        network, x = make(name)
        found |= {f"{name} {scheme}": (realized(network, x, *bits), x) for scheme, bits in BITS.items()}
    return found


def count(module: tvm.IRModule, name: str, threads: int) -> dict[str, Any]:
    """Shares and lines of a network's kernels; the host's are built for as many cores."""
    target = parse_target(name)
    if name == "host":
        target = parse_target(dict(target.export()) | {"num-cores": threads})
    infos = kernel_infos(lower(module, target), target)
    bits = rules_for(target).vector_bits
    works = [(info, kernel_work(info.func, bits)) for info in infos]
    largest = sum(info.count * work.largest_share(threads) for info, work in works)
    parallel = [(info, work) for info, work in works if work.regions]
    lines = [one for info, _ in parallel for one in written_lines(info.func, threads)]
    worst = (
        max(work.largest_share(threads) * threads / work.total for _, work in parallel) if parallel else 1.0
    )
    return {
        "threads": threads,
        "balance": largest * threads / sum(info.count * work.total for info, work in works),
        "worst_kernel": worst,
        "kernels": len(works),
        "parallel_kernels": len(parallel),
        "lines": sum(one.written for one in lines),
        "shared_lines": sum(one.shared for one in lines),
        "contested_lines": sum(one.contested for one in lines),
    }


def balance(arguments: argparse.Namespace) -> Part:
    """Shares of threads, counted."""
    figures, rows = [], []
    table = [
        ["largest share over the mean", "2 threads", "3 threads", "4 threads", "worst kernel, 2 to 4 threads"]
    ]
    for network, (module, _) in modules(arguments.quick).items():
        for machine, name in (("host", "host"), ("Cortex-A72", RPI4)):
            counted = [count(module, name, threads) for threads in THREADS]
            rows += [{"network": network, "target": machine, **row} for row in counted]
            several = [row for row in counted if row["threads"] > 1]
            worst_kernels = ", ".join(f"{row['worst_kernel']:.2f}" for row in several)
            shares = (f"{row['balance']:.3f}" for row in several)
            table.append([f"{machine}, {network}", *shares, worst_kernels])
            worst = max(several, key=lambda row: row["balance"])
            figures.append(
                Figure(
                    f"{machine}, {network}: largest share of a thread over the mean",
                    worst["balance"], "ratio", EVEN, "<=", note=f"{worst['threads']} threads",
                )
            )  # fmt: skip
            contested = max(row["contested_lines"] for row in several)
            shared = max(row["shared_lines"] for row in several)
            figures.append(
                Figure(
                    f"{machine}, {network}: cache lines that several threads write at once",
                    contested, "lines", 0, "<=",
                    note=f"of {counted[-1]['lines']:,}; at any time {shared}",
                )
            )  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    return figures, {"runs": rows, "table": table}


def on_x86(arguments: argparse.Namespace) -> Part:
    """Times of 1 and 2 threads, which take turns, on this machine."""
    figures, rows = [], []
    target = parse_target(dict(parse_target("host").export()) | {"num-cores": 2})
    settings = MeasurementSettings(warmup=10, repeat=40, min_repeat_ms=0)
    with tempfile.TemporaryDirectory() as folder:
        for network, (module, x) in modules(arguments.quick).items():
            library = Path(folder) / "model.so"
            build(module, target).export(library, export_fcompile(str(target.attrs["mtriple"])))
            samples: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(ROUNDS):
                for threads, found in samples.items():
                    device = open_device("local", threads)
                    with device.open(
                        MeasurementSettings(**{**vars(settings), "threads": threads})
                    ) as session:
                        result = session.time(library, [x])
                    if not result.ok:
                        raise RuntimeError(f"{network}: {result.error}")
                    found.append(min(result.samples))
            rows.append({"network": network, "samples": samples})
            print(json.dumps(rows[-1]), flush=True)
            one, two = (min(samples[threads]) for threads in (1, 2))
            figures.append(
                Figure(
                    f"x86 {network}: time of 2 threads over that of 1", two / one, "ratio", 1.0, "<=",
                    note=f"{1e3 * two:.3g} ms and {1e3 * one:.3g} ms",
                )
            )  # fmt: skip
    return figures, {"runs": rows}


PARTS: dict[str, Callable[[argparse.Namespace], Part]] = {"balance": balance, "x86": on_x86}


def main() -> None:
    """Run the parts that are asked for, write, print."""
    parser = parts_parser(__doc__, "threads", PARTS)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"rounds": ROUNDS, "quick": arguments.quick, "run_by": "2 to 4 threads, the worst counts"}
    run_parts(arguments, "threads", settings, PARTS)


if __name__ == "__main__":
    main()
