"""How near the inner loops of the Cortex-A72's kernels come to what the core can do, for `kernels.py`.

An inner loop is the block of instructions that holds most of a kernel's products. Its multiply-accumulates
are counted from the instructions, its cycles are llvm-mca's: as if all data were in the first cache.
"""

import argparse
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import conv_kernels
import numpy as np
from figures import Figure
from kernel_networks import TARGETS
from lookup import write_layer

from tvm_compress.rpc import cost_a72, emulated_a72
from tvm_compress.rpc.block_model import BlockModel
from tvm_compress.rpc.cost_a72 import Cost, Counts, split_blocks
from tvm_compress.rpc.elf import Code
from tvm_compress.rpc.emulated_a72 import EmulatedA72
from tvm_compress.rpc.measure import measure
from tvm_compress.schedules.target_rules import parse_target

LEAST_SHARE = 0.9
# Height (and width), channels (in and out) of the 3 x 3 convolutions.
SHAPES = ((32, 64), (8, 256))
# Encodings of instructions, as (mask, bits under it), and how many products one computes: fmla of float32 by
# a vector and by an element; smull and smlal of bytes and of 16 bits; cnt, which counts products of bits.
FMLA = (((0xFFE0FC00, 0x4E20CC00), 4), ((0xFFC0F400, 0x4F801000), 4))
BYTES = (((0xBFE0FC00, 0x0E20C000), 8), ((0xBFE0FC00, 0x0E208000), 8))
HALVES = (((0xBFE0FC00, 0x0E608000), 4), ((0xBFC0F400, 0x0F402000), 4))
COUNTED = (((0xFFFFFC00, 0x4E205800), 128),)


@dataclass(frozen=True)
class Loop:
    """What is measured: a kind of kernel, the instructions of its products, and most of these in a cycle."""

    kernel: str
    instructions: tuple[tuple[tuple[int, int], int], ...]
    limit: float
    unit: str = "MAC"


LOOPS = (
    Loop("fp32 direct", FMLA, 4),
    Loop("fp32 F4", FMLA, 4),
    Loop("int8 direct", BYTES, 8),
    Loop("int8 F4", HALVES, 4, "products of 16 bits"),
    Loop("W1A1", COUNTED, 85, "products of bits"),
    Loop("W2A2", COUNTED, 85, "products of bits"),
)


def compile_layer(loop: Loop, size: int, channels: int, path: Path) -> np.ndarray:
    """Write the library of a 3 x 3 convolution; returns its input."""
    target = parse_target(TARGETS["emulated-a72"])
    kind, _, algorithm = loop.kernel.partition(" ")
    shape = (1, size, size, channels)
    if algorithm:
        conv_kernels.build_conv(
            f"conv2d_{kind}", (size, size, channels, channels), 1, algorithm, target, path
        )
        return np.ones(shape, np.float32 if kind == "fp32" else np.int8)
    bits = int(kind[1]), int(kind[3])
    write_layer(size, channels, bits, "popcount", path)
    return np.ones(shape, np.uint8)


def products_in(words: bytes, loop: Loop) -> int:
    """Products that a block of instructions computes."""
    codes = np.frombuffer(words, "<u4")
    return sum(int(((codes & mask) == bits).sum()) * products for (mask, bits), products in loop.instructions)


def inner_loop(loop: Loop, size: int, channels: int) -> tuple[float, float]:
    """Products per cycle of a kernel's inner loop, and the share of all the kernel's products that it has."""
    seen: list[tuple[Code, Counts, BlockModel]] = []

    def estimate(*arguments: Any) -> Cost:
        seen.append(arguments)
        return cost_a72.estimate(*arguments)

    with tempfile.TemporaryDirectory() as folder, patch.object(emulated_a72, "estimate", estimate):
        path = Path(folder) / "layer.so"
        x = compile_layer(loop, size, channels, path)
        result = measure(EmulatedA72(remember=False), {"": path}, [x])[""].result
    if not result.ok:
        raise RuntimeError(str(result.error))
    ((code, counts, model),) = seen
    blocks = split_blocks(code, counts.executed)
    executed = {block: block.count * products_in(block.words, loop) for block in blocks}
    inner = max(blocks, key=lambda block: executed[block])
    cycles = model.cycles([inner.words])[inner.words]
    return products_in(inner.words, loop) / float(cycles), executed[inner] / sum(executed.values())


def part(arguments: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """Figures of all kernels and shapes."""
    figures, rows = [], []
    for loop, (size, channels) in product(LOOPS, SHAPES[:1] if arguments.quick else SHAPES):
        rate, share = inner_loop(loop, size, channels)
        rows.append({"kernel": loop.kernel, "size": size, "channels": channels, "rate": rate, "share": share})
        print(rows[-1], flush=True)
        figures.append(
            Figure(
                f"Cortex-A72, inner loop of {loop.kernel}, 3x3, {size}x{size}x{channels}",
                rate / loop.limit, f"of {loop.limit:g} {loop.unit} a cycle (emulated)", LEAST_SHARE, ">=",
                note=f"{rate:.3g} a cycle; the loop has {share:.0%} of the kernel's products",
            )
        )  # fmt: skip
    return figures, {"loops": rows}
