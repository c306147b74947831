"""What a scheduled kernel executes, counted from its loops: the numbers that latency models learn best from.

A statement runs as often as the loops around it say. Its operations are counted in vectors of the target, so
that the padding of tiles, scalar remainders and wide integers all show. Of addresses only divisions count,
and branches count both ways: these are features of a model, not a simulation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import tvm
from tvm import s_tir, tirx

from tvm_compress.schedules.kernel import step_of

#: What `executed` counts, in this order.
NAMES = (
    "sum_ops",  # operations of sums of products, in vectors
    "sum_loads",
    "sum_trips",  # how long the innermost sequence of loops of a sum is
    "sum_tile",  # statements of a sum that are unrolled side by side
    "vector_ops",  # operations of all other statements that are vectorised
    "vector_loads",
    "vector_stores",
    "scalar_ops",
    "scalar_loads",
    "scalar_stores",
    "casts",  # among the operations of both: conversions, products and quotients, in vectors
    "products",
    "quotients",
    "iterations",  # of loops that are not unrolled
    "divisions",  # of positions, in statements that are no sums
    "workspace_bytes",
    # Extents of the innermost loops around the statement that executes most, innermost first.
    "inner_trips",
    "middle_trips",
    "outer_trips",
)
_TRIPS = NAMES[-3:]


@dataclass(frozen=True)
class _Loops:
    """The loops around a statement: products of their extents, by kind."""

    serial: int = 1
    unrolled: int = 1
    lanes: int = 1
    trips: int = 1  # of the serial loops since the last one that holds several statements
    extents: tuple[int, ...] = ()  # of the serial loops, outermost first
    vector: tirx.Var | None = None  # of the vectorised loop; within a block, the block's axis that it moves

    @property
    def runs(self) -> int:
        return self.serial * self.unrolled

    def inside(self, loop: tirx.For) -> "_Loops":
        extent = int(loop.extent) if isinstance(loop.extent, tirx.IntImm) else 1
        if loop.kind == tirx.ForKind.VECTORIZED:
            return replace(self, lanes=self.lanes * extent, vector=loop.loop_var)
        if loop.kind == tirx.ForKind.UNROLLED:
            return replace(self, unrolled=self.unrolled * extent)
        return replace(
            self,
            serial=self.serial * extent,
            trips=self.trips * extent,
            extents=(*self.extents, extent) if extent > 1 else self.extents,
        )


@dataclass
class _Counter:
    vector_bits: int
    found: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NAMES, 0.0))
    most: int = 0  # vectors that the statement executing most has computed

    def visit(self, stmt: tirx.Stmt, loops: _Loops, reduces: bool = False) -> None:
        """Count what a statement executes within its loops."""
        if isinstance(stmt, tirx.For):
            inner = loops.inside(stmt)
            if inner.serial != loops.serial:
                self.found["iterations"] += inner.runs
            self.visit(stmt.body, inner, reduces)
        elif isinstance(stmt, tirx.SeqStmt):
            for part in stmt.seq:
                self.visit(part, replace(loops, trips=1), reduces)
        elif isinstance(stmt, s_tir.SBlockRealize):
            if not _reduces(stmt.block):
                self.found["divisions"] += loops.runs * sum(map(_divisions, stmt.iter_values))
            self.visit(stmt.block, replace(loops, vector=_moved_by(loops.vector, stmt)), reduces)
        elif isinstance(stmt, s_tir.SBlock):
            self._visit_block(stmt, loops)
        elif isinstance(stmt, tirx.IfThenElse):
            for branch in (stmt.then_case, stmt.else_case):
                if branch is not None:
                    self.visit(branch, loops, reduces)
        elif isinstance(stmt, tirx.BufferStore):
            self._count_store(stmt, loops, reduces)
        elif isinstance(stmt, tirx.Evaluate):
            self._count_values([stmt.value], loops, "scalar")
        elif hasattr(stmt, "body"):
            self.visit(stmt.body, loops, reduces)

    def _visit_block(self, block: s_tir.SBlock, loops: _Loops) -> None:
        for buffer in block.alloc_buffers:
            elements = math.prod(int(extent) for extent in buffer.shape)
            self.found["workspace_bytes"] += elements * _bytes(buffer)
        if block.init is not None:
            self.visit(block.init, loops)
        self.visit(block.body, loops, _reduces(block))

    def _count_store(self, store: tirx.BufferStore, loops: _Loops, reduces: bool) -> None:
        lanes = loops.lanes * _lanes(store.value)
        kind = "sum" if reduces else "vector" if lanes > 1 else "scalar"
        work = loops.runs * self._vectors(store.value, loops.lanes)
        if work > self.most:
            self.most = work
            extents = (1,) * len(_TRIPS) + loops.extents
            self.found |= zip(_TRIPS, map(float, reversed(extents)), strict=False)
        if reduces:
            self.found["sum_trips"] = max(self.found["sum_trips"], float(loops.trips))
            self.found["sum_tile"] = max(self.found["sum_tile"], float(loops.unrolled))
        elif loops.vector is not None and _is_scattered(store, loops.vector):
            self.found["scalar_stores"] += loops.runs * lanes
        else:
            self.found[f"{kind}_stores"] += loops.runs * self._vectors(store.value, loops.lanes)
        self._count_values([store.value], loops, kind)

    def _count_values(
        self, values: Sequence[tirx.Expr], loops: _Loops, kind: str, share: float = 1.0
    ) -> None:
        """Count loads and operations of expressions that are computed in a share of the loops' runs."""
        pending = list(values)
        while pending:
            value = pending.pop()
            runs = share * loops.runs
            if isinstance(value, tvm.ir.expr.TensorLoad):
                self.found[f"{kind}_loads"] += runs * self._vectors(value, loops.lanes)
                continue
            choices = _choices(value)
            if len(choices) > 1:
                self._count_values(choices, loops, kind, share / len(choices))
                continue
            parts = _operands(value)
            if parts:
                vectors = max(self._vectors(part, loops.lanes) for part in (value, *parts[:1]))
                self.found[f"{kind}_ops"] += runs * self._vectors(value, loops.lanes)
                if kind != "sum" and (special := _SPECIAL.get(type(value))):
                    self.found[special] += runs * vectors
                pending += parts

    def _vectors(self, value: tirx.Expr, lanes: int) -> int:
        return math.ceil(lanes * _lanes(value) * _bits(value) / self.vector_bits)


