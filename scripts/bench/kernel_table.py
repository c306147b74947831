"""Measures which kernel is the fastest for which shape, and writes the table that the schedules choose by.

usage: python scripts/bench/kernel_table.py [--device DEVICE] [--only TABLE ...] [--resume] [--quick]
                                            [--output FILE]

The table goes to tvm_compress/schedules/tables/ISA.json, for the instruction set of the device's target. On
this machine a cost is the fastest of the samples, in seconds, with the weights coming from the last cache. On
the emulated Cortex-A72 it is the larger of compute and memory cycles, as everywhere, with the weights coming
from memory. So they do in a network whose other layers need the caches.
"""

import argparse
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from conv_kernels import FEW_BITS, MODULES, build_conv, kernels
from figures import PACKAGES, commit, machine

from tvm_compress.rpc.cost_a72 import L1_MISS_CYCLES, L2_MISS_CYCLES
from tvm_compress.rpc.device import Device, LatencyResult, MeasurementSettings, open_device
from tvm_compress.rpc.measure import measure
from tvm_compress.schedules import kernel_tables
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.schedules.winograd_algorithm import ALGORITHMS, INTEGER_ALGORITHMS, KERNEL_SIZE

TARGETS = {"local": "host", "emulated-a72": "raspberry-pi/4b-aarch64"}
LINE_BYTES = 64
# Bytes that are walked before each call on this machine: more than a core's second cache, less than the last.
FLUSH = 4 << 20
# Height (and width) of the output, and channels (in, out).
SHAPES = [
    *((4, ins, outs) for ins, outs in ((64, 64), (128, 128), (256, 256), (512, 512))),
    *((7, ins, outs) for ins, outs in ((32, 32), (64, 64), (128, 128), (256, 256), (512, 512))),
    *((8, ins, outs) for ins, outs in ((16, 16), (32, 64), (64, 64), (128, 128), (256, 256))),
    *((14, ins, outs) for ins, outs in ((8, 8), (16, 32), (32, 32), (64, 64), (128, 128), (256, 256))),
    *((16, ins, outs) for ins, outs in ((3, 32), (16, 16), (32, 32), (64, 64), (128, 128))),
    *((28, ins, outs) for ins, outs in ((1, 8), (1, 16), (8, 8), (8, 32), (32, 8), (16, 16), (32, 32))),
    *((28, ins, outs) for ins, outs in ((64, 64), (128, 128))),
    *((32, ins, outs) for ins, outs in ((3, 16), (3, 64), (16, 16), (32, 32), (64, 64), (64, 128))),
    *((56, ins, outs) for ins, outs in ((3, 32), (16, 16), (32, 32), (64, 64))),
    *((112, ins, outs) for ins, outs in ((3, 16), (16, 16), (32, 32))),
]
STRIDED_SHAPES = [
    *((4, ins, outs) for ins, outs in ((32, 64), (64, 128), (128, 256), (256, 512))),
    *((7, ins, outs) for ins, outs in ((32, 64), (128, 256), (256, 512))),
    *((8, ins, outs) for ins, outs in ((16, 32), (32, 64), (64, 128), (128, 256))),
    *((14, ins, outs) for ins, outs in ((16, 32), (32, 64), (64, 128), (128, 256))),
    *((16, ins, outs) for ins, outs in ((3, 32), (16, 32), (32, 64), (64, 128))),
    *((28, ins, outs) for ins, outs in ((16, 32), (32, 64), (64, 128))),
    *((32, ins, outs) for ins, outs in ((3, 16), (16, 32), (32, 64))),
    *((56, ins, outs) for ins, outs in ((3, 32), (16, 32), (32, 64))),
    *((112, ins, outs) for ins, outs in ((3, 16), (16, 32))),
]
QUICK_SHAPES = [(7, 64, 64), (16, 32, 32), (28, 1, 16)]
# By the name of the table (kernel_tables.load_rows): the operator, its stride, and the shapes.
TABLES = {
    kernel_tables.name_of(operator, stride): (operator, stride, shapes)
    for operator in MODULES
    for stride, shapes in ((1, SHAPES), (2, STRIDED_SHAPES))
}


def cost(result: LatencyResult, weight_bytes: int) -> float:
    """What the table holds of a measurement."""
    if not result.ok:
        raise RuntimeError(f"A kernel could not be measured: {result.error}")
    if result.unit == "seconds":
        return min(result.samples)
    streamed = (L1_MISS_CYCLES + L2_MISS_CYCLES) * weight_bytes / LINE_BYTES
    convolution = max(part["cycles"] for part in result.breakdown.values())
    return result.value + max(0.0, streamed - convolution)


