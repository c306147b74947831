"""How long building the kernels of a whole network takes, for `kernels.py`."""

import argparse
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from figures import Figure
from kernel_networks import TARGETS, compile_library, make, realized

NETWORK = "ResNet-18 w64"
# Bits of weights and activations: fp32, INT8, products in 16 bits or lookups, counted bits.
BITS = ((32, 32), (8, 8), (4, 5), (2, 2), (1, 1))
MOST_SECONDS = 3.0
REPEAT = 3


def build_seconds(bits: tuple[int, int], device: str) -> float:
    """Seconds from the network in Relax to its library; for a process that has built nothing before."""
    network, x = make(NETWORK)
    module = realized(network, x, *bits)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        compile_library(module, device, Path(folder) / "network.so")
        return time.perf_counter() - start


def part(arguments: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """Figures of all bits and targets, the fastest of some processes: other work only adds to times."""
    seconds: dict[str, list[float]] = {}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as fresh:
        for device in TARGETS:
            for bits in BITS[-1:] if arguments.quick else BITS:
                name = f"{'fp32' if bits == BITS[0] else 'W{}A{}'.format(*bits)} for {TARGETS[device]}"
                runs = [fresh.submit(build_seconds, bits, device) for _ in range(REPEAT)]
                seconds[name] = [run.result() for run in runs]
                print(name, seconds[name], flush=True)
    figures = [
        Figure(f"building {NETWORK}, {name}, export with it", min(values), "s", MOST_SECONDS, "<=")
        for name, values in seconds.items()
    ]
    return figures, {"seconds": seconds}
