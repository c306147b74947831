"""All but convolutions and dense layers: the dialect's element-wise operators, and schedules for the rest."""

import contextlib
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import tvm
from tvm import relax, s_tir, te, tirx, topi
from tvm.s_tir.schedule import SBlockRV

from tvm_compress.errors import KernelError
from tvm_compress.schedules import kernel
from tvm_compress.schedules.target_rules import TargetRules

# Vectors that a reduction accumulates at once: hides the latency of the addition.
_REDUCTION_VECTORS = 4
# Positions of a window up to which its loops are unrolled.
_UNROLLED_WINDOW = 16


@cache
def allow_vector_rounding() -> None:
    """Tell TVM that rounding exists for vectors; without it a quantization is computed value by value."""
    tvm.ir.register_op_attr("tirx.nearbyint", "TVectorizable", True)


def legalize_quantize(bb: relax.BlockBuilder, call: relax.Call, rules: TargetRules) -> relax.Expr:
    """Replace tvm_compress.quantize; see schedules.ops for what it computes."""
    attrs = call.attrs
    scale, zero_point = float(attrs["scale"]), float(int(attrs["zero_point"]))
    low, high = float(int(attrs["qmin"])), float(int(attrs["qmax"]))
    dtype = str(attrs["dtype"])
    # A Cortex-A72 divides four values in 35 cycles; x86's division is as fast as the rest.
    multiplies = rules.is_arm and reciprocal_is_exact(scale, low - zero_point, high - zero_point)

    def value(x: Any) -> Any:
        # The clamp comes before the cast, which is undefined outside of the type's range.
        if multiplies:
            x = _clamped(x, (low - zero_point) * scale, (high - zero_point) * scale)
            steps = tirx.nearbyint(_divided(x, scale)) + tirx.const(zero_point, "float32")
        else:
            steps = tirx.nearbyint(x / tirx.const(scale, "float32")) + tirx.const(zero_point, "float32")
            steps = _clamped(steps, low, high)
        return steps.astype("int32").astype(dtype)

    def compute(x: te.Tensor) -> te.Tensor:
        return te.compute(x.shape, lambda *i: value(x(*i)), name="quantize")

    return bb.call_te(compute, call.args[0], primfunc_name_hint="quantize")


def _clamped(x: Any, low: float, high: float) -> Any:
    return tirx.max(tirx.min(x, tirx.const(high, "float32")), tirx.const(low, "float32"))


def _divided(x: Any, scale: float) -> Any:
    """Return x / scale without a division: a product with 1 / scale, corrected by what it leaves over."""
    inverse, minus = (tirx.const(float(value), "float32") for value in _inverse(scale))
    quotient = x * inverse
    rest = tirx.call_intrin("float32", "tirx.fma", quotient, minus, x)
    return tirx.call_intrin("float32", "tirx.fma", rest, inverse, quotient)


def _inverse(scale: float) -> tuple[np.float32, np.float32]:
    """Return 1 / scale and -scale."""
    return np.float32(1) / np.float32(scale), -np.float32(scale)


# Scales above this leave room for the rest of a division; next to each step so many values are tried.
_LEAST_SCALE = 1e-25
_NEIGHBOURS = 8


def reciprocal_is_exact(scale: float, low: float, high: float) -> bool:
    """Whether `_divided` rounds to the same integers as a division, for all results from `low` to `high`.

    Both are within two units in the last place of the quotient, so they can differ only for the few values
    next to a step from one integer to the next: all of these are tried.
    """
    if not _LEAST_SCALE < scale < 1 / _LEAST_SCALE:
        return False
    steps = np.arange(low - 1, high + 1, dtype=np.float64) + 0.5
    bits = (steps * np.float64(np.float32(scale))).astype(np.float32).view(np.int32)
    x = (bits[:, None] + np.arange(-_NEIGHBOURS, _NEIGHBOURS + 1, dtype=np.int32)).view(np.float32)
    inverse, minus = (np.float64(value) for value in _inverse(scale))
    quotient = x * np.float32(inverse)
    rest = (quotient * minus + x).astype(np.float32)
    corrected = (rest * inverse + quotient).astype(np.float32)
    return bool((np.rint(corrected) == np.rint(x / np.float32(scale))).all())


