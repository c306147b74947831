"""Estimated Cortex-A72 cycles of one inference: what its instructions take, or its memory, whichever is more.

Compute cycles are executed counts times what llvm-mca says of each block; memory cycles are the misses of an
emulated data cache times what a line costs. A kernel takes the larger of the two: the core works on while
lines are fetched ahead of it.

This is an estimate, not a latency, and no board has confirmed it. LLVM schedules the Cortex-A72 by its model
of the Cortex-A57, and llvm-mca assumes that every load hits the first cache and every branch is predicted.
Only code inside of the library counts: calls out of it, such as `expf` or `memcpy`, and TVM's virtual machine
are free. The same library and inputs give the same figure to the bit, because counts are exact, addresses of
the caches depend on the order of accesses only, and llvm-mca computes in integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np

from tvm_compress.errors import DeviceError
from tvm_compress.rpc.block_model import BlockModel
from tvm_compress.rpc.elf import Code

#: The part of each kernel's executed instructions that llvm-mca sees, the most executed blocks first: of
#: each, so that a small kernel is judged alike alone and beside a large one.
COVERAGE = 0.999
#: Cycles per instruction of all other blocks.
UNCOVERED_RATE = 1
#: Cycles that a line of 64 bytes takes from the second cache into the first, and what it takes longer from
#: memory. Both are assumed, as bandwidths and not as latencies, for the core's prefetcher runs ahead: 8 bytes
#: a cycle, and 24 cycles in all, which is 4 GB/s at 1.5 GHz (STREAM on a Raspberry Pi 4 finds 4.8 to 5.6).
L1_MISS_CYCLES = 8
L2_MISS_CYCLES = 16
#: Bytes of a line and of the second cache; as in native/caches.h.
LINE_BYTES = 64
L2_BYTES = 1 << 20


@dataclass(frozen=True)
class Block:
    """Instructions that ran one after the other, equally often.

    Parameters
    ----------
    address
        Of the first instruction, relative to where the library is loaded.
    words
        The instructions, 4 little-endian bytes each.
    count
        How often the block ran.
    """

    address: int
    words: bytes
    count: int

    @property
    def instructions(self) -> int:
        """Instructions executed in all."""
        return self.count * (len(self.words) // 4)


@dataclass(frozen=True)
class Counts:
    """What the counting plugin saw of each instruction of a library: int64 [instructions] each.

    Parameters
    ----------
    executed
        How often it ran.
    l1_misses, l2_misses
        Lines that it had to fetch into the first cache, and those of them that were not in the second.
    """

    executed: np.ndarray
    l1_misses: np.ndarray
    l2_misses: np.ndarray


@dataclass(frozen=True)
class KernelCost:
    """What one kernel costs in one inference, over all its calls.

    Parameters
    ----------
    instructions
        Executed instructions.
    compute_cycles
        What they take if all data is in the first cache.
    l1_misses, l2_misses
        See `Counts`.
    """

    instructions: int
    compute_cycles: Fraction
    l1_misses: int
    l2_misses: int

    @property
    def memory_cycles(self) -> int:
        """What fetching the data takes."""
        return L1_MISS_CYCLES * self.l1_misses + L2_MISS_CYCLES * self.l2_misses

    @property
    def cycles(self) -> Fraction:
        """The larger of the two."""
        return max(self.compute_cycles, Fraction(self.memory_cycles))

    def to_dict(self) -> dict[str, float]:
        """Give all figures by name."""
        return {
            "cycles": float(self.cycles),
            "instructions": self.instructions,
            "compute_cycles": float(self.compute_cycles),
            "l1_misses": self.l1_misses,
            "l2_misses": self.l2_misses,
            "memory_cycles": self.memory_cycles,
        }


@dataclass(frozen=True)
class Cost:
    """What one inference costs.

    Parameters
    ----------
    kernels
        By kernel.
    covered
        Executed instructions that llvm-mca saw.
    """

    kernels: dict[str, KernelCost]
    covered: int

    @property
    def cycles(self) -> float:
        """Estimated Cortex-A72 cycles."""
        # Exact until here, so that the order of summing cannot show.
        return float(sum((kernel.cycles for kernel in self.kernels.values()), Fraction(0)))

    def total(self, name: str) -> int:
        """Sum of a whole number over all kernels, such as "l1_misses"."""
        return sum(getattr(kernel, name) for kernel in self.kernels.values())


def read_counts(path: Path, code: Code, base: int) -> Counts:
    """Read what the counting plugin wrote.

    Parameters
    ----------
    path
        The plugin's file.
    code
        The library that counts; all else is passed over.
    base
        Where the library was loaded.

    Raises
    ------
    DeviceError
        The file is missing or incomplete.
    """
    try:
        lines = path.read_text().split("\n")
    except OSError as error:
        raise DeviceError(f"The emulator wrote no counts: {error}.") from None
    if lines[-2:] != ["END", ""]:
        raise DeviceError(f"The emulator's counts in {path.name} are incomplete.", "Is the disk full?")
    size = len(code.words)
    executed, l1_misses, l2_misses = (np.zeros(size, dtype=np.int64) for _ in range(3))
    for line in lines[:-2]:
        kind, address, *numbers = line.split()
        first = (int(address, 16) - base - code.start) // 4
        if not 0 <= first < size:
            continue
        if kind == "block":
            executed[first : first + int(numbers[0])] += int(numbers[1])
        else:
            l1_misses[first] += int(numbers[0])
            l2_misses[first] += int(numbers[1])
    return Counts(executed, l1_misses, l2_misses)


def split_blocks(code: Code, counts: np.ndarray) -> list[Block]:
    """Cut the executed code where counts change, after branches, and where another kernel begins.

    The emulator cuts its blocks by its own buffers and pages; these depend on the library alone.
    """
    words = code.words
    cut = np.ones(len(words) + 1, dtype=bool)
    cut[1:-1] = (counts[1:] != counts[:-1]) | _is_branch(words[:-1])
    for address, _ in code.owners:
        if 0 <= address - code.start < 4 * len(words):
            cut[(address - code.start) // 4] = True
    edges = np.flatnonzero(cut)
    return [
        Block(code.start + 4 * int(first), words[first:last].tobytes(), int(counts[first]))
        for first, last in pairwise(edges)
        if counts[first]
    ]


def _is_branch(words: np.ndarray) -> np.ndarray:
    """Whether each instruction is B, BL, B.cond, CBZ, CBNZ, TBZ, TBNZ, BR, BLR or RET."""
    return (
        ((words & 0x7C000000) == 0x14000000)
        | ((words & 0xFF000000) == 0x54000000)
        | ((words & 0x7C000000) == 0x34000000)
        | ((words & 0xFE000000) == 0xD6000000)
    )


def estimate(code: Code, counts: Counts, model: BlockModel) -> Cost:
    """Sum the cycles of all executed blocks and the misses of all instructions, per kernel.

    Parameters
    ----------
    code
        The library.
    counts
        From `read_counts`.
    model
        Gives the cycles of blocks.
    """
    by_kernel = _blocks_by_kernel(code, counts)
    hot = {name: _hottest(blocks) for name, blocks in by_kernel.items()}
    cycles = model.cycles({block.words for blocks in hot.values() for block in blocks})
    missed = _misses_by_kernel(code, counts)
    kernels, covered = {}, 0
    for name, blocks in sorted(by_kernel.items()):
        instructions = sum(block.instructions for block in blocks)
        simulated = sum(block.instructions for block in hot[name])
        rest = Fraction(UNCOVERED_RATE * (instructions - simulated))
        compute = sum((block.count * cycles[block.words] for block in hot[name]), rest)
        kernels[name] = KernelCost(instructions, compute, *missed.get(name, (0, 0)))
        covered += simulated
    return Cost(kernels, covered)


def hot_blocks(code: Code, counts: Counts) -> set[bytes]:
    """Words of the blocks that `estimate` asks a model for."""
    by_kernel = _blocks_by_kernel(code, counts)
    return {block.words for blocks in by_kernel.values() for block in _hottest(blocks)}


def _blocks_by_kernel(code: Code, counts: Counts) -> dict[str, list[Block]]:
    found: dict[str, list[Block]] = {}
    for block in split_blocks(code, counts.executed):
        found.setdefault(code.owner(block.address), []).append(block)
    return found


def _misses_by_kernel(code: Code, counts: Counts) -> dict[str, tuple[int, int]]:
    """Misses of the first and of the second cache by the kernel whose instructions had them."""
    found: dict[str, tuple[int, int]] = {}
    for index in np.flatnonzero(counts.l1_misses):
        name = code.owner(code.start + 4 * int(index))
        l1, l2 = found.get(name, (0, 0))
        found[name] = (l1 + int(counts.l1_misses[index]), l2 + int(counts.l2_misses[index]))
    return found


def _hottest(blocks: Sequence[Block]) -> list[Block]:
    """Take the blocks that execute most, until they cover what they have to."""
    needed = COVERAGE * sum(block.instructions for block in blocks)
    taken: list[Block] = []
    covered = 0
    for block in sorted(blocks, key=lambda b: (-b.instructions, b.address)):
        if covered >= needed:
            break
        taken.append(block)
        covered += block.instructions
    return taken
