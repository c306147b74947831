"""Cycles of straight-line Arm code by llvm-mca, kept on disk."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sqlite3
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from fractions import Fraction
from pathlib import Path

from tvm_compress.errors import DeviceError

#: A block is repeated until about this many instructions, within the limits, so that its steady state shows.
_SIMULATED_INSTRUCTIONS, _FEWEST_ITERATIONS, _MOST_ITERATIONS = 10_000, 10, 100
_LLVM_FLAGS = ("-mcpu=cortex-a72", "-mattr=+neon")
_TOOL_LIMIT_S = 300.0


class BlockModel:
    """Cycles per pass of a block, by llvm-mca, kept on disk by the block's bytes.

    Parameters
    ----------
    mc, mca
        Paths of `llvm-mc` and `llvm-mca`.
    directory
        Where the results are kept, in a file named after the tools' version.

    Attributes
    ----------
    path
        That file; its name stands for the tools and for all settings.
    version
        Of the tools.

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
        self.path = directory / f"blocks-{hashlib.sha256(rules.encode()).hexdigest()[:16]}.sqlite"
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
        connection = sqlite3.connect(self.path, timeout=30.0)
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
            self.path.unlink(missing_ok=True)
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

        def simulate(iterations: int) -> dict[bytes, Fraction]:
            indices = by_iterations[iterations]
            totals = self._simulate([assembly[i] for i in indices], iterations)
            return {blocks[i]: Fraction(n, iterations) for i, n in zip(indices, totals, strict=True)}

        # Processes of their own, which have the processors to themselves meanwhile.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            each = list(threads.map(simulate, sorted(by_iterations)))
        return {block: cycles for found in each for block, cycles in found.items()}

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


@functools.cache
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