def legalize_dequantize(bb: relax.BlockBuilder, call: relax.Call, rules: TargetRules) -> relax.Expr:
    """Replace tvm_compress.dequantize; see schedules.ops for what it computes."""
    zero_point = int(call.attrs["zero_point"])

    def compute(x: te.Tensor, scale: te.Tensor) -> te.Tensor:
        def value(*i: Any) -> Any:
            factor = _per_channel(scale, i)
            return (x(*i).astype("int32") - zero_point).astype("float32") * factor

        return te.compute(x.shape, value, name="dequantize")

    return bb.call_te(compute, *call.args, primfunc_name_hint="dequantize")


def legalize_requantize(bb: relax.BlockBuilder, call: relax.Call, rules: TargetRules) -> relax.Expr:
    """Replace tvm_compress.requantize; see schedules.ops for what it computes.

    What its `bound`, its multipliers and its shift prove decides how wide the integers are on the way: the
    narrower, the more values a vector holds (see `Arithmetic`). A multiplier of 1 and bounds that hold
    anyway are left out.
    """
    attrs = call.attrs
    shift, zero_point = int(attrs["shift"]), int(attrs["zero_point"])
    low, high, dtype = int(attrs["qmin"]), int(attrs["qmax"]), str(attrs["dtype"])
    if not 0 <= shift <= 62:
        raise KernelError(f"A requantization's shift must lie within 0 and 62, not at {shift}.")
    factors = kernel.constant_array(call.args[1], "multiplier").astype(np.int64)
    bound = int(attrs["bound"]) if "bound" in attrs else 2**31
    limits = (low - zero_point, high - zero_point)
    chosen = choose_arithmetic(factors, shift, bound, zero_point, low, high)
    # Beyond both limits it is all the same how large: then all multipliers lead to one function (`te_cache`).
    chosen = replace(chosen, largest=min(chosen.largest, max(-limits[0], limits[1]) + 1))
    identity = factors.size == 1 and int(factors.flat[0]) == 1

    def value(x: Any, *multiplier: Any) -> Any:
        factor = multiplier[0] if multiplier else None
        if chosen.by_halves and factor is not None:
            rounded = rounded_high_product(x, factor, shift)
        else:
            rounded = rounded_product(x, factor, shift, chosen.product)
        rounded = rounded.astype(chosen.result)
        return clamp(rounded, chosen.result, *limits, zero_point, chosen.largest).astype(dtype)

    def compute(x: te.Tensor, *multiplier: te.Tensor) -> te.Tensor:
        return te.compute(
            x.shape,
            lambda *i: value(x(*i), *(_per_channel(factor, i) for factor in multiplier)),
            name="requantize",
        )

    args = call.args[:1] if identity else call.args
    return bb.call_te(compute, *args, primfunc_name_hint="requantize")


@dataclass(frozen=True)
class Arithmetic:
    """The integers that a requantization computes with.

    Attributes
    ----------
    by_halves
        Whether the product is cut to its upper 33 bits before it is rounded, see `rounded_high_product`.
    product
        Type of the product, where it is not.
    result
        Type from the rounded product on.
    largest
        What the rounded product never exceeds in magnitude.
    """

    by_halves: bool
    product: str
    result: str
    largest: int


def choose_arithmetic(
    factors: np.ndarray, shift: int, bound: int, zero_point: int, low: int, high: int
) -> Arithmetic:
    """Return the narrowest integers that hold what |x| <= bound leads to.

    Parameters
    ----------
    factors
        int64, the multipliers.
    """
    product = bound * int(np.abs(factors).max(initial=0)) + ((1 << shift) >> 1)
    largest = product >> shift
    ends = (largest, -largest, low - zero_point, high - zero_point)
    results = [*ends, *(end + zero_point for end in ends)]
    result = next(
        dtype
        for dtype in ("int16", "int32", "int64")
        if dtype == "int64" or all(abs(value) <= np.iinfo(dtype).max for value in results)
    )
    narrow = product < 2**31
    by_halves = not narrow and shift > HIGH_SHIFT and product < 2**62 and not may_tie(factors, shift, bound)
    return Arithmetic(by_halves, "int32" if narrow else "int64", result, largest)


