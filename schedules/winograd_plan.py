"""How Winograd kernels compute: the numbers of their stages, and how the work is cut for the caches."""

import math
from dataclasses import dataclass
from statistics import fmean as mean
from typing import Any

import numpy as np
from tvm import tirx

from tvm_compress.schedules import fp32, int8, kernel
from tvm_compress.schedules.intrin.dot import Dot, dot_for, wrapping_dot_for
from tvm_compress.schedules.target_rules import TargetRules
from tvm_compress.schedules.threads import imbalance, splits_evenly
from tvm_compress.schedules.winograd_algorithm import Algorithm, IntegerAlgorithm

# Cycles per byte from the second cache and from beyond it: the Cortex-A72's, as its emulation assumes them.
_NEAR, _FAR = 8 / 64, 24 / 64
# Cycles that a vector of a transformed value takes, from the patch or to the output (seen on the Cortex-A72).
_TRANSFORM = 9
# Cycles that a thread waits for a parallel region: 5 us at 1.5 GHz.
_START = 7500
# What stages take by themselves, against all of them in one region (seen on the Cortex-A72, one thread).
_STAGES_APART = 1.05
# Most bytes of what lies between the stages, for a block.
_MOST_BYTES = 4 << 20


@dataclass(frozen=True)
class Numbers:
    """What the stages compute with.

    Attributes
    ----------
    family
        Name of the kernel family.
    data, sums
        Types of transformed inputs and weights, and of their products' sums.
    dot
        The instruction that multiplies them, None for the vectors that LLVM makes.
    """

    family: str
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

    @property
    def wrapped(self) -> str:
        """Type that the sums are transformed back in: of integers one that wraps around."""
        return self.sums if self.sums == "float32" else "uint32"

    def wrap(self, value: Any) -> Any:
        """Return a sum in that type."""
        return value if self.sums == self.wrapped else tirx.reinterpret(self.wrapped, value)

    def place(self, ic: Any, lane: Any) -> tuple[Any, ...]:
        """Index of an input channel's weight for an output channel of a block, within the block's."""
        if self.dot is None:
            return ic, lane
        inner = self.dot.inner_index(lane % self.dot.lanes, ic % self.depth)
        return ic // self.depth, lane // self.dot.lanes, *inner


FLOATS = Numbers("winograd_fp32", "float32", "float32")


def integers(rules: TargetRules, algorithm: IntegerAlgorithm) -> Numbers:
    """Return what the stages of an algorithm compute with for integers; x86 multiplies int16 at best."""
    if algorithm.data == "int8" and rules.is_arm:
        dot = dot_for(rules.isa)
        return Numbers("winograd_int8", dot.data_dtype, dot.sum_dtype, dot)
    return Numbers("winograd_int8", "int16", "uint32", wrapping_dot_for(rules.isa))


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
        blocks = _blocks(info, algorithm, high, wide)
        weights = numbers.data_bytes * algorithm.weight_rows**2 * info["IC"] * info["OC"]
        memory = _memory_cycles(rules, blocks, weights, size)
        first = _blocks_first(rules, info, algorithm, numbers, high * wide)
        tiles = _register_tiles(rules, high * wide, info["OC"], steps, numbers.dot)
        for tile in tiles[:_MOST_REGISTER_TILES]:
            product = fp32.tile_cycles(rules, tile, 1, high * wide, info["OC"], steps)
            transforms = _transform_cycles(rules, info, numbers, high * wide, tile.columns)
            places = blocks * algorithm.n**2
            cycles = max(places * product, memory) + places * transforms
            cycles = _shared_cycles(rules, info, algorithm, cycles, (high, wide))
            found.append((cycles, Blocking(high, wide, tile.vectors, tile.columns, first)))
    found.sort(key=lambda pair: pair[0])
    return {(b.rows, b.columns, b.vectors, b.tiles): b for _, b in found}


def _transform_cycles(
    rules: TargetRules, info: dict[str, Any], numbers: Numbers, tiles: int, register_tiles: int
) -> float:
    """Estimate the cycles, for a place of the patches, of transforming so many tiles there and back."""
    lanes = rules.vector_bits // (8 * numbers.data_bytes)
    # The last register tile of inputs is filled up; of outputs what fills it is left out.
    inputs = -(-tiles // register_tiles) * register_tiles * -(-info["IC"] // lanes)
    return _TRANSFORM * (inputs + tiles * -(-info["OC"] // rules.fp32_lanes))


def shares_blocks(rules: TargetRules, blocks: int) -> bool:
    """Whether threads share blocks of tiles; else they share the parts of each stage of each block."""
    return splits_evenly(blocks, rules.threads)


def shares_rows(rules: TargetRules, rows: int) -> bool:
    """Whether threads that share the last stage take whole rows of a block's tiles, else single tiles."""
    return splits_evenly(rows, rules.threads)


def _shared_cycles(
    rules: TargetRules, info: dict[str, Any], algorithm: Algorithm, cycles: float, block: tuple[int, int]
) -> float:
    """Estimate the cycles of all threads together, waiting ones too: the mean over all numbers of threads.

    `cycles` is what one thread takes by itself.
    """
    macs = 9 * math.prod(info[key] for key in ("N", "OH", "OW", "OC", "IC"))
    if rules.threads == 1 or macs < kernel.MIN_PARALLEL_MACS:
        return cycles
    rows, columns = block
    tiles, blocks = rows * columns, _blocks(info, algorithm, rows, columns)
    parts, starts = [blocks], 1
    if not shares_blocks(rules, blocks):
        parts = [tiles, algorithm.n**2, rows if shares_rows(rules, rows) else tiles]
        starts = len(parts) * blocks
        cycles *= _STAGES_APART
    numbers = range(1, rules.threads + 1)
    uneven = mean(imbalance(part, threads) for threads in numbers for part in parts)
    return cycles * uneven + starts * _START * mean(threads * (threads > 1) for threads in numbers)


def _blocks(info: dict[str, Any], algorithm: Algorithm, rows: int, columns: int) -> int:
    """Blocks of so many rows and columns of tiles that cover all images."""
    high, wide = (-(-info[key] // algorithm.m) for key in ("OH", "OW"))
    return int(info["N"]) * -(-high // rows) * -(-wide // columns)


def _blocks_first(
    rules: TargetRules, info: dict[str, Any], algorithm: Algorithm, numbers: Numbers, tiles: int
) -> bool:
    """See Blocking: whether weights that products share would else have left the second cache."""
    weights = algorithm.weight_rows * info["IC"] * info["OC"] * numbers.data_bytes
    inputs = algorithm.n**2 * tiles * info["IC"] * numbers.data_bytes
    shared = algorithm.weight_rows < algorithm.n
    return shared and weights > rules.l2_bytes and inputs <= rules.l2_bytes // 2


def _register_tiles(
    rules: TargetRules, tiles: int, channels: int, steps: int, dot: Dot | None
) -> list[fp32.Tile]:
    """Return the register tiles of the matrix product, the best first; columns are tiles of the image."""
    if dot is None or not rules.is_arm:
        return fp32.rank_tiles(rules, 1, tiles, channels, steps)
    # Each product of bytes broadcasts the inputs anew, which counts as much as loading weights.
    found = int8.rank_tiles((1, tiles), -(-channels // dot.lanes), dot.registers, dot.vector_cost)
    return [fp32.Tile(tile.vectors, 1, tile.width) for tile in found]


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
