"""INT8 convolutions and dense layers: exact int32 sums by the widest exact dot product of the target.

Stages of a PrimFunc: `stored` (padding, and the type that the dot product takes), `sums` (annotated),
`biased` (true channels only), then whatever was fused behind. Weights of 1-8 bits take the same kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from tvm import relax, s_tir, te, tirx
from tvm.s_tir.schedule import LoopRV

from tvm_compress.schedules import packing
from tvm_compress.schedules.intrin.dot import Dot, dot_for
from tvm_compress.schedules.kernel import (
    MIN_PARALLEL_MACS,
    FusedKernel,
    KernelFamily,
    inner,
    kernel_attrs,
    loop_extent,
    parallelize,
    schedule_injective,
    vector_factor,
    vectorize_inner,
)
from tvm_compress.schedules.packing import IntegerLayer
from tvm_compress.schedules.target_rules import TargetRules

# Up to this many input channels a kernel's row is multiplied as one run of values: few steps are half empty.
_MAX_ROW_CHANNELS = 4

# With fewer accumulators a tile waits for the latency of its additions.
_LEAST_ACCUMULATORS = 6

# Channels that are written at once: a vector register of bytes.
_BYTES_WRITTEN = 16

# op_pattern of TVM's fusion: element-wise operators may follow in the same PrimFunc.
OUT_FUSABLE = 4


@dataclass(frozen=True)
class Tile:
    """Outputs whose sums stay in registers: height x width pixels by `vectors` vectors of channels."""

    height: int
    width: int
    vectors: int


def rank_tiles(
    size: tuple[int, int],
    vectors: int,
    registers: int,
    vector_cost: float = 1.0,
    cached_vectors: int | None = None,
) -> list[Tile]:
    """Return the tiles that divide the output and fit the registers, those with few loads per product first.

    A step loads a broadcast for each pixel and a weight for each vector, and multiplies each by each: on AVX2
    loads bound the speed. Few accumulators wait for each other.

    Parameters
    ----------
    size
        Height and width of the output.
    vectors
        Vectors of output channels.
    registers
        Most accumulators of a tile; a third more where a single vector of weights leaves the room.
    vector_cost
        What loading a vector of weights costs, in broadcasts.
    cached_vectors
        Vectors whose weights stay in the first-level cache from tile to tile; loading others costs 1 more.
    """

    def loads_per_product(tile: Tile) -> tuple[float, int, int]:
        pixels = tile.height * tile.width
        cost = vector_cost + (cached_vectors is not None and tile.vectors > cached_vectors)
        accumulators = pixels * tile.vectors
        loads = (pixels + cost * tile.vectors) / accumulators
        return loads * max(1.0, _LEAST_ACCUMULATORS / accumulators), tile.height, tile.vectors

    tiles = (
        Tile(height, width, count)
        for height in divisors(size[0])
        for width in divisors(size[1])
        for count in divisors(vectors)
        if height * width * count <= registers + (registers // 3 if count == 1 else 0)
    )
    return sorted(tiles, key=loads_per_product)


def by_cut(tiles: Sequence[Tile]) -> dict[tuple[int, ...], Tile]:
    """Return tiles by the numbers that a `Choice` names them by."""
    return {(tile.height, tile.width, tile.vectors): tile for tile in tiles}


@cache
def divisors(value: int) -> tuple[int, ...]:
    """Return the divisors of a positive integer, ascending."""
    return tuple(d for d in range(1, value + 1) if value % d == 0)


def legalize(bb: relax.BlockBuilder, call: relax.Call, layer: IntegerLayer, rules: TargetRules) -> relax.Expr:
    """Replace a call of tvm_compress.conv2d or tvm_compress.dense by a call of the direct INT8 kernel.

    Raises
    ------
    KernelError
        Where the sums may overflow int32.
    """
    dot = dot_for(rules.isa)
    offset = dot.offset(layer.data_dtype)
    packing.check_accumulator(layer, *_data_range(layer.data_dtype, offset))
    groups, as_rows, source = _arrange(layer, dot)
    tile = rules.choices.cut(layer.info(), "direct", cuts(layer, rules))
    weight = packing.pack_dot_weight(source, dot, tile.vectors * dot.lanes)
    compute = _dot_compute(layer, groups, dot, tile, as_rows)
    bias = packing.fold_bias(layer, offset)
    return bb.call_te(
        compute,
        call.args[0],
        relax.const(weight),
        relax.const(bias),
        primfunc_name_hint=f"{layer.operator}_int8",
        primfunc_attrs={"op_pattern": OUT_FUSABLE},
    )


def _arrange(layer: IntegerLayer, dot: Dot) -> tuple[int, bool, np.ndarray]:
    """Return the groups that are left, whether a kernel's row is one run of values, and the weights so."""
    groups = packing.merged_groups(layer.groups, layer.out_channels // layer.groups, dot.lanes)
    as_rows = layer.in_channels <= _MAX_ROW_CHANNELS and layer.dilation[1] == 1 and groups == 1
    source = packing.merge_groups(layer.weight, layer.groups, groups)
    return groups, as_rows, packing.pack_rows_weight(source) if as_rows else source


def cuts(layer: IntegerLayer, rules: TargetRules) -> dict[tuple[int, ...], Tile]:
    """Return the ways to cut a layer, the best by the count of loads first."""
    dot = dot_for(rules.isa)
    groups, _, source = _arrange(layer, dot)
    # A tile's channels are of one group.
    vectors = packing.round_up(layer.out_channels // groups, dot.lanes) // dot.lanes
    vector_bytes = dot.lanes * source[0].size * np.dtype(dot.weight_dtype).itemsize
    cached = rules.l1_bytes // 2 // vector_bytes
    return by_cut(rank_tiles(layer.out_size, vectors, dot.registers, dot.vector_cost, cached))


def _data_range(dtype: str, offset: int) -> tuple[int, int]:
    low, high = packing.DATA_RANGES[dtype]
    return low + offset, high + offset


def _stored(
    layer: IntegerLayer,
    data: te.Tensor,
    dtype: str,
    offset: int,
    channels: int,
    row: int | None = None,
    groups: int = 1,
) -> te.Tensor:
    """Pad the data in space and each group to `channels`, add `offset` and change the type.

    With `row`, the width and the channels are one axis of that many values, as the memory of NHWC has them.
    """
    top, left, _, _ = layer.padding
    n, h, w, ic = layer.data_shape
    height, width = layer.padded_size

    def value(image: Any, y: Any, x: Any, place: Any) -> Any:
        c = place if channels == ic // groups else place // channels * (ic // groups) + place % channels
        element = data[x, c] if layer.operator == "dense" else data[image, y - top, x - left, c]
        # The sum with the offset fits int16, and the result fits the type.
        stored = element.astype("int16") + tirx.const(offset, "int16") if offset else element
        stored = stored.astype(dtype)
        inside = []
        if layer.is_padded or row is not None:
            inside = [y >= top, y < top + h, x >= left, x < left + w]
        if channels > ic // groups:
            inside.append(place % channels < ic // groups)
        if not inside:
            return stored
        return tirx.if_then_else(tirx.all(*inside), stored, tirx.const(layer.zero_point + offset, dtype))

    if row is not None:
        return te.compute(
            (n, height, row),
            lambda image, y, j: value(image, y, j // ic, j % ic),
            name="stored",
            tag="stored",
        )
    return te.compute((n, height, width, groups * channels), value, name="stored")


def _dot_compute(
    layer: IntegerLayer, groups: int, dot: Dot, tile: Tile, as_rows: bool
) -> Callable[..., te.Tensor]:
    """Return the te function of (data, packed weight, bias), of as many groups as were left."""
    n, _, _, ic = layer.data_shape
    out_height, out_width = layer.out_size
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel, layer.strides, layer.dilation
    if as_rows:
        depth, columns = packing.round_up(kw * ic, dot.depth), 1
    else:
        depth, columns = packing.round_up(ic // groups, dot.depth), kw
    block = tile.vectors * dot.lanes
    padded_out = packing.round_up(layer.out_channels, block)
    attrs = kernel_attrs("int8", {**layer.info(), "tile": [tile.height, tile.width, tile.vectors]})
    offset = dot.offset(layer.data_dtype)

    def compute(data: te.Tensor, weight: te.Tensor, bias: te.Tensor) -> te.Tensor:
        if as_rows:
            row = max(layer.padded_size[1] * ic, (out_width - 1) * sw * ic + depth)
            stored = _stored(layer, data, dot.data_dtype, offset, ic, row)
        else:
            stored = _stored(layer, data, dot.data_dtype, offset, depth, groups=groups)

        def activation(image: Any, y: Any, x: Any, c: Any, ry: Any, rx: Any, k: Any) -> Any:
            if as_rows:
                return stored[image, y * sh + ry * dh, x * (sw * ic) + k]
            first = 0 if groups == 1 else c // (layer.out_channels // groups) * depth
            return stored[image, y * sh + ry * dh, x * sw + rx * dw, first + k]

        ry = te.reduce_axis((0, kh), "ry")
        rx = te.reduce_axis((0, columns), "rx")
        rk = te.reduce_axis((0, depth), "rk")
        sums = te.compute(
            (n, out_height, out_width, padded_out),
            lambda image, y, x, c: te.sum(
                activation(image, y, x, c, ry, rx, rk).astype("int32")
                * weight(
                    c // block,
                    ry,
                    rx,
                    rk // dot.depth,
                    (c % block) // dot.lanes,
                    *dot.inner_index(c % dot.lanes, rk % dot.depth),
                ).astype("int32"),
                axis=[ry, rx, rk],
            ),
            name="sums",
            attrs=attrs,
        )
        return packing.add_bias(layer, sums, bias)

    return compute


def schedule(sch: s_tir.Schedule, kernel: FusedKernel, rules: TargetRules) -> None:
    """Schedule a fused INT8 PrimFunc in place."""
    for block in kernel.producers:
        schedule_injective(sch, block, rules, item_bits=16)
    dot = dot_for(rules.isa)
    tile = Tile(*kernel.info["tile"])
    sums = kernel.main
    image, y, x, c, ry, rx, rk = sch.get_loops(sums)
    c_block, c_vector, lane = sch.split(c, [None, tile.vectors, dot.lanes])
    y_tile, y_in = sch.split(y, [None, tile.height])
    x_tile, x_in = sch.split(x, [None, tile.width])
    step, k = sch.split(rk, [None, dot.depth])
    sch.reorder(image, y_tile, c_block, x_tile, ry, rx, step, y_in, x_in, c_vector, lane, k)
    write_tile(sch, kernel, c_block, x_tile, dot.lanes)
    parallelize_outputs(sch, kernel, rules, [image, y_tile, c_block])
    init = sch.decompose_reduction(sums, ry)
    vectorize_inner(sch, inner(sch, init, x_tile), dot.lanes)
    sch.tensorize(lane, dot.name)
    for loop in (y_in, x_in, c_vector):
        sch.unroll(loop)


def kernel_macs(kernel: FusedKernel) -> int:
    """Return the multiply-accumulates of a fused kernel, from its annotation."""
    info = kernel.info
    pixels = info["N"] * info["OH"] * info["OW"]
    return pixels * info["OC"] * info["IC"] // info["groups"] * info["KH"] * info["KW"]


def write_tile(sch: s_tir.Schedule, kernel: FusedKernel, c_block: LoopRV, x_tile: LoopRV, lanes: int) -> None:
    """Write a tile of sums through the epilogue, at the end of each iteration of x_tile, in whole vectors.

    Where the last block of channels overhangs, TVM is told to cut both channel loops at the true end, so that
    only the last vector is scalar and nothing else is predicated.
    """
    last = kernel.write_at(x_tile)
    *pixels, channels = inner(sch, last, x_tile)
    if not has_overhang(sch, kernel):
        # A whole register of bytes, where the block has them.
        lanes = max(lanes, vector_factor(loop_extent(sch, channels), _BYTES_WRITTEN))
    vectors, vector = sch.split(channels, [None, lanes])
    sch.vectorize(vector)
    for loop in (*pixels, vectors):
        sch.unroll(loop)
    if has_overhang(sch, kernel):
        sch.annotate(c_block, "pragma_loop_partition_hint", 1)
        sch.annotate(vectors, "pragma_loop_partition_hint", 1)


def has_overhang(sch: s_tir.Schedule, kernel: FusedKernel) -> bool:
    """Return whether the sums have more channels than the output."""
    return int(sch.get(kernel.main).iter_vars[3].dom.extent) != kernel.info["OC"]


def parallelize_outputs(
    sch: s_tir.Schedule,
    kernel: FusedKernel,
    rules: TargetRules,
    loops: Sequence[LoopRV],
    speedup: float = 1.0,
) -> None:
    """Run image rows and blocks of channels, `loops` in this order, in parallel if that is worth it.

    `speedup` says about how many times as fast as by the INT8 kernel a multiply-accumulate is.
    """
    if has_overhang(sch, kernel):
        loops = loops[:-1]  # a loop that will be cut stays alone
    parallelize(sch, sch.fuse(*loops), rules, int(kernel_macs(kernel) / speedup), MIN_PARALLEL_MACS)


FAMILY = KernelFamily("int8", schedule)