def may_tie(factors: np.ndarray, shift: int, bound: int) -> bool:
    """Whether x * factor / 2**shift may lie exactly between two integers, for some |x| <= bound, x not 0.

    Then 2**(shift - 1) divides the product: its factors of 2 come from the multiplier and from x.
    """
    present = factors[factors != 0]
    if not present.size:
        return False
    twos = int(np.log2(present & -present).max())
    return twos + max(bound.bit_length() - 1, 0) >= shift - 1


def clamp(x: Any, dtype: str, low: int, high: int, offset: int, largest: int) -> Any:
    """Return min(max(x, low), high) + offset, without bounds that |x| <= largest implies or a zero offset.

    The offset is added first: clamping to the range of bytes and narrowing to them is one instruction.
    """
    if offset:
        x = x + tirx.const(offset, dtype)
    if low > -largest:
        x = tirx.max(x, tirx.const(low + offset, dtype))
    if high < largest:
        x = tirx.min(x, tirx.const(high + offset, dtype))
    return x


# The lower bits of a product that `rounded_high_product` drops.
HIGH_SHIFT = 31


def rounded_high_product(x: Any, multiplier: Any, shift: int) -> Any:
    """Return x * multiplier / 2**shift rounded to nearest, as int32, where no product lies halfway.

    floor((floor(p / 2**31) + half) / 2**s) = floor((p + half * 2**31) / 2**(31 + s)): what is dropped first
    cannot change the result. Of the 64-bit product only the upper part is kept, and all else has 32 bits.
    """
    product = (x.astype("int64") * multiplier.astype("int64")) >> tirx.const(HIGH_SHIFT, "int64")
    rest = shift - HIGH_SHIFT
    return (product.astype("int32") + tirx.const(1 << (rest - 1), "int32")) >> tirx.const(rest, "int32")


def rounded_product(x: Any, multiplier: Any | None, shift: int, dtype: str) -> Any:
    """Return x * multiplier / 2**shift as `dtype`, rounded to nearest, halves away from zero.

    floor((p + half - [p < 0]) / 2**shift): a negative p's half must round down, which taking 1 off does.
    """
    product = x.astype(dtype)
    if multiplier is not None:
        product = product * multiplier.astype(dtype)
    if shift == 0:
        return product
    half = tirx.const(1 << (shift - 1), dtype)
    # An arithmetic shift of the sign gives -1 or 0, without a comparison in the vector.
    sign = product >> tirx.const(np.iinfo(dtype).bits - 1, dtype)
    return (product + half + sign) >> tirx.const(shift, dtype)


def legalize_window_sum(bb: relax.BlockBuilder, call: relax.Call, rules: TargetRules) -> relax.Expr:
    """Replace tvm_compress.window_sum; see schedules.ops for what it computes."""
    (kh, kw), (sh, sw) = ([int(v) for v in call.attrs[key]] for key in ("pool_size", "strides"))
    top, left, bottom, right = (int(p) for p in call.attrs["padding"])
    n, out_h, out_w, channels = (int(extent) for extent in call.ty.shape)

    def compute(x: te.Tensor) -> te.Tensor:
        around = [0, top, left, 0], [0, bottom, right, 0]
        padded = topi.nn.pad(x, *around, pad_value=0) if top + left + bottom + right else x
        dy, dx = te.reduce_axis((0, kh), name="dy"), te.reduce_axis((0, kw), name="dx")
        return te.compute(
            (n, out_h, out_w, channels),
            lambda i, y, z, c: te.sum(padded[i, y * sh + dy, z * sw + dx, c], axis=[dy, dx]),
            name="window_sum",
        )

    return bb.call_te(compute, call.args[0], primfunc_name_hint="window_sum")


