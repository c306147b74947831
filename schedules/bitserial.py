"""Bit-serial convolutions and dense layers: exact sums of counted bits, weights and activations of 1-6 bits.

Activations (uint8 in [0, 2**a - 1]) are packed into bit planes by a PrimFunc of its own (see bitpack.py). The
kernel counts `activation bits & weight bits` in 8-bit lanes (`counts`) and sums the counts in int32, weighted
by the planes' places (`sums`, annotated): 2**(r1 + r2), negative for the weights' sign plane.

Weights -1 and +1 are stored as bits u = (w + 1) / 2. For one activation plane p, sum(p * w) = popcount(u) -
popcount(p ^ u): the kernel counts p ^ u, and popcount(u), times the sum of all 2**r1, goes into the bias.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax, s_tir, te, tirx

from tvm_compress.errors import KernelError
from tvm_compress.schedules import narrow, packing
from tvm_compress.schedules.bitpack import pack_activations
from tvm_compress.schedules.int8 import (
    OUT_FUSABLE,
    Tile,
    by_cut,
    parallelize_outputs,
    rank_tiles,
    write_tile,
)
from tvm_compress.schedules.intrin.bits import MAX_STEPS, WORD_CHANNELS, BitDot, bit_dot_for, combine
from tvm_compress.schedules.kernel import FusedKernel, KernelFamily, inner, kernel_attrs, vectorize_inner
from tvm_compress.schedules.packing import IntegerLayer
from tvm_compress.schedules.target_rules import MAX_BITSERIAL_BITS, TargetRules

# About how many times as fast as by the INT8 kernel a multiply-accumulate of 1 x 1 bits is (on the emulated
# Cortex-A72: 56 and 7 a cycle).
_SPEEDUP = 8.0


def legalize(bb: relax.BlockBuilder, call: relax.Call, layer: IntegerLayer, rules: TargetRules) -> relax.Expr:
    """Replace a call that `check_legal` accepts by a packing of its activations and a kernel."""
    dot = bit_dot_for(rules.isa, _operation(layer), layer.out_channels)
    tile = rules.choices.cut(layer.info(), "popcount", cuts(layer, rules))
    weight = packing.pack_weight_bits(layer.weight, layer.weight_bits, tile.vectors * dot.lanes)
    packed = pack_activations(bb, call.args[0], layer, rules)
    return bb.call_te(
        _compute(layer, dot, tile),
        packed,
        relax.const(weight),
        relax.const(plane_coefficients(layer)),
        relax.const(_bias(layer)),
        primfunc_name_hint=f"{layer.operator}_bitserial",
        primfunc_attrs={"op_pattern": OUT_FUSABLE},
    )


def cuts(layer: IntegerLayer, rules: TargetRules) -> dict[tuple[int, ...], Tile]:
    """Return the ways to cut a layer, the best by the count of loads first."""
    dot = bit_dot_for(rules.isa, _operation(layer), layer.out_channels)
    return by_cut(rank_tiles(layer.out_size, layer.out_channels // dot.lanes, dot.registers))


def check_legal(layer: IntegerLayer, rules: TargetRules) -> None:
    """Raise KernelError, with the rule, where no bit-serial kernel computes the layer."""
    rule = rules.bitserial_legal(
        layer.operator, layer.in_channels, layer.out_channels, layer.groups, *layer.out_size
    )
    hint = "Use scheme int8 for this site."
    if rule:
        raise KernelError(f"This {layer.operator} has no bit-serial kernel: {rule}.", hint)
    for what, bits in (("weight", layer.weight_bits), ("activation", layer.activation_bits)):
        if not 1 <= bits <= MAX_BITSERIAL_BITS:
            raise KernelError(f"Bit-serial {what}s have 1 to {MAX_BITSERIAL_BITS} bits, not {bits}.", hint)
    if layer.data_dtype != "uint8":
        raise KernelError(f"Bit-serial activations are uint8, not {layer.data_dtype}.", hint)
    packing.check_accumulator(layer, 0, 2**layer.activation_bits - 1)


def _operation(layer: IntegerLayer) -> str:
    return "xor" if layer.weight_bits == 1 else "and"


def plane_coefficients(layer: IntegerLayer) -> np.ndarray:
    """Return what the counts of each pair of planes are worth: int32 [activation_bits, weight_bits]."""
    places = np.left_shift.outer(
        1 << np.arange(layer.activation_bits), np.arange(layer.weight_bits), dtype=np.int64
    )
    places[:, -1] *= -1  # the sign plane, or the counts of bits that differ
    return places.astype(np.int32)


def _bias(layer: IntegerLayer) -> np.ndarray:
    bias = packing.fold_bias(layer).astype(np.int64)
    if layer.weight_bits == 1:
        ones = (layer.weight > 0).sum(axis=(1, 2, 3))
        bias = bias + ones * (2**layer.activation_bits - 1)
    return bias.astype(np.int32)


def split_reduction(kernel_height: int, kernel_width: int, words: int) -> narrow.Chunks:
    """Split each of the three reduced extents as (outer, inner), the product of the inner ones <= MAX_STEPS.

    The inner ones are counted in 8 bits, so that overflow is impossible by construction.
    """
    candidates = narrow.chunk_candidates(kernel_height, kernel_width, words)
    return next(chunks for chunks in candidates if math.prod(inside for _, inside in chunks) <= MAX_STEPS)


def _compute(layer: IntegerLayer, dot: BitDot, tile: Tile) -> Callable[..., te.Tensor]:
    """Return the te function of (packed activations, packed weight, coefficients, bias)."""
    n = layer.data_shape[0]
    out_height, out_width = layer.out_size
    (sh, sw), (dh, dw) = layer.strides, layer.dilation
    block = tile.vectors * dot.lanes
    activation_bits, weight_bits = layer.activation_bits, layer.weight_bits
    splits = split_reduction(*layer.kernel, layer.in_channels // WORD_CHANNELS)
    (ys, y_inside), (xs, x_inside), (ks, k_inside) = splits
    attrs = kernel_attrs(
        "bitserial",
        {**layer.info(), "tile": [tile.height, tile.width, tile.vectors], "operation": dot.operation},
    )

    def compute(data: te.Tensor, weight: te.Tensor, coefficients: te.Tensor, bias: te.Tensor) -> te.Tensor:
        ry = te.reduce_axis((0, y_inside), "ry")
        rx = te.reduce_axis((0, x_inside), "rx")
        rk = te.reduce_axis((0, k_inside), "rk")

        def products(*index: Any) -> Any:
            a, w, oy, ox, ok, image, y, x, c, byte = index
            ky, kx, k = oy * y_inside + ry, ox * x_inside + rx, ok * k_inside + rk
            activations = data[image, y * sh + ky * dh, x * sw + kx * dw, a, k, byte]
            weights = weight(c // block, w, ky, kx, k, c % block, byte)
            return te.sum(tirx.popcount(combine(dot.operation, activations, weights)), axis=[ry, rx, rk])

        shape = (activation_bits, weight_bits, ys, xs, ks, n, out_height, out_width, layer.out_channels, 4)
        counts = te.compute(shape, products, name="counts")
        ra = te.reduce_axis((0, activation_bits), "ra")
        rw = te.reduce_axis((0, weight_bits), "rw")
        oy, ox, ok = (
            te.reduce_axis((0, extent), name) for extent, name in ((ys, "oy"), (xs, "ox"), (ks, "ok"))
        )
        byte = te.reduce_axis((0, 4), "byte")
        sums = te.compute(
            (n, out_height, out_width, layer.out_channels),
            lambda image, y, x, c: te.sum(
                counts[ra, rw, oy, ox, ok, image, y, x, c, byte].astype("int32") * coefficients[ra, rw],
                axis=[ra, rw, oy, ox, ok, byte],
            ),
            name="sums",
            attrs=attrs,
        )
        return packing.add_bias(layer, sums, bias)

    return compute


def schedule(sch: s_tir.Schedule, kernel: FusedKernel, rules: TargetRules) -> None:
    """Schedule a fused bit-serial PrimFunc in place: loops over planes stay rolled, tiles in registers."""
    info = kernel.info
    dot = bit_dot_for(rules.isa, info["operation"], info["OC"])
    tile = Tile(*info["tile"])
    sums = kernel.main
    (counts,) = kernel.producers
    image, y, x, c, ra, rw, oy, ox, ok, byte = sch.get_loops(sums)
    c_block, c_vector, lane = sch.split(c, [None, tile.vectors, dot.lanes])
    y_tile, y_in = sch.split(y, [None, tile.height])
    x_tile, x_in = sch.split(x, [None, tile.width])
    sch.reorder(image, y_tile, c_block, x_tile, ra, rw, oy, ox, ok, y_in, x_in, c_vector, lane, byte)
    write_tile(sch, kernel, c_block, x_tile, dot.lanes)
    speedup = _SPEEDUP / (info["activation_bits"] * info["weight_bits"])
    parallelize_outputs(sch, kernel, rules, [image, y_tile, c_block], speedup)
    _schedule_counts(sch, counts, ok, dot)
    init = sch.decompose_reduction(sums, ra)
    vectorize_inner(sch, inner(sch, init, x_tile), dot.lanes)
    sch.tensorize(lane, dot.weigh)
    for loop in (y_in, x_in, c_vector):
        sch.unroll(loop)


def _schedule_counts(sch: s_tir.Schedule, counts: s_tir.schedule.SBlockRV, ok: Any, dot: BitDot) -> None:
    """Count a tile's bits in registers, inside of the loop over chunks `ok`."""
    sch.compute_at(counts, ok, preserve_unit_loops=True)
    sch.set_scope(counts, 0, "local")
    *_, y_in, x_in, c, byte, ry, rx, rk = inner(sch, counts, ok)
    c_vector, lane = sch.split(c, [None, dot.lanes])
    sch.reorder(ry, rx, rk, y_in, x_in, c_vector, lane, byte)
    init = sch.decompose_reduction(counts, ry)
    *outer, init_lane, init_byte = inner(sch, init, ok)
    sch.vectorize(sch.fuse(init_lane, init_byte))
    for loop in outer:
        sch.unroll(loop)
    sch.tensorize(lane, dot.count)
    for loop in (y_in, x_in, c_vector):
        sch.unroll(loop)


FAMILY = KernelFamily("bitserial", schedule)
