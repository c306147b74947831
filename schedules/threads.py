"""How the parallel loops of scheduled kernels share the work among threads, and which cache lines they share.

TVM gives each thread one run of neighbouring iterations of a parallel loop, of as many as the extent over the
threads rounded up: the last threads may get fewer, or none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import tvm
from tvm import s_tir, tirx

from tvm_compress.schedules.counts import executed_in

# Bytes of a cache line, to which TVM aligns every tensor.
LINE = 64


def largest_part(extent: int, threads: int) -> int:
    """Return the iterations of the thread that has most of them."""
    return -(-extent // threads)


def imbalance(extent: int, threads: int) -> float:
    """Return the largest part over the mean one: 1 where all threads have as much to do."""
    return largest_part(extent, threads) * threads / extent


def worst_imbalance(extent: int, threads: int) -> float:
    """Return the largest imbalance of so many threads or fewer."""
    return max((imbalance(extent, number) for number in range(2, threads + 1)), default=1.0)


# Most that the busiest thread may do, of the mean, where the work could be shared in another way: 7 parts on
# 3 threads are still better shared as they are.
_MOST_IMBALANCE = 1.3


def splits_evenly(extent: int, threads: int) -> bool:
    """Whether so many threads, and fewer of them too, get about as many iterations each."""
    return extent >= threads and worst_imbalance(extent, threads) <= _MOST_IMBALANCE


@dataclass(frozen=True)
class Region:
    """A parallel loop of a kernel.

    Attributes
    ----------
    loop
        The loop, with its body.
    starts
        How often a call of the kernel runs it.
    work
        Operations, loads and stores of all its iterations and starts, in vectors.
    """

    loop: tirx.For
    starts: int
    work: float

    @property
    def extent(self) -> int:
        """Iterations of a start."""
        return int(self.loop.extent)


@dataclass(frozen=True)
class Work:
    """The work of a kernel, in vector operations, loads and stores.

    Attributes
    ----------
    total
        All of it.
    regions
        Its parallel loops; what is in none of them is done by one thread.
    """

    total: float
    regions: tuple[Region, ...]

    def largest_share(self, threads: int) -> float:
        """Work that the busiest thread does: what decides when the kernel is done."""
        parallel = sum(region.work for region in self.regions)
        parts = (region.work * imbalance(region.extent, threads) / threads for region in self.regions)
        return self.total - parallel + sum(parts)


def kernel_work(func: tirx.PrimFunc, vector_bits: int) -> Work:
    """Count the work of a scheduled kernel.

    Parameters
    ----------
    vector_bits
        Width of the target's vector registers.
    """
    regions = tuple(
        Region(loop, starts, _steps(executed_in(loop, vector_bits, starts)))
        for loop, starts in _parallel_loops(func.body)
    )
    return Work(_steps(executed_in(func.body, vector_bits)), regions)


def _steps(counts: Mapping[str, float]) -> float:
    kinds = ("sum_ops", "sum_loads", "vector_ops", "vector_loads", "vector_stores")
    return sum(counts[kind] for kind in (*kinds, "scalar_ops", "scalar_loads", "scalar_stores"))


def _parallel_loops(stmt: tirx.Stmt, starts: int = 1) -> Iterator[tuple[tirx.For, int]]:
    """Give the parallel loops of a statement, and how often each is started."""
    if isinstance(stmt, tirx.For):
        if stmt.kind == tirx.ForKind.PARALLEL:
            yield stmt, starts
        else:
            yield from _parallel_loops(stmt.body, starts * int(stmt.extent))
    else:
        for part in _parts(stmt):
            yield from _parallel_loops(part, starts)


def _parts(stmt: tirx.Stmt) -> list[tirx.Stmt]:
    """Return the statements that a statement is made of."""
    if isinstance(stmt, tirx.SeqStmt):
        return list(stmt.seq)
    if isinstance(stmt, tirx.IfThenElse):
        return [branch for branch in (stmt.then_case, stmt.else_case) if branch is not None]
    if isinstance(stmt, s_tir.SBlockRealize):
        return [stmt.block]
    if isinstance(stmt, s_tir.SBlock):
        return [part for part in (stmt.init, stmt.body) if part is not None]
    return [stmt.body] if hasattr(stmt, "body") else []


@dataclass(frozen=True)
class Lines:
    """Cache lines that a parallel loop writes.

    Attributes
    ----------
    written
        All of them.
    shared
        Those that several threads write, at whatever time.
    contested
        Those that several threads write at about the same time, if all are equally fast: within an iteration
        of each other. Each write then takes the line from the other thread's cache (false sharing).
    """

    written: int
    shared: int
    contested: int


def written_lines(func: tirx.PrimFunc, threads: int) -> list[Lines]:
    """Count the cache lines that each parallel loop of a scheduled kernel writes, by its threads.

    Counted are tensors that all threads see, at the first start of a loop; what a thread allocates for itself
    is its own.
    """
    module = s_tir.transform.PlanAndUpdateBufferAllocationLocation()(tvm.IRModule({"main": func}))
    return [_lines_of(loop, threads) for loop, _ in _parallel_loops(module["main"].body)]


@dataclass(frozen=True)
class _Write:
    """A block's write: on each axis of a buffer the first place and how many, and when it happens."""

    buffer: Any
    places: Sequence[tuple[tirx.Expr, int]]
    predicate: tirx.Expr | None


