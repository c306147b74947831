"""What few bits gain on the emulated Cortex-A72: table lookups on 3 x 3 layers by bits, and whole networks.

usage: python scripts/bench/lookup.py [--only PART ...] [--json FILE] [--quick]

Each part measures by itself and keeps what the other left in the file. Weights and data are random: they
change no cycles. A layer is measured with its requantization; "int8" is the direct kernel.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import tvm
from figures import Figure, Part, parts_parser, run_parts
from kernel_networks import compile_library, make, realized
from tvm import relax

from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import LatencyResult, open_device
from tvm_compress.rpc.measure import measure
from tvm_compress.schedules import ops, winograd
from tvm_compress.schedules.apply import lower_to_kernels
from tvm_compress.schedules.target_rules import TargetRules, parse_target

TARGET = "raspberry-pi/4b-aarch64"
# Height (and width), channels (in and out).
SHAPES = ((16, 128), (8, 256), (4, 512))
# Most activation bits of each kind of tables, and what bits are counted of.
LOOKED_UP, COUNTED = (5, 6, 8), (1, 2)
# (weight bits, activation bits): most cycles, of the direct INT8 kernel's.
GOALS = {(1, 8): 0.5, (2, 5): 0.48}
NETWORK_GOAL = 36.0
NETWORKS = {
    "W2A5": (2, 5),
    "W2A5 without lookups": (2, 5),
    "W4A5": (4, 5),
    "W4A5 without lookups": (4, 5),
    "W8A8": (8, 8),
}


@contextmanager
def only(kernel: str) -> Iterator[None]:
    """Choose "lookup" or "popcount" wherever there is one, or neither ("int8"); never Winograd."""
    with (
        patch.object(winograd, "choose_algorithm", lambda *_: None),
        patch.object(TargetRules, "lookup_pays", lambda *_, **__: kernel == "lookup"),
        patch.object(TargetRules, "popcount_pays", lambda *_: kernel == "popcount"),
    ):
        yield


def layer(size: int, channels: int, weight_bits: int, activation_bits: int) -> tvm.IRModule:
    """A 3 x 3 convolution with padding 1, bias and requantization on one image."""
    rng = np.random.default_rng(0)
    shape = (channels, channels, 3, 3)
    limit = 2 ** (weight_bits - 1) - 1
    weight = rng.choice([-1, 1], shape) if weight_bits == 1 else rng.integers(-limit, limit + 1, shape)
    bias = rng.integers(-999, 999, channels).astype(np.int32)
    x = relax.Var("x", relax.TensorType((1, size, size, channels), "uint8"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            sums = ops.call(
                "conv2d",
                [x, relax.const(weight.astype(np.int8)), relax.const(bias)],
                scheme="bitserial" if max(weight_bits, activation_bits) <= 6 else "int8",
                weight_bits=weight_bits, activation_bits=activation_bits, zero_point=0,
                strides=[1, 1], padding=[1] * 4, dilation=[1, 1], groups=1,
            )  # fmt: skip
            multipliers = relax.const(rng.integers(1 << 29, 1 << 30, channels).astype(np.int32))
            out = ops.call(
                "requantize", [builder.emit(sums), multipliers],
                shift=40, zero_point=0, qmin=0, qmax=2**activation_bits - 1, dtype="uint8",
                bound=int(255 * np.abs(weight).sum(axis=(1, 2, 3)).max() + 999),
            )  # fmt: skip
            result = builder.emit_output(out)
        builder.emit_func_output(result)
    return builder.get()


def write_layer(size: int, channels: int, bits: tuple[int, int], kernel: str, path: Path) -> None:
    """Write the library of a layer with one kind of kernel."""
    target = parse_target(TARGET)
    with only(kernel):
        lowered = lower_to_kernels(layer(size, channels, *bits), target)
    relax.build(lowered, target=target).export_library(
        str(path), fcompile=export_fcompile("aarch64-linux-gnu")
    )


def measure_layer(size: int, channels: int, bits: tuple[int, int], kernel: str) -> dict[str, Any]:
    """Estimated cycles of a layer with one kind of kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.so"
        write_layer(size, channels, bits, kernel, path)
        data = np.random.default_rng(0).integers(0, 2 ** bits[1], (1, size, size, channels)).astype(np.uint8)
        cycles = checked(measure(open_device("emulated-a72"), {"layer": path}, [data])["layer"].result).value
    macs = 9 * (size * channels) ** 2
    row = {
        "size": size, "channels": channels, "weight_bits": bits[0], "activation_bits": bits[1],
        "kernel": kernel, "cycles": cycles, "macs_per_cycle": macs / cycles,
    }  # fmt: skip
    print(row, flush=True)
    return row


