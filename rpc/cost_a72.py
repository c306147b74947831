"""Estimated Cortex-A72 cycles of one inference: executed counts times what llvm-mca says of each block.

This is an estimate, not a latency, and no board has confirmed it. LLVM schedules the Cortex-A72 by its model
of the Cortex-A57, and llvm-mca assumes that every load hits the first cache and every branch is predicted.
Only code inside of the library counts: calls out of it, such as `expf` or `memcpy`, and TVM's virtual machine
are free. The same library and inputs give the same figure to the bit, because counts are exact and llvm-mca
computes in integers.
"""

from __future__ import annotations

import hashlib
import re
import sqlite3
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np

from tvm_compress.errors import DeviceError
from tvm_compress.rpc.elf import Code

#: The part of each kernel's executed instructions that llvm-mca sees, the most executed blocks first: of
#: each, so that a small kernel is judged alike alone and beside a large one.
COVERAGE = 0.999
#: Cycles per instruction of all other blocks.
UNCOVERED_RATE = 1
#: A block is repeated until about this many instructions, within the limits, so that its steady state shows.
_SIMULATED_INSTRUCTIONS, _FEWEST_ITERATIONS, _MOST_ITERATIONS = 10_000, 10, 100
_LLVM_FLAGS = ("-mcpu=cortex-a72", "-mattr=+neon")
_TOOL_LIMIT_S = 300.0


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
class Cost:
    """What one inference costs.

    Parameters
    ----------
    cycles
        Estimated Cortex-A72 cycles.
    instructions
        Executed instructions.
    covered
        Those of them that llvm-mca saw.
    kernels
        Estimated cycles by kernel; they sum to `cycles`.
    """

    cycles: float
    instructions: int
    covered: int
    kernels: dict[str, float]