def _lines_of(region: tirx.For, threads: int) -> Lines:
    loops: dict[Any, int] = {region.loop_var: int(region.extent)}
    bindings: dict[Any, tirx.Expr] = {}
    own: set[Any] = set()
    writes: list[_Write] = []
    _collect_writes(region.body, loops, bindings, own, writes)
    part = largest_part(int(region.extent), threads)
    found: dict[Any, list[np.ndarray]] = {}  # by buffer, of each write its lines and the iterations of them
    for write in writes:
        if write.buffer in own:
            continue
        values = _Values(loops, bindings)
        flat: Any = 0
        for (first, count), extent in zip(write.places, write.buffer.ty.shape, strict=True):
            flat = flat * int(extent) + values.of(first) + values.several(count)
        lines = flat * tvm.DataType(str(write.buffer.ty.dtype)).itemsize // LINE
        iteration = values.of(region.loop_var)
        wanted = True if write.predicate is None else values.of(write.predicate)
        lines, iteration, wanted = np.broadcast_arrays(lines, iteration, wanted)
        codes = (lines * int(region.extent) + iteration)[np.asarray(wanted, bool)]
        found.setdefault(write.buffer, []).append(np.unique(codes))
    counts = np.zeros(3, np.int64)
    for each in found.values():
        lines, iteration = np.divmod(np.unique(np.concatenate(each)), int(region.extent))
        counts += _count_lines(lines, *np.divmod(iteration, part))
    return Lines(*counts.tolist())


def _count_lines(lines: np.ndarray, thread: np.ndarray, step: np.ndarray) -> tuple[int, int, int]:
    """Count lines: all, of several threads, of several threads within a step; one entry for each write."""
    present = np.unique(lines)
    most = int(step.max(initial=0)) + 2
    of_thread = [(lines * most + step)[thread == number] for number in range(int(thread.max(initial=0)) + 1)]
    shared: list[np.ndarray] = []
    contested: list[np.ndarray] = []
    for first, second in combinations(of_thread, 2):
        shared.append(np.intersect1d(first // most, second // most))
        for shift in (-1, 0, 1):
            contested.append(np.intersect1d(first + shift, second) // most)
    several, at_once = (np.unique(np.concatenate([*some, lines[:0]])) for some in (shared, contested))
    return len(present), len(several), len(at_once)


def _collect_writes(
    stmt: tirx.Stmt,
    loops: dict[Any, int],
    bindings: dict[Any, tirx.Expr],
    own: set[Any],
    writes: list[_Write],
    predicate: tirx.Expr | None = None,
) -> None:
    """Collect the writes of a statement, the loops around them and what their blocks' positions stand for."""
    if isinstance(stmt, tirx.For):
        loops[stmt.loop_var] = int(stmt.extent)
    elif isinstance(stmt, s_tir.SBlockRealize):
        own.update(stmt.block.alloc_buffers)
        bindings |= {
            axis.var: value for axis, value in zip(stmt.block.iter_vars, stmt.iter_values, strict=True)
        }
        predicate = stmt.predicate if predicate is None else tirx.all(predicate, stmt.predicate)
        if not any(True for _ in _blocks(stmt.block)):
            for region in stmt.block.writes:
                places = [(axis.min, int(axis.extent)) for axis in region.region]
                writes.append(_Write(region.source, places, predicate))
            return
    elif isinstance(stmt, tirx.AllocBuffer):
        own.add(stmt.buffer)
    elif isinstance(stmt, tirx.BufferStore):
        places = [(i.base, int(i.lanes)) if isinstance(i, tirx.Ramp) else (i, 1) for i in stmt.indices]
        writes.append(_Write(stmt.buffer, places, predicate))
    for part in _parts(stmt):
        _collect_writes(part, loops, bindings, own, writes, predicate)


def _blocks(stmt: tirx.Stmt) -> Iterator[tirx.Stmt]:
    for part in _parts(stmt):
        if isinstance(part, s_tir.SBlockRealize):
            yield part
        yield from _blocks(part)


_OPERATIONS: dict[type, Any] = {
    tirx.Add: np.add, tirx.Sub: np.subtract, tirx.Mul: np.multiply,
    tirx.FloorDiv: np.floor_divide, tirx.FloorMod: np.mod, tirx.Min: np.minimum, tirx.Max: np.maximum,
    tirx.LT: np.less, tirx.LE: np.less_equal, tirx.GT: np.greater, tirx.GE: np.greater_equal,
    tirx.EQ: np.equal, tirx.NE: np.not_equal, tirx.And: np.logical_and, tirx.Or: np.logical_or,
}  # fmt: skip


class _Values:
    """Values of positions in all iterations of some loops at once; each variable that occurs has an axis."""

    def __init__(self, loops: Mapping[Any, int], bindings: Mapping[Any, tirx.Expr]) -> None:
        self._loops = loops
        self._bindings = bindings
        self._axes: dict[Any, Any] = {}
        self._count = 0

    def of(self, value: tirx.Expr) -> Any:
        """Return the values of an expression."""
        if isinstance(value, tirx.IntImm):
            return int(value)
        if value in self._axes:
            return self._axes[value]
        if isinstance(value, tirx.Var):
            return self._variable(value)
        if isinstance(value, tirx.Cast):
            return self.of(value.value)
        return _OPERATIONS[type(value)](self.of(value.a), self.of(value.b))

    def several(self, count: int) -> Any:
        """Return the places from 0 on, on an axis of their own."""
        return 0 if count == 1 else self._axis(count)

    def _variable(self, variable: Any) -> Any:
        if variable in self._bindings:
            found = self.of(self._bindings[variable])
        else:
            # A loop around the parallel one: its first iteration.
            found = self._axis(self._loops[variable]) if variable in self._loops else 0
        self._axes[variable] = found
        return found

    def _axis(self, extent: int) -> np.ndarray:
        self._count += 1
        return np.arange(extent).reshape((extent,) + (1,) * (self._count - 1))