def _per_channel(values: te.Tensor, indices: tuple[Any, ...]) -> Any:
    """Return the value for the last index of `indices`, from a tensor of shape [C], [1] or []."""
    if len(values.shape) == 0:
        return values()
    return values[0] if int(values.shape[0]) == 1 else values[indices[-1]]


def schedule_plain(sch: s_tir.Schedule, rules: TargetRules) -> None:
    """Schedule a PrimFunc that holds no kernel: element-wise chains, padding, pools, sums, transpositions."""
    unflatten(sch)
    inline_chains(sch)
    for block in kernel.child_blocks(sch):
        if _is_reduction(sch, block):
            _schedule_reduction(sch, block, rules)
        else:
            kernel.schedule_injective(sch, block, rules)


def unflatten(sch: s_tir.Schedule) -> None:
    """Let a chain that ends flat run over the axes that it began with: no vector crosses divisions."""
    first, *rest = kernel.child_blocks(sch)
    rank = len(sch.get(first).iter_vars)
    if not rest or len(sch.get(rest[-1]).iter_vars) >= rank:
        return
    for block in reversed(rest):
        with contextlib.suppress(s_tir.ScheduleError):
            sch.reverse_compute_inline(block)


def inline_chains(sch: s_tir.Schedule) -> None:
    """Inline every element-wise block that has exactly one consumer."""
    for block in kernel.child_blocks(sch):
        if _is_reduction(sch, block) or len(sch.get_consumers(block)) != 1:
            continue
        sch.compute_inline(block)


def _is_reduction(sch: s_tir.Schedule, block: SBlockRV) -> bool:
    return any(it.iter_type != tirx.IterVar.DataPar for it in sch.get(block).iter_vars)


def _schedule_reduction(sch: s_tir.Schedule, block: SBlockRV, rules: TargetRules) -> None:
    """Accumulate vectors along the last kept axis where the reads are contiguous there (pools, means)."""
    kinds = [it.iter_type for it in sch.get(block).iter_vars]
    loops = list(sch.get_loops(block))
    spatial = sum(kind == tirx.IterVar.DataPar for kind in kinds)
    kept, reduced = loops[:spatial], loops[spatial:]
    work = 1
    for loop in loops:
        work *= kernel.loop_extent(sch, loop)
    if not kept:
        return
    if not kernel.is_contiguous(sch, block, spatial - 1):
        kernel.parallelize(sch, sch.fuse(*kept), rules, work, kernel.MIN_PARALLEL_ELEMENTS)
        return
    *outer, channels = kept
    extent = kernel.loop_extent(sch, channels)
    value = tvm.DataType(str(sch.get(block).writes[0].source.ty.dtype))
    lanes = kernel.vector_width(extent, rules.vector_bits // int(value.bits))
    vectors = next(v for v in range(_REDUCTION_VECTORS, 0, -1) if v == 1 or extent % (v * lanes) == 0)
    rest, several, vector = sch.split(channels, [None, vectors, lanes])
    sch.reorder(*outer, rest, *reduced, several, vector)
    if extent % (vectors * lanes):
        kernel.cut_at_predicate(sch, rest)
    written = sch.cache_write(block, 0, "local")
    sch.reverse_compute_at(written, rest, preserve_unit_loops=True)
    *units, wide = kernel.inner(sch, written, rest)
    copies, copied = sch.split(wide, [None, lanes])
    if lanes > 1:
        sch.vectorize(vector)
        sch.vectorize(copied)
    for loop in (several, copies, *units):
        sch.unroll(loop)
    if outer:
        kernel.parallelize(sch, sch.fuse(*outer), rules, work, kernel.MIN_PARALLEL_ELEMENTS)
    if math.prod(kernel.loop_extent(sch, loop) for loop in reduced) <= _UNROLLED_WINDOW:
        for loop in reduced:
            sch.unroll(loop)
    if reduced:
        sch.decompose_reduction(block, reduced[0])