def executed(func: tirx.PrimFunc, vector_bits: int) -> dict[str, float]:
    """Count what one call of a scheduled kernel executes.

    Parameters
    ----------
    vector_bits
        Width of the target's vector registers.

    Returns
    -------
    Every one of `NAMES`.
    """
    return executed_in(func.body, vector_bits)


def executed_in(stmt: tirx.Stmt, vector_bits: int, runs: int = 1) -> dict[str, float]:
    """Count what so many runs of a statement of a scheduled kernel execute, as `executed`."""
    counter = _Counter(vector_bits)
    counter.visit(stmt, _Loops(serial=runs))
    return counter.found


def _reduces(block: s_tir.SBlock) -> bool:
    return any(axis.iter_type == tirx.IterVar.CommReduce for axis in block.iter_vars)


def _moved_by(loop: tirx.Var | None, realize: s_tir.SBlockRealize) -> tirx.Var | None:
    """Return the axis of a block that moves by 1 when a loop does, if there is one."""
    if loop is None:
        return None
    pairs = zip(realize.block.iter_vars, realize.iter_values, strict=True)
    return next((axis.var for axis, value in pairs if step_of((1,), (value,), loop) == 1), None)


def _is_scattered(store: tirx.BufferStore, vector: tirx.Var) -> bool:
    """Whether the values of a vector go to places apart from each other."""
    return step_of(store.buffer.shape, store.indices, vector) not in (0, 1)


def _choices(value: tirx.Expr) -> list[tirx.Expr]:
    """Return the values of which a position chooses: `Select(i == 0, a, Select(i == 1, b, c))` gives a, b, c.

    The position's loop is unrolled, so that the choice itself takes nothing, and each comes equally often.
    """
    if not isinstance(value, tirx.Select) or not isinstance(value.condition, tirx.EQ):
        return [value]
    if not isinstance(value.condition.b, tirx.IntImm):
        return [value]
    return [value.true_value, *_choices(value.false_value)]


def _divisions(value: tirx.Expr) -> int:
    """Divisions and remainders in an expression."""
    here = isinstance(value, tirx.FloorDiv | tirx.FloorMod)
    return here + sum(map(_divisions, _operands(value)))


# Operations that take longer than others.
_SPECIAL = {tirx.Cast: "casts", tirx.Mul: "products", tirx.Div: "quotients"}
# Attributes that hold what an operation works on, by kind of expression.
_OPERANDS = (("a", "b"), ("condition", "true_value", "false_value"), ("value",), ("args",), ("vectors",))


def _operands(value: tirx.Expr) -> list[tirx.Expr]:
    for names in _OPERANDS:
        if all(hasattr(value, name) for name in names):
            found = [getattr(value, name) for name in names]
            if names[0] in ("args", "vectors"):
                found = list(found[0])
            return [part for part in found if isinstance(part, tvm.ir.Expr)]
    return []


def _type(value: tirx.Expr) -> tvm.DataType:
    return tvm.DataType(str(value.ty.dtype))


def _lanes(value: tirx.Expr) -> int:
    return max(1, int(_type(value).lanes))


def _bits(value: tirx.Expr) -> int:
    return int(_type(value).bits)


def _bytes(buffer: tirx.Buffer) -> int:
    return max(1, tvm.DataType(str(buffer.dtype)).bits // 8)