def read_counts(path: Path, code: Code, base: int) -> np.ndarray:
    """Read what the counting plugin wrote: int64 [instructions of `code`], how often each one ran.

    Parameters
    ----------
    path
        The plugin's file.
    code
        The library whose blocks count; all others are passed over.
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
    counts = np.zeros(len(code.words), dtype=np.int64)
    for line in lines[:-2]:
        address, length, count = line.split()
        first = (int(address, 16) - base - code.start) // 4
        if 0 <= first < len(counts):
            counts[first : first + int(length)] += int(count)
    return counts


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


def estimate(code: Code, counts: np.ndarray, model: BlockModel) -> Cost:
    """Sum the cycles of all executed blocks, in all and per kernel.

    Parameters
    ----------
    code
        The library.
    counts
        int64 [instructions], from `read_counts`.
    model
        Gives the cycles of blocks.
    """
    by_kernel: dict[str, list[Block]] = {}
    for block in split_blocks(code, counts):
        by_kernel.setdefault(code.owner(block.address), []).append(block)
    hot = {name: _hottest(blocks) for name, blocks in by_kernel.items()}
    cycles = model.cycles({block.words for blocks in hot.values() for block in blocks})
    instructions = sum(block.instructions for blocks in by_kernel.values() for block in blocks)
    covered = sum(block.instructions for blocks in hot.values() for block in blocks)
    kernels: dict[str, Fraction] = {}
    for name, blocks in sorted(by_kernel.items()):
        rest = sum(b.instructions for b in blocks) - sum(b.instructions for b in hot[name])
        kernels[name] = sum((b.count * cycles[b.words] for b in hot[name]), Fraction(UNCOVERED_RATE * rest))
    # Exact until here, so that the order of summing cannot show.
    total = sum(kernels.values(), Fraction(0))
    return Cost(float(total), instructions, covered, {name: float(value) for name, value in kernels.items()})


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


class BlockModel:
    """Cycles per pass of a block, by llvm-mca, kept on disk by the block's bytes.

    Parameters
    ----------
    mc, mca
        Paths of `llvm-mc` and `llvm-mca`.
    directory
        Where the results are kept, in a file named after the tools' version.

    Raises
    ------
    DeviceError
        A tool does not run.
    """

    def __init__(self, mc: str, mca: str, directory: Path) -> None:
        self._mc = mc
        self._mca = mca
        self._known: dict[bytes, Fraction] = {}
        self.version = _version(mca)
        rules = repr(
            (self.version, _LLVM_FLAGS, _SIMULATED_INSTRUCTIONS, _FEWEST_ITERATIONS, _MOST_ITERATIONS)
        )
        self._path = directory / f"blocks-{hashlib.sha256(rules.encode()).hexdigest()[:16]}.sqlite"
        directory.mkdir(parents=True, exist_ok=True)

    def cycles(self, blocks: Iterable[bytes]) -> dict[bytes, Fraction]:
        """Cycles per pass of each block, given as its instructions' bytes."""
        wanted = sorted(set(blocks))
        missing = [block for block in wanted if block not in self._known]
        if missing:
            self._known |= self._read_stored(missing)
            missing = [block for block in missing if block not in self._known]
        if missing:
            new = self._compute(missing)
            self._known |= new
            self._store(new)
        return {block: self._known[block] for block in wanted}

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=30.0)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS blocks (words BLOB PRIMARY KEY, cycles INTEGER, iterations INTEGER)"
        )
        return connection

    def _read_stored(self, blocks: Sequence[bytes]) -> dict[bytes, Fraction]:
        query = "SELECT cycles, iterations FROM blocks WHERE words = ?"
        found = {}
        try:
            with closing(self._open()) as connection:
                for block in blocks:
                    row = connection.execute(query, (block,)).fetchone()
                    if row is not None:
                        found[block] = Fraction(*row)
        except sqlite3.OperationalError:
            return {}  # in use for too long, or no room: what is stored only saves time
        except sqlite3.DatabaseError:
            self._path.unlink(missing_ok=True)
            return {}
        return found

    def _store(self, new: dict[bytes, Fraction]) -> None:
        rows = [(block, cycles.numerator, cycles.denominator) for block, cycles in new.items()]
        with suppress(sqlite3.DatabaseError), closing(self._open()) as connection, connection:
            connection.executemany("INSERT OR IGNORE INTO blocks VALUES (?, ?, ?)", rows)

    def _compute(self, blocks: Sequence[bytes]) -> dict[bytes, Fraction]:
        assembly = self._disassemble(blocks)
        by_iterations: dict[int, list[int]] = {}
        for index, block in enumerate(blocks):
            by_iterations.setdefault(_iterations(len(block) // 4), []).append(index)
        result = {}
        for iterations, indices in sorted(by_iterations.items()):
            totals = self._simulate([assembly[i] for i in indices], iterations)
            for index, total in zip(indices, totals, strict=True):
                result[blocks[index]] = Fraction(total, iterations)
        return result

    def _disassemble(self, blocks: Sequence[bytes]) -> list[list[str]]:
        """Assembly of each block, one instruction an element."""
        words = sorted({block[i : i + 4] for block in blocks for i in range(0, len(block), 4)})
        text = "\n".join(" ".join(f"0x{byte:02x}" for byte in word) for word in words)
        command = [self._mc, "--disassemble", "-triple=aarch64", *_LLVM_FLAGS]
        lines = [line.strip() for line in _run(command, text + "\n").splitlines()]
        lines = [line for line in lines if line and not line.startswith(".")]
        if len(lines) != len(words):
            raise DeviceError(f"llvm-mc knows {len(lines)} of {len(words)} executed instructions.")
        known = dict(zip(words, lines, strict=True))
        return [[known[block[i : i + 4]] for i in range(0, len(block), 4)] for block in blocks]

    def _simulate(self, regions: Sequence[Sequence[str]], iterations: int) -> list[int]:
        """Total cycles of each region, repeated `iterations` times."""
        lines: list[str] = []
        for index, region in enumerate(regions):
            lines += [f"# LLVM-MCA-BEGIN r{index}", *region, f"# LLVM-MCA-END r{index}"]
        flags = ["-call-latency=1", "--instruction-info=0", "--resource-pressure=0"]
        command = [self._mca, "-mtriple=aarch64", *_LLVM_FLAGS, f"-iterations={iterations}", *flags]
        totals = re.findall(r"^Total Cycles:\s+(\d+)$", _run(command, "\n".join(lines) + "\n"), re.MULTILINE)
        if len(totals) != len(regions):
            raise DeviceError(f"llvm-mca judged {len(totals)} of {len(regions)} blocks.")
        return [int(total) for total in totals]


def _iterations(instructions: int) -> int:
    return max(_FEWEST_ITERATIONS, min(_MOST_ITERATIONS, _SIMULATED_INSTRUCTIONS // instructions))


def _version(tool: str) -> str:
    match = re.search(r"LLVM version (\S+)", _run([tool, "--version"], ""))
    return match.group(1) if match else "unknown"


def _run(command: Sequence[str], text: str) -> str:
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=_TOOL_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"{command[0]} cannot be run: {error}.") from None
    if done.returncode != 0:
        raise DeviceError(f"{command[0]} failed: {done.stderr.strip()[:500]}")
    return done.stdout
