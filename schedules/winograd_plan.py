"""How Winograd kernels compute: the numbers of their stages, and how the work is cut for the caches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_compress.schedules import fp32
from tvm_compress.schedules.intrin.dot import Dot, wrapping_dot_for
from tvm_compress.schedules.target_rules import TargetRules
from tvm_compress.schedules.threads import worst_imbalance
from tvm_compress.schedules.winograd_algorithm import ALGORITHMS, INTEGER_ALGORITHMS, Algorithm

# Cycles per byte from the second cache and from beyond it: the Cortex-A72's, as its emulation assumes them.
_NEAR, _FAR = 8 / 64, 24 / 64
# Most bytes of what lies between the stages, for a block.
_MOST_BYTES = 4 << 20


@dataclass(frozen=True)
class Numbers:
    """What the stages compute with.

    Attributes
    ----------
    family
        Name of the kernel family.
    algorithms
        What there is to choose from, by name.
    data, sums
        Types of transformed inputs and weights, and of their products' sums.
    dot
        The instruction that multiplies them, None for the vectors that LLVM makes.
    """

    family: str
    algorithms: Mapping[str, Algorithm]
    data: str
    sums: str
    dot: Dot | None = None

    @property
    def depth(self) -> int:
        """Input channels that a step of a product takes."""
        return self.dot.depth if self.dot else 1

    @property
    def data_bytes(self) -> int:
        """Bytes of a transformed input or weight."""
        return np.dtype(self.data).itemsize


FLOATS = Numbers("winograd_fp32", ALGORITHMS, "float32", "float32")


def integers(rules: TargetRules) -> Numbers:
    """Return what the stages compute with for integers."""
    dot = wrapping_dot_for(rules.isa)
    return Numbers("winograd_int8", INTEGER_ALGORITHMS, "int16", "uint32", dot)


@dataclass(frozen=True)
class Blocking:
    """How the work is cut.

    Attributes
    ----------
    rows, columns
        Tiles of a block.
    vectors, tiles
        Of the matrix product's register tile: vectors of output channels, tiles of the image.
    blocks_first
        Whether a block of output channels takes all products before the next one does: products that share
        their weights then find them in the second cache, where there is room for all transformed inputs.
    """

    rows: int
    columns: int
    vectors: int
    tiles: int
    blocks_first: bool


# Register tiles that are considered for each block of tiles.
_MOST_REGISTER_TILES = 3


def cuts(
    rules: TargetRules, info: dict[str, Any], algorithm: Algorithm, numbers: Numbers
) -> dict[tuple[int, ...], Blocking]:
    """Return the ways to cut a layer, by the numbers of a `Choice`, the best by estimated cycles first.

    Blocks are of about the same size, as the last ones of a row or column compute what lies beyond the image.
    """
    rows, columns = (-(-info[key] // algorithm.m) for key in ("OH", "OW"))
    steps = -(-info["IC"] // numbers.depth)
    found: list[tuple[float, Blocking]] = []
    for high, wide in ((high, wide) for high in _even_parts(rows) for wide in _even_parts(columns)):
        if high > 1 and wide < columns:
            # Whole rows first: neighbours share what they read.
            continue
        size = _block_bytes(info, algorithm, numbers, high * wide)
        if size > _MOST_BYTES and high * wide > 1:
            continue
        blocks = info["N"] * -(-rows // high) * -(-columns // wide)
        weights = numbers.data_bytes * algorithm.weight_rows**2 * info["IC"] * info["OC"]
        memory = _memory_cycles(rules, blocks, weights, size)
        # Fewer blocks than threads are shared by all threads, each of them (winograd.schedule).
        uneven = worst_imbalance(blocks, rules.threads) if blocks >= rules.threads else 1.0
        inputs = algorithm.n**2 * high * wide * info["IC"] * numbers.data_bytes
        shared = algorithm.weight_rows < algorithm.n and inputs <= rules.l2_bytes // 2
        tiles = fp32.rank_tiles(rules, 1, high * wide, info["OC"], steps)
        for tile in tiles[:_MOST_REGISTER_TILES]:
            product = fp32.tile_cycles(rules, tile, 1, high * wide, info["OC"], steps)
            cycles = uneven * max(blocks * algorithm.n**2 * product, memory)
            found.append((cycles, Blocking(high, wide, tile.vectors, tile.columns, shared)))
    found.sort(key=lambda pair: pair[0])
    return {(b.rows, b.columns, b.vectors, b.tiles): b for _, b in found}


def _even_parts(extent: int) -> list[int]:
    """Return the sizes of parts into which an extent can be cut evenly, large to small."""
    return sorted({-(-extent // parts) for parts in range(1, extent + 1)}, reverse=True)


def _block_bytes(info: dict[str, Any], algorithm: Algorithm, numbers: Numbers, tiles: int) -> int:
    """Bytes of the transformed inputs and outputs of so many tiles."""
    return algorithm.n**2 * tiles * (numbers.data_bytes * info["IC"] + 4 * info["OC"])


def _memory_cycles(rules: TargetRules, blocks: int, weights: int, data: int) -> float:
    """Estimate the cycles of fetching weights and what lies between the stages, both in bytes."""
    weight_rate = _NEAR if weights + data <= rules.l2_bytes else _FAR
    data_rate = _NEAR if data <= rules.l2_bytes // 2 else _FAR
    return blocks * (weight_rate * weights + 2 * data_rate * data)
