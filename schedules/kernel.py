"""The frame of all kernel families: annotations, the parts of a fused PrimFunc, schedule helpers."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, s_tir, sym, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

from tvm_compress.errors import KernelError
from tvm_compress.schedules.target_rules import TargetRules

# Attributes of a kernel's main te.compute; they survive FuseTIR as block annotations (a PrimFunc's do not).
KERNEL = "tvm_compress.kernel"  # name of the family that schedules the block
INFO = "tvm_compress.info"  # JSON: what the kernel computes, see kernel_attrs

# A parallel region is worth its start (a few us) from this many multiply-accumulates of fp32 or INT8 on;
# those of few bits, which are faster, count for less.
MIN_PARALLEL_MACS = 400_000
# The same for element-wise work, in elements of 32 bits.
MIN_PARALLEL_ELEMENTS = 32_768


@dataclass(frozen=True)
class KernelFamily:
    """A way to compute convolutions and dense layers, such as direct fp32 or bit-serial.

    Attributes
    ----------
    name
        The value of the block annotation KERNEL; "fp32", "int8" and "bitserial" are also what sites' schemes
        are called, "narrow" and "lookup" are other ways to compute integers.
    schedule
        Schedules the fused PrimFunc in place.
    """

    name: str
    schedule: Callable[[s_tir.Schedule, "FusedKernel", TargetRules], None]


def kernel_attrs(family: str, info: Mapping[str, Any]) -> dict[str, str]:
    """Return the `attrs` of a kernel's main te.compute.

    Parameters
    ----------
    family
        Name of the KernelFamily that will schedule it.
    info
        What it computes: operator ("conv2d" | "dense"), scheme, N, H, W, IC, OC, OH, OW, KH, KW, stride,
        groups, activation_bits, weight_bits, and whatever the family's schedule wants to find again. JSON
        values only.
    """
    return {KERNEL: family, INFO: json.dumps(dict(info), sort_keys=True)}


def conv_geometry(call: relax.Call, weight_shape: Sequence[int]) -> dict[str, Any]:
    """Return a convolution call's shapes and attributes by the names of kernel.kernel_attrs."""
    attrs = call.attrs
    n, h, w, c = (int(extent) for extent in call.args[0].ty.shape)
    top, left, bottom, right = (int(p) for p in attrs["padding"])
    (sh, sw), (dh, dw) = ([int(v) for v in attrs[key]] for key in ("strides", "dilation"))
    oc, _, kh, kw = (int(extent) for extent in weight_shape)
    return {
        "operator": "conv2d",
        "N": n, "H": h, "W": w, "IC": c, "OC": oc, "KH": kh, "KW": kw,
        "OH": (h + top + bottom - dh * (kh - 1) - 1) // sh + 1,
        "OW": (w + left + right - dw * (kw - 1) - 1) // sw + 1,
        "stride": sh, "strides": [sh, sw], "dilation": [dh, dw], "padding": [top, left, bottom, right],
        "groups": int(attrs["groups"]),
    }  # fmt: skip


class FusedKernel:
    """The blocks of one PrimFunc by the part they play around the annotated main block.

    Attributes
    ----------
    main
        The block that carries KERNEL.
    producers
        The blocks that main reads, directly or not, in order: padding, packing, a first stage.
    epilogue
        All other blocks, in order; the last one writes the output. Empty where main itself does.
    family, info
        The values of the annotations, `info` decoded.
    """

    def __init__(self, sch: s_tir.Schedule) -> None:
        self.sch = sch
        blocks = child_blocks(sch)
        mains = [b for b in blocks if annotation(sch, b, KERNEL)]
        if len(mains) != 1:
            names = ", ".join(block_name(sch, b) for b in blocks)
            raise KernelError(
                f"A fused kernel needs exactly 1 annotated block, not {len(mains)}, among: {names}."
            )
        self.main = mains[0]
        self.family = str(annotation(sch, self.main, KERNEL))
        self.info: dict[str, Any] = json.loads(str(annotation(sch, self.main, INFO)))
        before = _ancestors(sch, self.main)
        main_name = block_name(sch, self.main)
        self.producers = [b for b in blocks if block_name(sch, b) in before]
        self.epilogue = [b for b in blocks if block_name(sch, b) not in before | {main_name}]
        # `tensorize` compares annotations, and nobody reads these any more.
        sch.unannotate(self.main, KERNEL)
        sch.unannotate(self.main, INFO)

    def producer(self, name: str) -> SBlockRV | None:
        """Return the producer block of that name, if there is one."""
        return next((b for b in self.producers if block_name(self.sch, b) == name), None)

    def merge_epilogue(self) -> SBlockRV | None:
        """Inline all epilogue blocks but the last, which is returned; None if there is no epilogue."""
        for block in self.epilogue[:-1]:
            self.sch.compute_inline(block)
        return self.epilogue[-1] if self.epilogue else None

    def write_at(self, loop: LoopRV) -> SBlockRV:
        """Keep main's result in a local buffer inside `loop` and write the output from it there.

        Call it after main's loops are in order and before its reduction is decomposed. Returns the block that
        writes: the merged epilogue, or a copy where there is none.
        """
        last = self.merge_epilogue()
        if last is None:
            last = self.sch.cache_write(self.main, 0, "local")
        else:
            self.sch.set_scope(self.main, 0, "local")
        self.sch.reverse_compute_at(last, loop, preserve_unit_loops=True)
        return last


