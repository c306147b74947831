"""Convolutions of weights of 1-4 bits by table lookup (Arm), for activations of up to 8 bits; exact.

For each pixel and each 4 input channels a table holds the 16 sums of some of the activations (`tables`). The
bits of 4 weights select an entry for each output channel: `lookups` adds entries in 16 bits, over chunks of
the reduction that cannot overflow, and `sums` (annotated) adds the chunks in int32, weighted by the bits'
places as bit-serial kernels do. Activations of 7 and 8 bits are two parts of 4 bits with a table each.

Weights -1 and +1 are stored as bits. A cleared bit then counts `largest - a` instead of 0: the sums are those
of w * a, more by `largest` for each weight of -1, which the bias takes off again.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax, s_tir, te, tirx

from tvm_compress.schedules import narrow, packing
from tvm_compress.schedules.int8 import (
    OUT_FUSABLE,
    Tile,
    by_cut,
    parallelize_outputs,
    rank_tiles,
    write_tile,
)
from tvm_compress.schedules.intrin.lookup import (
    ENTRIES,
    GROUP,
    LANES,
    STEP,
    Lookup,
    entry,
    looked_up,
    register_lookup,
)
from tvm_compress.schedules.kernel import (
    MIN_PARALLEL_ELEMENTS,
    FusedKernel,
    KernelFamily,
    inner,
    kernel_attrs,
    parallelize,
    schedule_injective,
    vectorize_inner,
)
from tvm_compress.schedules.packing import IntegerLayer
from tvm_compress.schedules.target_rules import TargetRules

# Vector registers that the 16-bit sums of a tile may take, and what a vector of weights costs of what a
# pixel's tables do: two operations, beside three for each of the tile's pairs of both.
_REGISTERS = 20
_VECTOR_COST = 3.0

# What int8 activations are raised by, to be uint8.
_INT8_OFFSET = 128

# About how many times as fast as by the INT8 kernel a multiply-accumulate with a weight of 1 bit is.
_SPEEDUP = 3.0

_PART_BITS = 4
_UINT16_MAX = 2**16 - 1


def legalize(bb: relax.BlockBuilder, call: relax.Call, layer: IntegerLayer, rules: TargetRules) -> relax.Expr:
    """Replace a call of a layer that `applies` by a call of a lookup kernel."""
    tile = rules.choices.cut(layer.info(), "lookup", cuts(layer))
    return bb.call_te(
        compute_function(layer, tile),
        call.args[0],
        relax.const(pack_weight(layer.weight, layer.weight_bits, tile.vectors * LANES)),
        relax.const(part_coefficients(layer)),
        relax.const(lookup_bias(layer)),
        primfunc_name_hint=f"{layer.operator}_lookup",
        primfunc_attrs={"op_pattern": OUT_FUSABLE},
    )


def cuts(layer: IntegerLayer) -> dict[tuple[int, ...], Tile]:
    """Return the ways to cut a layer, the best by the count of loads first."""
    return by_cut(rank_tiles(layer.out_size, layer.out_channels // LANES, _REGISTERS, _VECTOR_COST))


def applies(layer: IntegerLayer) -> bool:
    """Whether lookups can compute a layer, on Arm and whatever they cost.

    They can for ungrouped convolutions with full steps of channels and full vectors of outputs.
    """
    # With cleared bits that count, no sum on the way exceeds this.
    most = 2**layer.weight_bits * 255 * layer.weight[0].size
    return (
        layer.operator == "conv2d"
        and layer.groups == 1
        and layer.weight_bits <= 4
        and layer.in_channels % STEP == 0
        and layer.out_channels % LANES == 0
        and most <= packing.INT32_MAX
    )


def pays(layer: IntegerLayer, rules: TargetRules, speedup: float) -> bool:
    """Whether lookups are the fastest for a layer (TargetRules.lookup_pays); never but on Arm.

    `speedup` says how many times as fast as directly bytes are multiplied (winograd.speedup).
    """
    height, width = layer.padded_size
    reuse = layer.macs / (layer.data_shape[0] * height * width * layer.in_channels)
    counted = layer.scheme == "bitserial"
    return rules.lookup_pays(data_bits(layer), layer.weight_bits, reuse, counted, speedup)


def data_bits(layer: IntegerLayer) -> int:
    """Return the bits of what is stored: any byte, but with scheme "bitserial"."""
    return layer.activation_bits if layer.scheme == "bitserial" else 8


def lookup_for(activation_bits: int, weight_bits: int) -> Lookup:
    """Return the registered intrinsics for activations (or their parts) and weights of so many bits."""
    largest = 31 if activation_bits <= 5 else 63 if activation_bits == 6 else 2**_PART_BITS - 1
    lookup = Lookup(largest, complement=weight_bits == 1)
    register_lookup(lookup)
    return lookup


def parts_of(activation_bits: int) -> int:
    """Return into how many parts activations are cut."""
    return 1 if activation_bits <= 6 else 2


def choose_chunks(kernel: tuple[int, int], steps: int, largest: int) -> narrow.Chunks:
    """Return the largest chunks of the reduction whose sums 16 bits hold, whatever the activations.

    Parameters
    ----------
    kernel
        Height and width.
    steps
        Input channels / STEP.
    largest
        Of an activation or its part.
    """
    most = _UINT16_MAX // (STEP * largest)
    candidates = narrow.chunk_candidates(*kernel, steps)
    return next(chunks for chunks in candidates if math.prod(inside for _, inside in chunks) <= most)


def pack_weight(weight: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Pack the bits of weights as indices into tables, two to a byte.

    Parameters
    ----------
    weight
        [O, I, KH, KW] int8, I a multiple of 8 and O of `block`; with bits = 1 only -1 (stored 0) and +1
        (stored 1), else two's complement.

    Returns
    -------
    numpy.ndarray
        uint8 [O / block, bits, KH, KW, I / 8, block]: bit k of a byte is of input channel k of its 8.
    """
    o, i, kh, kw = weight.shape
    codes = (weight > 0).astype(np.uint8) if bits == 1 else weight.view(np.uint8)
    planes = (codes[None] >> np.arange(bits, dtype=np.uint8)[:, None, None, None, None]) & 1
    packed = np.packbits(planes.reshape(bits, o, i // STEP, STEP, kh, kw), axis=3, bitorder="little")
    split = packed.reshape(bits, o // block, block, i // STEP, kh, kw)
    return np.ascontiguousarray(split.transpose(1, 0, 4, 5, 3, 2))


def part_coefficients(layer: IntegerLayer) -> np.ndarray:
    """Return what parts of the activations and bits of the weights are worth: int32 [parts, weight_bits]."""
    parts = 1 << _PART_BITS * np.arange(parts_of(data_bits(layer)))
    places = 1 << np.arange(layer.weight_bits)
    if layer.weight_bits > 1:
        places[-1] *= -1  # of two's complement
    return np.multiply.outer(parts, places).astype(np.int32)


def lookup_bias(layer: IntegerLayer) -> np.ndarray:
    """Return the int32 bias that makes the sums of entries those of the layer."""
    bias = packing.fold_bias(layer, _offset(layer)).astype(np.int64)
    if layer.weight_bits == 1:
        largest = lookup_for(data_bits(layer), 1).largest
        worth = largest * part_coefficients(layer).sum()
        bias = bias - worth * (layer.weight < 0).sum(axis=(1, 2, 3))
    return bias.astype(np.int32)


def _offset(layer: IntegerLayer) -> int:
    return _INT8_OFFSET if layer.data_dtype == "int8" else 0


def compute_function(layer: IntegerLayer, tile: Tile) -> Callable[..., te.Tensor]:
    """Return the te function of (data, packed weight, coefficients, bias)."""
    n, _, _, ic = layer.data_shape
    out_height, out_width = layer.out_size
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel, layer.strides, layer.dilation
    block = tile.vectors * LANES
    lookup = lookup_for(data_bits(layer), layer.weight_bits)
    parts, planes = parts_of(data_bits(layer)), layer.weight_bits
    (ys, y_inside), (xs, x_inside), (ks, k_inside) = chunks = choose_chunks(
        (kh, kw), ic // STEP, lookup.largest
    )
    info = {**layer.info(), "tile": [tile.height, tile.width, tile.vectors], "data_bits": data_bits(layer)}
    attrs = kernel_attrs("lookup", info)

    def compute(data: te.Tensor, weight: te.Tensor, coefficients: te.Tensor, bias: te.Tensor) -> te.Tensor:
        tables = _tables(layer, lookup, _stored(layer, data, parts), parts)
        ry, rx, rk = (
            te.reduce_axis((0, extent), name)
            for extent, name in ((y_inside, "ry"), (x_inside, "rx"), (k_inside, "rk"))
        )
        place = te.reduce_axis((0, ENTRIES), "place")

        def entries(*index: Any) -> Any:
            part, plane, oy, ox, ok, image, y, x, c = index
            ky, kx, k = oy * y_inside + ry, ox * x_inside + rx, ok * k_inside + rk
            pair = [tables(image, y * sh + ky * dh, part, k, x * sw + kx * dw, h, place) for h in range(2)]
            selected = weight[c // block, plane, ky, kx, k, c % block]
            value = looked_up(lookup, selected, (pair[0], pair[1]), place.var)
            return te.sum(value, axis=[ry, rx, rk, place])

        shape = (parts, planes, ys, xs, ks, n, out_height, out_width, layer.out_channels)
        lookups = te.compute(shape, entries, name="lookups")
        rp, rw = te.reduce_axis((0, parts), "rp"), te.reduce_axis((0, planes), "rw")
        oy, ox, ok = (
            te.reduce_axis((0, outside), name)
            for (outside, _), name in zip(chunks, ("oy", "ox", "ok"), strict=True)
        )
        sums = te.compute(
            (n, out_height, out_width, layer.out_channels),
            lambda image, y, x, c: te.sum(
                lookups[rp, rw, oy, ox, ok, image, y, x, c].astype("int32") * coefficients[rp, rw],
                axis=[rp, rw, oy, ox, ok],
            ),
            name="sums",
            attrs=attrs,
        )
        return packing.add_bias(layer, sums, bias)

    return compute


def _stored(layer: IntegerLayer, data: te.Tensor, parts: int) -> te.Tensor:
    """Pad the data with the zero point and cut it: uint8 [N, padded H, parts, padded W, IC]."""
    top, left, _, _ = layer.padding
    n, h, w, ic = layer.data_shape
    height, width = layer.padded_size

    def value(image: Any, y: Any, part: Any, x: Any, c: Any) -> Any:
        element = data[image, y - top, x - left, c]
        if layer.data_dtype == "int8":
            element = tirx.reinterpret("uint8", element) ^ tirx.const(_INT8_OFFSET, "uint8")
        if layer.is_padded:
            inside = tirx.all(y >= top, y < top + h, x >= left, x < left + w)
            zero = tirx.const(layer.zero_point + _offset(layer), "uint8")
            element = tirx.if_then_else(inside, element, zero)
        if parts == 1:
            return element
        return (element >> (part * _PART_BITS).astype("uint8")) & tirx.const(2**_PART_BITS - 1, "uint8")

    return te.compute((n, height, parts, width, ic), value, name="stored")


def _tables(layer: IntegerLayer, lookup: Lookup, stored: te.Tensor, parts: int) -> te.Tensor:
    """Return the tables: [N, padded H, parts, IC / STEP, padded W, 2, ENTRIES]."""
    height, width = layer.padded_size

    def value(image: Any, y: Any, part: Any, k: Any, x: Any, half: Any, place: Any) -> Any:
        values = [stored[image, y, part, x, k * STEP + half * GROUP + j] for j in range(GROUP)]
        return entry(lookup, values, half, place)

    shape = (layer.data_shape[0], height, parts, layer.in_channels // STEP, width, 2, ENTRIES)
    return te.compute(shape, value, name="tables")


def schedule(sch: s_tir.Schedule, kernel: FusedKernel, rules: TargetRules) -> None:
    """Schedule a fused lookup PrimFunc in place."""
    info = kernel.info
    tile = Tile(*info["tile"])
    lookup = lookup_for(info["data_bits"], info["weight_bits"])
    stored, tables, lookups = kernel.producers
    schedule_injective(sch, stored, rules, item_bits=8)
    *outer, half, _ = sch.get_loops(tables)
    work = info["N"] * info["H"] * info["W"] * info["IC"]
    parallelize(sch, sch.fuse(*outer[:2]), rules, work, MIN_PARALLEL_ELEMENTS)
    sch.tensorize(half, lookup.build)
    sums = kernel.main
    image, y, x, c, rp, rw, oy, ox, ok = sch.get_loops(sums)
    c_block, c_vector, lane = sch.split(c, [None, tile.vectors, LANES])
    y_tile, y_in = sch.split(y, [None, tile.height])
    x_tile, x_in = sch.split(x, [None, tile.width])
    sch.reorder(image, y_tile, c_block, x_tile, rp, rw, oy, ox, ok, y_in, x_in, c_vector, lane)
    write_tile(sch, kernel, c_block, x_tile, LANES)
    speedup = _SPEEDUP / info["weight_bits"]
    parallelize_outputs(sch, kernel, rules, [image, y_tile, c_block], speedup)
    _schedule_lookups(sch, lookups, ok, lookup)
    sch.vectorize(lane)
    for loop in (y_in, x_in, c_vector):
        sch.unroll(loop)
    sch.decompose_reduction(sums, rp)


def _schedule_lookups(sch: s_tir.Schedule, lookups: s_tir.schedule.SBlockRV, ok: Any, lookup: Lookup) -> None:
    """Add a tile's entries in registers, inside of the loop over chunks `ok`."""
    sch.compute_at(lookups, ok, preserve_unit_loops=True)
    sch.set_scope(lookups, 0, "local")
    *_, y_in, x_in, c, ry, rx, rk, place = inner(sch, lookups, ok)
    c_vector, lane = sch.split(c, [None, LANES])
    sch.reorder(ry, rx, rk, y_in, x_in, c_vector, lane, place)
    init = sch.decompose_reduction(lookups, ry)
    vectorize_inner(sch, inner(sch, init, ok), LANES)
    sch.tensorize(lane, lookup.add)
    for loop in (y_in, x_in, c_vector):
        sch.unroll(loop)


FAMILY = KernelFamily("lookup", schedule)