def checked(result: LatencyResult) -> LatencyResult:
    """The result, if there is one."""
    if not result.ok:
        raise RuntimeError(f"A library could not be measured: {result.error}")
    return result


def layers(arguments: argparse.Namespace) -> Part:
    """3 x 3 layers of all bits, by lookup, by counting and by the INT8 kernel."""
    cases = [((8, 8), "int8")]
    cases += [((w, a), "lookup") for w in range(1, 5) for a in LOOKED_UP]
    cases += [((w, a), "popcount") for w in range(1, 5) for a in COUNTED]
    shapes = SHAPES[-1:] if arguments.quick else SHAPES
    rows = [measure_layer(*shape, *case) for case in cases for shape in shapes]
    figures = []
    for (weight_bits, activation_bits), goal in GOALS.items():
        for size, channels in shapes:
            found = {
                row["kernel"]: row["cycles"]
                for row in rows
                if (row["size"], row["channels"]) == (size, channels)
                and (row["weight_bits"], row["activation_bits"]) in ((8, 8), (weight_bits, activation_bits))
            }
            name = f"3x3, {size}x{size}x{channels}, W{weight_bits}A{activation_bits}: lookup over direct INT8"
            note = f"{found['lookup'] / 1e6:.3g} M and {found['int8'] / 1e6:.3g} M"
            figures.append(
                Figure(
                    name, found["lookup"] / found["int8"], "of the estimated Cortex-A72 cycles (emulated)",
                    goal, "<=", note=note,
                )
            )  # fmt: skip
    return figures, {"runs": rows, "table": speeds(rows)}


def speeds(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Table of multiply-accumulates per cycle by bits and kernel; in each cell those of the shapes."""

    def cell(kernel: str, weight_bits: int, activation_bits: int) -> str:
        wanted = (kernel, weight_bits, activation_bits)
        return " / ".join(
            f"{row['macs_per_cycle']:.1f}"
            for row in rows
            if (row["kernel"], row["weight_bits"], row["activation_bits"]) == wanted
        )

    shapes = dict.fromkeys(f"{row['size']}x{row['size']}x{row['channels']}" for row in rows)
    head = [f"MAC per cycle ({' / '.join(shapes)})"]
    head += ["lookup, A1 to A5", "lookup, A6", "lookup, A7 and A8"]
    head += [f"counted bits, A{bits}" for bits in COUNTED]
    body = [
        [f"W{w}", *(cell("lookup", w, a) for a in LOOKED_UP), *(cell("popcount", w, a) for a in COUNTED)]
        for w in range(1, 5)
    ]
    return [head, *body, ["direct INT8", cell("int8", 8, 8), *[""] * (len(head) - 2)]]


def network(arguments: argparse.Namespace) -> Part:
    """ResNet-18 for 32 x 32 images in W2A5 and W4A5, first and last layer INT8."""
    network_name = "ResNet-18 w32" if arguments.quick else "ResNet-18 w64"
    dense, x = make(network_name)
    with tempfile.TemporaryDirectory() as folder:
        libraries: dict[str, Path] = {}
        for name, bits in NETWORKS.items():
            unused = patch.object(TargetRules, "lookup_pays", lambda *_, **__: False)
            with unused if name.endswith("without lookups") else nullcontext():
                path = Path(folder) / f"{len(libraries)}.so"
                libraries[name] = compile_library(realized(dense, x, *bits), "emulated-a72", path)
        found = measure(open_device("emulated-a72"), libraries, [x], reference="W8A8")
    results = {name: checked(one.result) for name, one in found.items()}
    cycles = {name: result.value / 1e6 for name, result in results.items()}
    figures = []
    for name in ("W2A5", "W4A5"):
        note = f"without lookups {cycles[f'{name} without lookups']:.3g} M, W8A8 {cycles['W8A8']:.3g} M"
        what = f"{network_name} {name}, first and last layer INT8: estimated Cortex-A72 cycles (emulated)"
        figures.append(Figure(what, cycles[name], "M", NETWORK_GOAL, "<=", note=note))
    return figures, {"cycles": cycles, "breakdown": {n: r.breakdown for n, r in results.items()}}


PARTS: dict[str, Callable[[argparse.Namespace], Part]] = {"layers": layers, "network": network}


def main() -> None:
    """Run the parts that are asked for, write, print."""
    parser = parts_parser(__doc__, "lookup", PARTS)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"quick": arguments.quick}
    run_parts(arguments, "lookup", settings, PARTS)


if __name__ == "__main__":
    main()