def child_blocks(sch: s_tir.Schedule) -> list[SBlockRV]:
    """Return the blocks of a PrimFunc in order."""
    return list(sch.get_child_blocks(sch.get_sblock("root")))


def block_name(sch: s_tir.Schedule, block: SBlockRV) -> str:
    """Return the name of a block, unique in its function."""
    return str(sch.get(block).name_hint)


def annotation(sch: s_tir.Schedule, block: SBlockRV, key: str) -> Any:
    """Return the value of a block's annotation, or None."""
    return sch.get(block).annotations.get(key)


def _ancestors(sch: s_tir.Schedule, block: SBlockRV) -> set[str]:
    found: set[str] = set()
    pending = [block]
    while pending:
        for producer in sch.get_producers(pending.pop()):
            name = block_name(sch, producer)
            if name not in found:
                found.add(name)
                pending.append(producer)
    return found


def loop_extent(sch: s_tir.Schedule, loop: LoopRV) -> int:
    """Return the constant extent of a loop."""
    return int(sch.get(loop).extent)


def inner(sch: s_tir.Schedule, block: SBlockRV, loop: LoopRV) -> list[LoopRV]:
    """Return the loops of `block` strictly inside `loop`; by position, as unit loops may have vanished."""
    loops = sch.get_loops(block)
    outer = sch.get(loop)
    position = next(k for k, candidate in enumerate(loops) if sch.get(candidate).same_as(outer))
    return list(loops[position + 1 :])


def vectorize_inner(sch: s_tir.Schedule, loops: Sequence[LoopRV], lanes: int, unroll: bool = True) -> None:
    """Vectorise the last of `loops` by `lanes`, and unroll the others.

    Where `lanes` does not divide the extent, the largest power of two that does is taken: a predicate inside
    of a vector would make it scalar.
    """
    *outer, last = loops
    width = vector_factor(loop_extent(sch, last), lanes)
    rest, vector = sch.split(last, [None, width])
    if width > 1:
        sch.vectorize(vector)
    if unroll:
        for loop in (*outer, rest):
            sch.unroll(loop)


def vector_factor(extent: int, lanes: int) -> int:
    """Return the largest power of two up to `lanes` that divides `extent`."""
    width = 1
    while width * 2 <= lanes and extent % (width * 2) == 0:
        width *= 2
    return width


def parallelize(sch: s_tir.Schedule, loop: LoopRV, rules: TargetRules, work: int, least: int) -> None:
    """Run a loop in parallel where the target has threads and `work` reaches `least`."""
    if rules.threads > 1 and work >= least and loop_extent(sch, loop) > 1:
        sch.parallel(loop)


# Most vectors of the last axis that are unrolled.
_VECTORS_OF_A_ROW = 8
# Up to so many channels LLVM computes in vectors by itself, and stores them interleaved (`st3`).
_INTERLEAVED = 4
# Tells TVM's LoopPartition to cut a loop where a predicate of its body stops to hold, so that all whole
# vectors lose the predicate (a predicate inside of a vector makes it scalar).
_CUT = "pragma_loop_partition_hint"


def cut_at_predicate(sch: s_tir.Schedule, loop: LoopRV) -> None:
    """Have a loop cut where the predicate of its body stops to hold."""
    sch.annotate(loop, _CUT, 1)


def vectorize_cut(sch: s_tir.Schedule, loop: LoopRV, lanes: int) -> LoopRV:
    """Split a loop into vectors, cutting off what is left after the last full one; returns the outer loop."""
    extent = loop_extent(sch, loop)
    width = vector_width(extent, lanes)
    rest, vector = sch.split(loop, [None, width])
    if width > 1:
        sch.vectorize(vector)
    if extent % width:
        cut_at_predicate(sch, rest)
    return rest