def measure_shape(
    device: Device,
    operator: str,
    stride: int,
    shape: tuple[int, int, int],
    settings: MeasurementSettings,
    known: dict[str, float],
) -> dict[str, Any]:
    """Row of the table; costs that are known are kept."""
    size, ins, outs = shape
    target = parse_target(TARGETS[device.name])
    names = [name for name in kernels(operator, stride) if name not in known]
    if not rules_for(target).is_arm:
        # x86 multiplies no bytes of both signs.
        names = [name for name in names if name not in FEW_BITS]
    with tempfile.TemporaryDirectory() as folder:
        extents = (size * stride, size * stride, ins, outs)
        built = {
            name: build_conv(operator, extents, stride, name, target, Path(folder) / f"{name}.so")
            for name in names
        }
        libraries = {name: path for name, path in built.items() if path is not None}
        usual = "float32" if operator == "conv2d_fp32" else "int8"
        inputs = {
            name: [np.ones((1, *extents[:3]), "uint8" if name in FEW_BITS else usual)] for name in libraries
        }
        found = measure(device, libraries, inputs, settings)
    costs = {name: cost(found[name].result, weight_bytes(operator, name, ins * outs)) for name in libraries}
    rounded = {name: float(f"{value:.4g}") for name, value in costs.items()}
    return {"H": size, "W": size, "IC": ins, "OC": outs, "costs": known | rounded}


def weight_bytes(operator: str, kernel: str, channels: int) -> int:
    """Bytes of packed weights, for so many pairs of an input and an output channel."""
    if kernel == "direct":
        return (4 if operator == "conv2d_fp32" else 1) * KERNEL_SIZE**2 * channels
    if operator == "conv2d_fp32":
        return 4 * ALGORITHMS[kernel].weight_rows ** 2 * channels
    algorithm = INTEGER_ALGORITHMS[kernel]
    return np.dtype(algorithm.data).itemsize * algorithm.weight_rows**2 * channels


def write_table(path: Path, isa: str, device: str, tables: dict[str, list[dict[str, Any]]]) -> None:
    """Write the rows with where they come from."""
    local = device == "local"
    content = {
        "isa": isa,
        "unit": "seconds" if local else "estimated Cortex-A72 cycles (emulated)",
        "provenance": {
            "command": f"python scripts/bench/kernel_table.py --device {device}",
            "machine": machine() if local else "emulated Cortex-A72",
            "threads": 1,
            "commit": commit(),
            "versions": {
                "python": platform.python_version(),
                **{package: version(package) for package in PACKAGES if package.startswith("apache-tvm")},
            },
            "date": time.strftime("%Y-%m-%d"),
        },
        "tables": tables,
    }
    text = json.dumps(content, indent=1)
    for row in (row for rows in tables.values() for row in rows):
        # A row a line.
        text = text.replace(json.dumps(row, indent=1).replace("\n", "\n   "), json.dumps(row))
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=tuple(TARGETS), default="local")
    parser.add_argument("--only", nargs="+", choices=tuple(TABLES), default=tuple(TABLES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the costs that the file has")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    device = open_device(arguments.device)
    isa = rules_for(parse_target(TARGETS[arguments.device])).isa
    path = arguments.output or Path(kernel_tables.__file__).parent / "tables" / f"{isa}.json"
    tables: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        tables = json.loads(path.read_text(encoding="utf-8"))["tables"]
    settings = MeasurementSettings(repeat=1)
    if arguments.device == "local":
        settings = MeasurementSettings(warmup=2, number=5, repeat=15, cache_flush=FLUSH)
    for name in arguments.only:
        operator, stride, shapes = TABLES[name]
        rows = tables[name] = tables.get(name, []) if arguments.resume else []
        known = {(row["H"], row["IC"], row["OC"]): row["costs"] for row in rows}
        for shape in QUICK_SHAPES if arguments.quick else shapes:
            row = measure_shape(device, operator, stride, shape, settings, known.get(shape, {}))
            if shape in known:
                rows[list(known).index(shape)] = row
            else:
                rows.append(row)
            costs = (f"{kernel} {cost:<10.4g}" for kernel, cost in row["costs"].items())
            print(name, "{:>4} {:>4} -> {:<4}".format(*shape), *costs, flush=True)
            write_table(path, isa, arguments.device, tables)


if __name__ == "__main__":
    main()
