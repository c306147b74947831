"""Convolutions and dense layers of few bits: products of bytes, summed in 16 bits while they provably fit.

The kernel multiplies uint8 activations by int8 weights and adds pairs of products (vpmaddubsw, 32 products an
instruction on AVX2, where pairs of int16 are 16). `partial` holds 16-bit sums over a chunk of the reduction;
`sums` (annotated) adds the chunks in int32. How large a chunk may be follows from the weights: whatever the
activations, no 16-bit sum leaves its range on the way (see `choose_chunks`), so nothing ever saturates.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tvm import relax, s_tir, te, tirx

from tvm_compress.schedules import packing
from tvm_compress.schedules.int8 import (
    OUT_FUSABLE,
    Tile,
    by_cut,
    divisors,
    parallelize_outputs,
    rank_tiles,
    write_tile,
)
from tvm_compress.schedules.intrin.narrow import DEPTH, INT16_MAX, NarrowDot, narrow_dot_for
from tvm_compress.schedules.kernel import (
    FusedKernel,
    KernelFamily,
    inner,
    kernel_attrs,
    schedule_injective,
    vectorize_inner,
)
from tvm_compress.schedules.packing import IntegerLayer
from tvm_compress.schedules.target_rules import TargetRules

# How many times as fast as INT8's direct kernel this is, on AVX2: the median over 3 x 3 layers of 64 to 512
# channels with 2 to 5 bits on Zen 3 (most 1.6 to 2.1; on a machine that was busy).
SPEEDUP = 1.9

# Each of the three reduced extents (kernel's height, its width, steps of channels) as (outer, inner).
Chunks = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def legalize_layer(
    bb: relax.BlockBuilder, call: relax.Call, layer: IntegerLayer, rules: TargetRules
) -> relax.Expr | None:
    """Replace a call by a call of a narrow kernel, or return None where there is none for it.

    There is one on AVX2 and AVX-512 (without VNNI) for ungrouped layers of uint8 activations with full steps
    of channels, if pairs of products fit 16 bits.
    """
    dot = narrow_dot_for(rules.isa, layer.out_channels)
    chunks = find_chunks(layer, rules)
    if dot is None or chunks is None:
        return None
    packing.check_accumulator(layer, 0, 2**layer.activation_bits - 1)
    tile = rules.choices.cut(layer.info(), "narrow", cuts(layer, dot))
    return bb.call_te(
        _compute(layer, dot, tile, chunks),
        call.args[0],
        relax.const(pack_weight(layer.weight, dot.lanes, tile.vectors * dot.lanes)),
        relax.const(packing.fold_bias(layer)),
        primfunc_name_hint=f"{layer.operator}_narrow",
        primfunc_attrs={"op_pattern": OUT_FUSABLE},
    )


def find_chunks(layer: IntegerLayer, rules: TargetRules) -> Chunks | None:
    """Return how the sums of a layer are cut, None where it has no narrow kernel."""
    dot = narrow_dot_for(rules.isa, layer.out_channels)
    if dot is None or layer.groups != 1 or layer.data_dtype != "uint8" or layer.in_channels % DEPTH:
        return None
    return choose_chunks(layer.weight, 2**layer.activation_bits - 1)


def cuts(layer: IntegerLayer, dot: NarrowDot) -> dict[tuple[int, ...], Tile]:
    """Return the ways to cut a layer, the best by the count of loads first."""
    return by_cut(rank_tiles(layer.out_size, layer.out_channels // dot.lanes, dot.registers))


def choose_chunks(weight: np.ndarray, largest: int) -> Chunks | None:
    """Return the largest chunks of the reduction whose sums int16 holds, None if a step overflows.

    Parameters
    ----------
    weight
        int8 [O, I, KH, KW], I a multiple of 4.
    largest
        Activations lie in [0, largest].
    """
    _, channels, height, width = weight.shape
    for chunks in chunk_candidates(height, width, channels // DEPTH):
        if largest_partial_sum(weight, largest, chunks) <= INT16_MAX:
            return chunks
    return None


def chunk_candidates(height: int, width: int, steps: int) -> Iterator[Chunks]:
    """Give cuts of the reduction of a kernel of `height` x `width` and steps of channels, large to small."""
    yield (1, height), (1, width), (1, steps)
    yield (height, 1), (1, width), (1, steps)
    yield (height, 1), (width, 1), (1, steps)
    for inside in reversed(divisors(steps)):
        yield (height, 1), (width, 1), (steps // inside, inside)


def largest_partial_sum(weight: np.ndarray, largest: int, chunks: Chunks) -> int:
    """Return what no 16-bit sum exceeds in magnitude at any time, for activations in [0, largest].

    A sum of some of the products of a chunk lies between `largest` times the sum of all its negative weights
    and `largest` times that of all its positive ones.
    """
    o = weight.shape[0]
    (ys, y_inside), (xs, x_inside), (ks, k_inside) = chunks
    split = weight.astype(np.int64).reshape(o, ks, k_inside, 2, 2, ys, y_inside, xs, x_inside)
    summed = (2, 4, 6, 8)  # axis 3 are the two halves of a step, which are summed apart
    positive = np.maximum(split, 0).sum(axis=summed).max(initial=0)
    negative = np.minimum(split, 0).sum(axis=summed).min(initial=0)
    return int(largest * max(positive, -negative))


def pack_weight(weight: np.ndarray, lanes: int, block: int) -> np.ndarray:
    """Turn int8 [O, I, KH, KW] into [O / block, KH, KW, I / 4, block / lanes, lanes, 4]."""
    o, i, kh, kw = weight.shape
    split = weight.reshape(o // block, block // lanes, lanes, i // DEPTH, DEPTH, kh, kw)
    return np.ascontiguousarray(split.transpose(0, 5, 6, 3, 1, 2, 4))


def _padded(layer: IntegerLayer, data: te.Tensor) -> te.Tensor:
    """Pad the data with the zero point, as uint8 [N, H, W, C]; `stored` as it is if there is no padding."""
    top, left, _, _ = layer.padding
    n, h, w, ic = layer.data_shape
    height, width = layer.padded_size

    def value(image: Any, y: Any, x: Any, c: Any) -> Any:
        inside = tirx.all(y >= top, y < top + h, x >= left, x < left + w)
        element = data[image, y - top, x - left, c]
        return tirx.if_then_else(inside, element, tirx.const(layer.zero_point, "uint8"))

    return te.compute((n, height, width, ic), value, name="stored")


def _compute(layer: IntegerLayer, dot: NarrowDot, tile: Tile, chunks: Chunks) -> Callable[..., te.Tensor]:
    """Return the te function of (data, packed weight, bias)."""
    n = layer.data_shape[0]
    out_height, out_width = layer.out_size
    (sh, sw), (dh, dw) = layer.strides, layer.dilation
    block = tile.vectors * dot.lanes
    (ys, y_inside), (xs, x_inside), (ks, k_inside) = chunks
    info = {**layer.info(), "tile": [tile.height, tile.width, tile.vectors], "lanes": dot.lanes}
    attrs = kernel_attrs("narrow", info)

    def compute(data: te.Tensor, weight: te.Tensor, bias: te.Tensor) -> te.Tensor:
        stored = _padded(layer, data) if layer.is_padded else data

        def activation(image: Any, y: Any, x: Any, c: Any) -> Any:
            return stored[x, c] if layer.operator == "dense" else stored[image, y, x, c]

        ry = te.reduce_axis((0, y_inside), "ry")
        rx = te.reduce_axis((0, x_inside), "rx")
        rk = te.reduce_axis((0, k_inside), "rk")
        pair = te.reduce_axis((0, 2), "pair")

        def products(*index: Any) -> Any:
            oy, ox, ok, image, y, x, c, half = index
            ky, kx, k = oy * y_inside + ry, ox * x_inside + rx, ok * k_inside + rk
            value = activation(image, y * sh + ky * dh, x * sw + kx * dw, k * DEPTH + half * 2 + pair)
            factor = weight(c // block, ky, kx, k, (c % block) // dot.lanes, c % dot.lanes, half * 2 + pair)
            return te.sum(value.astype("int16") * factor.astype("int16"), axis=[ry, rx, rk, pair])

        shape = (ys, xs, ks, n, out_height, out_width, layer.out_channels, 2)
        partial = te.compute(shape, products, name="partial")
        oy, ox, ok = (
            te.reduce_axis((0, extent), name) for extent, name in ((ys, "oy"), (xs, "ox"), (ks, "ok"))
        )
        half = te.reduce_axis((0, 2), "half")
        sums = te.compute(
            (n, out_height, out_width, layer.out_channels),
            lambda image, y, x, c: te.sum(
                partial[oy, ox, ok, image, y, x, c, half].astype("int32"), axis=[oy, ox, ok, half]
            ),
            name="sums",
            attrs=attrs,
        )
        return packing.add_bias(layer, sums, bias)

    return compute


def schedule(sch: s_tir.Schedule, kernel: FusedKernel, rules: TargetRules) -> None:
    """Schedule a fused narrow PrimFunc in place."""
    info = kernel.info
    tile = Tile(*info["tile"])
    dot = narrow_dot_for(rules.isa, info["OC"])
    assert dot is not None
    assert dot.lanes == info["lanes"]
    *padding, partial = kernel.producers
    for block in padding:
        schedule_injective(sch, block, rules, item_bits=8)
    sums = kernel.main
    image, y, x, c, oy, ox, ok, half = sch.get_loops(sums)
    c_block, c_vector, lane = sch.split(c, [None, tile.vectors, dot.lanes])
    y_tile, y_in = sch.split(y, [None, tile.height])
    x_tile, x_in = sch.split(x, [None, tile.width])
    sch.reorder(image, y_tile, c_block, x_tile, oy, ox, ok, y_in, x_in, c_vector, lane, half)
    write_tile(sch, kernel, c_block, x_tile, dot.lanes)
    parallelize_outputs(sch, kernel, rules, [image, y_tile, c_block], SPEEDUP)
    _schedule_partial(sch, partial, ok, dot)
    init = sch.decompose_reduction(sums, oy)
    vectorize_inner(sch, inner(sch, init, x_tile), dot.lanes)
    sch.tensorize(lane, dot.widen)
    for loop in (y_in, x_in, c_vector):
        sch.unroll(loop)


def _schedule_partial(sch: s_tir.Schedule, partial: s_tir.schedule.SBlockRV, ok: Any, dot: NarrowDot) -> None:
    """Sum a tile's products of a chunk in registers, inside of the loop over chunks `ok`."""
    sch.compute_at(partial, ok, preserve_unit_loops=True)
    sch.set_scope(partial, 0, "local")
    *_, y_in, x_in, c, half, ry, rx, rk, pair = inner(sch, partial, ok)
    c_vector, lane = sch.split(c, [None, dot.lanes])
    sch.reorder(ry, rx, rk, y_in, x_in, c_vector, lane, half, pair)
    init = sch.decompose_reduction(partial, ry)
    *outer, init_lane, init_half = inner(sch, init, ok)
    sch.vectorize(sch.fuse(init_lane, init_half))
    for loop in outer:
        sch.unroll(loop)
    sch.tensorize(lane, dot.multiply)
    for loop in (y_in, x_in, c_vector):
        sch.unroll(loop)


FAMILY = KernelFamily("narrow", schedule)
