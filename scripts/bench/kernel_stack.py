"""What aligned stack frames are worth on x86 (passes/aligned_stack.py), for `kernels.py`.

Where a process has its stack is drawn when it starts, so each network runs in many processes.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from figures import Figure
from kernel_networks import BITS, compile_library, make, realized

from tvm_compress.passes import machine_code
from tvm_compress.rpc.device import MeasurementSettings, open_device

NETWORKS = ("ResNet-8", "ResNet-18 w32", "ResNet-18 w64")
PROCESSES = 24
SETTINGS = MeasurementSettings(warmup=3, repeat=9, min_repeat_ms=8.0)
# Most of the fastest process's time that any other may take: other work on the machine adds some.
MOST = 1.1


def part(arguments: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """Fastest sample of each process, with and without; fp32, whose kernels keep most vectors."""
    figures, rows = [], []
    for name in NETWORKS[:1] if arguments.quick else NETWORKS:
        network, x = make(name)
        module = realized(network, x, *BITS["fp32"])
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory)
            libraries = {"aligned": compile_library(module, "local", folder / "aligned.so")}
            with patch.object(machine_code, "align_stack", lambda func, vector_bits: func):
                libraries["plain"] = compile_library(module, "local", folder / "plain.so")
            seconds = in_processes(libraries, x)
        row = {"network": name, "seconds": seconds}
        rows.append(row)
        print(json.dumps(row), flush=True)
        spread = {kind: max(values) / min(values) for kind, values in seconds.items()}
        median = {kind: float(np.median(values)) for kind, values in seconds.items()}
        figures += [
            Figure(
                f"x86 fp32, {name}: slowest of {PROCESSES} processes over the fastest",
                spread["aligned"], "", MOST, "<=", note=f"without aligned stack frames {spread['plain']:.2f}",
            ),
            Figure(
                f"x86 fp32, {name}: median of processes, aligned stack frames over none",
                median["aligned"] / median["plain"], "of the time", 1.0, "<=",
                note=f"{1e3 * median['aligned']:.3g} ms and {1e3 * median['plain']:.3g} ms",
            ),
        ]  # fmt: skip
    return figures, {"runs": rows}


def in_processes(libraries: dict[str, Path], x: np.ndarray) -> dict[str, list[float]]:
    """Fastest sample of each library in each process, its own: interleaved, so that drift is alike."""
    seconds: dict[str, list[float]] = {name: [] for name in libraries}
    with open_device("local").open(SETTINGS) as session:
        for _ in range(PROCESSES):
            # Each library gets a new process in each call.
            timed = session.time_many({name: (path, [x]) for name, path in libraries.items()})
            for name, result in timed.items():
                seconds[name].append(min(result.samples))
    return seconds