def vector_width(extent: int, lanes: int) -> int:
    """Return the power of two up to `lanes` with which a loop takes the fewest steps.

    What is left after the last full vector takes a step each: 24 values are three vectors of 8 rather than
    one of 16 and 8 single ones.
    """
    widths = [1]
    while widths[-1] * 2 <= min(lanes, extent):
        widths.append(widths[-1] * 2)
    return min(reversed(widths), key=lambda width: extent // width + extent % width)


def schedule_injective(sch: s_tir.Schedule, block: SBlockRV, rules: TargetRules, item_bits: int = 32) -> None:
    """Schedule a padding, packing or element-wise block: vectors inside, parallel outside if large.

    Where every access is at the block's own position, all its loops become one, unless vectors would lie
    across two rows of the last axis; else the last axis is vectorised if every access is contiguous along it.
    A transposition takes the last axis along which its reads are: it reads vectors, and stores their values
    one by one.
    """
    loops = list(sch.get_loops(block))
    if not loops:
        return
    work = math.prod(loop_extent(sch, loop) for loop in loops)
    lanes = max(1, rules.vector_bits // item_bits)
    extent = loop_extent(sch, loops[-1])
    width = vector_width(extent, lanes)
    if len(loops) > 1 and extent % width == 0 and is_pointwise(sch, block):
        loops, lanes = [sch.fuse(*loops)], width if extent > 1 else lanes
    *outer, last = loops
    if is_contiguous(sch, block):
        extent = loop_extent(sch, last)
        rest = vectorize_cut(sch, last, lanes)
        if extent % vector_width(extent, lanes) == 0:
            if outer:
                # All vectors of a row are inside of an image or none: so a branch serves several.
                width = vector_factor(loop_extent(sch, rest), _VECTORS_OF_A_ROW)
                rest, several = sch.split(rest, [None, width])
                sch.unroll(several)
            outer = [*outer, rest]
    elif (axis := _axis_of_reads(sch, block, lanes)) is not None:
        after = loops[axis + 1 :]
        rest, vector = sch.split(loops[axis], [None, vector_factor(loop_extent(sch, loops[axis]), lanes)])
        sch.reorder(rest, *after, vector)
        sch.vectorize(vector)
        outer = [*loops[:axis], rest]
    else:
        outer = loops[:-1] or loops
    if outer:
        fused = sch.fuse(*outer) if len(outer) > 1 else outer[0]
        parallelize(sch, fused, rules, work * item_bits // 32, MIN_PARALLEL_ELEMENTS)


def is_pointwise(sch: s_tir.Schedule, block: SBlockRV) -> bool:
    """Whether a block reads and writes only at its own position, in buffers of its own shape."""
    stmt = sch.get(block)
    own = [it.var for it in stmt.iter_vars]
    shape = [int(it.dom.extent) for it in stmt.iter_vars]
    for extents, indices in _accesses(stmt):
        own_shape = [int(extent) for extent in extents] == shape
        if not own_shape or not all(i.same_as(var) for i, var in zip(indices, own, strict=True)):
            return False
    return True


def is_contiguous(sch: s_tir.Schedule, block: SBlockRV, axis: int = -1) -> bool:
    """Whether each access of a block moves by 0 or 1 elements when the block's `axis` moves by 1."""
    stmt = sch.get(block)
    return all(step in (0, 1) for step in _steps(_accesses(stmt), stmt.iter_vars[axis].var))


def _axis_of_reads(sch: s_tir.Schedule, block: SBlockRV, lanes: int) -> int | None:
    """Return the last axis that divides into vectors and along which all reads are, whatever it writes."""
    stmt = sch.get(block)
    reads = _reads(stmt)
    for axis in reversed(range(len(stmt.iter_vars))):
        if vector_factor(int(stmt.iter_vars[axis].dom.extent), lanes) == 1:
            continue
        steps = _steps(reads, stmt.iter_vars[axis].var)
        if 1 in steps and all(step in (0, 1) for step in steps):
            behind = math.prod(int(it.dom.extent) for it in stmt.iter_vars[axis + 1 :])
            return axis if axis < len(stmt.iter_vars) - 2 or behind > _INTERLEAVED else None
    return None


# The buffer's shape and the indices.
_Access = tuple[Sequence[Any], Sequence[Any]]


def _steps(accesses: Sequence[_Access], var: tirx.Var) -> list[int | None]:
    return [step_of(*access, var) for access in accesses]


def step_of(shape: Sequence[Any], indices: Sequence[Any], var: tirx.Var) -> int | None:
    """Return the elements that an access to a buffer moves by when `var` moves by 1; None if they differ."""
    address: Any = tirx.const(0, "int64")
    for index, extent in zip(indices, shape, strict=True):
        address = address * extent + index
    linear = sym.detect_linear_equation(address, [var])
    return int(linear[0]) if linear and isinstance(linear[0], tirx.IntImm) else None


def _accesses(stmt: tirx.Stmt) -> list[_Access]:
    """Return the buffer accesses of a block's body."""
    found = _reads(stmt)

    def store(node: tirx.BufferStore) -> None:
        found.append((node.buffer.shape, node.indices))

    tvm_ffi.structural_walk(stmt.body, [(tirx.BufferStore, store)])
    return found


def _reads(stmt: tirx.Stmt) -> list[_Access]:
    """Return what a block's body reads."""
    found: list[_Access] = []

    def load(node: tvm.ir.expr.TensorLoad) -> None:
        found.append((node.source.ty.shape, node.indices))

    tvm_ffi.structural_walk(stmt.body, [(tvm.ir.expr.TensorLoad, load)])
    return found


def constant_array(expr: relax.Expr, what: str) -> Any:
    """Return the numpy value of a constant argument, such as a kernel's weights.

    Raises
    ------
    KernelError
        Where the argument is not a constant.
    """
    if not isinstance(expr, tvm.ir.GenericConst):
        raise KernelError(
            f"The {what} of a kernel must be a constant, not {expr}.", "Bind the parameters before lowering."
        )
    return expr.value.numpy()
