"""Where a network's instructions are spent on the Cortex-A72, for `kernels.py`: in products, or around them.

Blocks of instructions of which a fifth or more multiply are "products": inner loops, with their loads. All
others are transforms, padding, packing and requantization. Memory is not in it.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from figures import Figure
from kernel_loops import BYTES, FMLA, HALVES
from kernel_networks import BITS, compile_library, make, realized

from tvm_compress.rpc import cost_a72, emulated_a72
from tvm_compress.rpc.block_model import BlockModel
from tvm_compress.rpc.cost_a72 import Cost, Counts, split_blocks
from tvm_compress.rpc.elf import Code
from tvm_compress.rpc.emulated_a72 import EmulatedA72
from tvm_compress.rpc.measure import measure

KINDS = {
    "fmla": FMLA,
    "products of bytes": BYTES,
    "products of 16 bits": HALVES,
}
LEAST_DENSITY = 0.2
# Bits of weights and activations.
NETWORKS = {"fp32": BITS["fp32"], "int8": BITS["int8"], "W4A5": (4, 5)}


def instructions_in(words: bytes, kind: str) -> int:
    """Instructions of a kind in a block."""
    codes = np.frombuffer(words, "<u4")
    return sum(int(((codes & mask) == bits).sum()) for (mask, bits), _ in KINDS[kind])


def stages(name: str, scheme: str) -> dict[str, Any]:
    """Executed instructions of each kind, and cycles of the blocks that hold products and of all others."""
    seen: list[tuple[Code, Counts, BlockModel]] = []

    def estimate(*arguments: Any) -> Cost:
        seen.append(arguments)
        return cost_a72.estimate(*arguments)

    network, x = make(name)
    with tempfile.TemporaryDirectory() as folder, patch.object(emulated_a72, "estimate", estimate):
        path = compile_library(
            realized(network, x, *NETWORKS[scheme]), "emulated-a72", Path(folder) / "network.so"
        )
        result = measure(EmulatedA72(remember=False), {"": path}, [x])[""].result
    if not result.ok:
        raise RuntimeError(str(result.error))
    ((code, counts, model),) = seen
    blocks = split_blocks(code, counts.executed)
    cycles = model.cycles([block.words for block in blocks])
    executed = dict.fromkeys(KINDS, 0)
    spent = {"products": 0.0, "others": 0.0}
    for block in blocks:
        found = {kind: instructions_in(block.words, kind) for kind in KINDS}
        for kind, number in found.items():
            executed[kind] += number * block.count
        dense = sum(found.values()) >= LEAST_DENSITY * len(block.words) / 4
        spent["products" if dense else "others"] += float(cycles[block.words]) * block.count
    return {"network": name, "scheme": scheme, "instructions": executed, "cycles": spent}


def part(arguments: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """Table of ResNet-18's stages; what they should take has no goal of its own."""
    name = "ResNet-18 w32" if arguments.quick else "ResNet-18 w64"
    rows = [stages(name, scheme) for scheme in NETWORKS]
    head = f"M, Cortex-A72, {name} (emulated)"
    table = [[head, "instructions of products", "cycles of their loops", "of all else"]]
    for row in rows:
        counted = {kind: number / 1e6 for kind, number in row["instructions"].items() if number >= 1e6}
        executed = ", ".join(f"{number:.1f} {kind}" for kind, number in counted.items())
        table.append([row["scheme"], executed, *(f"{cycles / 1e6:.1f}" for cycles in row["cycles"].values())])
    return [], {"stages": rows, "table": table}
