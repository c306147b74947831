"""Direct float32 convolutions and dense layers: packed weights, register tiles, fused epilogues."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax, s_tir, te, topi
from tvm.s_tir.schedule import LoopRV, SBlockRV

from tvm_compress.errors import KernelError
from tvm_compress.schedules import depthwise, kernel, packing, sparse
from tvm_compress.schedules.codebook import Weights, read_weights
from tvm_compress.schedules.kernel import FusedKernel, KernelFamily, conv_geometry
from tvm_compress.schedules.target_rules import TargetRules
from tvm_compress.schedules.threads import LINE

# The innermost reduction loops are unrolled up to this many iterations: enough for a first layer's single
# input channel, while more only makes code that misses the instruction cache.
_UNROLLED_REDUCTION = 4

# Register tiles: most vectors of output channels and most pixels that one tile may hold.
_MAX_VECTORS = 6
_MAX_PIXELS = 12


@dataclass(frozen=True)
class Tile:
    """A register tile: `vectors` of output channels times `rows` x `columns` output pixels."""

    vectors: int
    rows: int
    columns: int


def choose_tile(rules: TargetRules, rows: int, columns: int, channels: int, reduction: int) -> Tile:
    """Return the tile with the least estimated cycles, see `rank_tiles`."""
    return rank_tiles(rules, rows, columns, channels, reduction)[0]


def rank_tiles(rules: TargetRules, rows: int, columns: int, channels: int, reduction: int) -> list[Tile]:
    """Return the tiles for an output of rows x columns x channels, by their estimated cycles.

    The estimate per step of the reduction is the greatest of multiply-add throughput, load throughput
    (one load per weight vector and per pixel) and multiply-add latency; overhanging parts of tiles count.
    """
    vectors = -(-channels // rules.fp32_lanes)
    costs = {}
    for v in range(1, min(_MAX_VECTORS, vectors) + 1):
        for th in range(1, min(4, rows) + 1):
            for tw in range(1, min(_MAX_PIXELS // th, columns) + 1):
                cost = tile_cycles(rules, Tile(v, th, tw), rows, columns, channels, reduction)
                if cost < math.inf:
                    costs[Tile(v, th, tw)] = cost
    return sorted(costs, key=lambda tile: costs[tile])


def cuts(info: Mapping[str, Any], rules: TargetRules) -> dict[tuple[int, ...], Tile]:
    """Return the ways to cut a convolution or dense layer of one group, the best by estimated cycles first.

    `info` is what kernel.kernel_attrs takes.
    """
    rows, columns = (1, info["N"]) if info["operator"] == "dense" else (info["OH"], info["OW"])
    reduction = info["IC"] * info["KH"] * info["KW"]
    return by_cut(rank_tiles(rules, rows, columns, info["OC"], reduction))


def by_cut(tiles: Sequence[Tile]) -> dict[tuple[int, ...], Tile]:
    """Return tiles by the numbers that a `Choice` names them by."""
    return {(tile.rows, tile.columns, tile.vectors): tile for tile in tiles}


def tile_cycles(
    rules: TargetRules, tile: Tile, rows: int, columns: int, channels: int, reduction: int
) -> float:
    """Estimate the cycles of an output of rows x columns x channels in such tiles; infinity if none fits."""
    pixels = tile.rows * tile.columns
    step = _cycles_per_step(rules, tile.vectors, pixels, reduction)
    if step is None:
        return math.inf
    vectors = -(-channels // rules.fp32_lanes)
    tiles = -(-rows // tile.rows) * -(-columns // tile.columns) * -(-vectors // tile.vectors)
    store = 1.5 * tile.vectors * pixels + 8
    return tiles * (reduction * step + store)


def _cycles_per_step(rules: TargetRules, vectors: int, pixels: int, reduction: int) -> float | None:
    """Return the cycles of one reduction step of a tile, or None where it does not fit the registers."""
    accumulators = vectors * pixels
    # Weights stay in registers; NEON multiplies by an element, x86 needs a register for the broadcast.
    if accumulators + vectors + 1 > rules.vector_registers - (rules.vector_registers == 16):
        return None
    # x86: two loads a cycle on paper; 1.5 is what ranks tiles as they were measured (Zen 3, 8 layers).
    pipes, loads, latency = (1.0, 1.0, 7.0) if rules.isa == "a72" else (2.0, 1.5, 4.0)
    cycles = max(accumulators / pipes, (vectors + pixels) / loads, latency)
    weight_bytes = vectors * rules.vector_bits // 8
    if reduction * weight_bytes > rules.l1_bytes // 2:
        # Weights come from the second-level cache: about half a vector a cycle.
        cycles = max(cycles, 2.0 * vectors)
    return cycles


def legalize(bb: relax.BlockBuilder, call: relax.Call, rules: TargetRules) -> relax.Expr:
    """Replace `relax.nn.conv2d` (NHWC, OIHW) or `relax.matmul` with constant weights by a packed kernel.

    Raises
    ------
    KernelError
        Where the weights are no constants or the layouts are others.
    """
    if call.op.name == "relax.matmul":
        return _legalize_dense(bb, call, rules)
    attrs = call.attrs
    if attrs.data_layout != "NHWC" or attrs.kernel_layout != "OIHW":
        raise KernelError(
            f"fp32 needs layouts NHWC and OIHW, not {attrs.data_layout} and {attrs.kernel_layout}.",
            "Run Canonicalize first.",
        )
    weight = read_weights(bb, call.args[1], "weights")
    info = conv_geometry(call, weight.shape)
    if depthwise.is_depthwise(info["groups"], info["IC"]):
        return depthwise.legalize_float(bb, call, info, weight, rules)
    return _legalize_conv(bb, call, info, weight, rules)


def padded_input(x: te.Tensor, info: dict[str, Any], rows: int, columns: int, value: Any = 0.0) -> te.Tensor:
    """Pad an NHWC tensor so that `rows` x `columns` output pixels can be computed, if that takes padding.

    `rows` and `columns` may exceed the true output, so that tiles divide it; the surplus is cropped later.
    """
    top, left, bottom, right = info["padding"]
    (sh, sw), (dh, dw) = info["strides"], info["dilation"]
    bottom = max(bottom, (rows - 1) * sh + dh * (info["KH"] - 1) + 1 - info["H"] - top)
    right = max(right, (columns - 1) * sw + dw * (info["KW"] - 1) + 1 - info["W"] - left)
    if not (top or left or bottom > 0 or right > 0):
        return x
    return topi.nn.pad(
        x, [0, top, left, 0], [0, max(bottom, 0), max(right, 0), 0], pad_value=value, name="pad"
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def pack_weights(weight: np.ndarray, block: int) -> np.ndarray:
    """Pack OIHW weights as [OC/block][KH][KW][IC][block], zeros filling the last block."""
    oc, ic, kh, kw = weight.shape
    blocks = -(-oc // block)
    padded = np.zeros((blocks * block, ic, kh, kw), weight.dtype)
    padded[:oc] = weight
    return np.ascontiguousarray(padded.reshape(blocks, block, ic, kh, kw).transpose(0, 3, 4, 2, 1))


def _legalize_conv(
    bb: relax.BlockBuilder, call: relax.Call, info: dict[str, Any], weight: Weights, rules: TargetRules
) -> relax.Expr:
    lanes, groups = rules.fp32_lanes, info["groups"]
    if weight.codebook is None:
        # Indices into a codebook have no zero to stand between groups.
        groups = packing.merged_groups(groups, info["OC"] // groups, lanes)
        weight = Weights(packing.merge_groups(weight.array, info["groups"], groups))
    per_group = info["OC"] // groups
    info |= {"scheme": "fp32", "activation_bits": 32, "weight_bits": 32, "groups_left": groups}
    if groups == 1:
        tile = rules.choices.cut(info, "direct", cuts(info, rules))
    else:
        tile = choose_tile(rules, info["OH"], info["OW"], per_group, math.prod(weight.shape[1:]))
    block = tile.vectors * lanes
    if groups > 1:
        # A block must stay inside of its group.
        fitting = [size for size in range(lanes, block + 1, lanes) if per_group % size == 0]
        block = max(fitting, default=kernel.vector_factor(per_group, lanes))
    info |= {"block": block, "tile": [tile.rows, tile.columns], "IC_per_group": weight.shape[1]}
    packed = weight.packed(
        bb,
        lambda array: pack_weights(array, block),
        lambda o, *place: o * block + place[-1],
        _round_up(info["OC"], block),
    )
    return bb.call_te(
        _conv_compute, call.args[0], packed, info,
        primfunc_name_hint="conv2d_fp32", primfunc_attrs={"op_pattern": 4},
    )  # fmt: skip


def _conv_compute(x: te.Tensor, weight: te.Tensor, info: dict[str, Any]) -> te.Tensor:
    (sh, sw), (dh, dw) = info["strides"], info["dilation"]
    rows, columns = (_round_up(info[key], t) for key, t in zip(("OH", "OW"), info["tile"], strict=True))
    block, per_group, ic_group = info["block"], info["OC"] // info["groups_left"], info["IC_per_group"]
    channels = _round_up(info["OC"], block)
    padded = padded_input(x, info, rows, columns)
    kh, kw = te.reduce_axis((0, info["KH"]), "kh"), te.reduce_axis((0, info["KW"]), "kw")
    ic = te.reduce_axis((0, ic_group), "ic")

    def value(n: Any, h: Any, w: Any, c: Any) -> Any:
        channel = ic if info["groups_left"] == 1 else c // per_group * ic_group + ic
        pixel = padded[n, h * sh + kh * dh, w * sw + kw * dw, channel]
        return te.sum(pixel * weight[c // block, kh, kw, ic, c % block], axis=[kh, kw, ic])

    result = te.compute(
        (info["N"], rows, columns, channels), value, name="conv", attrs=kernel.kernel_attrs("fp32", info)
    )
    return crop(result, (info["N"], info["OH"], info["OW"], info["OC"]))


def crop(x: te.Tensor, shape: Sequence[int]) -> te.Tensor:
    """Return the first part of a tensor; the tensor itself where the shape is the same."""
    if tuple(int(extent) for extent in x.shape) == tuple(shape):
        return x
    return te.compute(tuple(shape), lambda *indices: x(*indices), name="crop")


def _legalize_dense(bb: relax.BlockBuilder, call: relax.Call, rules: TargetRules) -> relax.Expr:
    weight = read_weights(bb, call.args[1], "weights")
    shape = [int(extent) for extent in call.args[0].ty.shape]
    if len(weight.shape) != 2 or len(shape) != 2:
        raise KernelError(f"fp32 dense needs 2-D data and weights, not shapes {shape} and {weight.shape}.")
    weight = weight.transposed()
    out, inputs = weight.shape
    n = shape[0]
    # Many rows share the loads of the weights: there the dense kernel stays ahead.
    rows = sparse.find_rows(weight.array, rules) if n == 1 and weight.codebook is None else None
    if rows is not None:
        return _sparse_dense(bb, call, rows, out)
    info = dense_info(n, inputs, out)
    tile = rules.choices.cut(info, "direct", cuts(info, rules))
    block = tile.vectors * rules.fp32_lanes
    info |= {"block": block, "tile": [tile.columns]}

    def compute(x: te.Tensor, packed: te.Tensor) -> te.Tensor:
        rows, channels = _round_up(n, tile.columns), _round_up(out, block)
        padded = x if rows == n else topi.nn.pad(x, [0, 0], [rows - n, 0], name="pad")
        ic = te.reduce_axis((0, inputs), "ic")
        result = te.compute(
            (rows, channels),
            lambda i, c: te.sum(padded[i, ic] * packed[c // block, ic, c % block], axis=[ic]),
            name="dense",
            attrs=kernel.kernel_attrs("fp32", info),
        )
        return crop(result, (n, out))

    packed = weight.packed(
        bb,
        lambda array: pack_weights(array.reshape(out, inputs, 1, 1), block)[:, 0, 0],
        lambda o, _, lane: o * block + lane,
        _round_up(out, block),
    )
    return bb.call_te(
        compute, call.args[0], packed, primfunc_name_hint="dense_fp32", primfunc_attrs={"op_pattern": 4}
    )


def dense_info(n: int, inputs: int, out: int) -> dict[str, Any]:
    """Return the facts of a dense layer [n, inputs] -> [n, out] by the names of kernel.kernel_attrs."""
    return {
        "operator": "dense", "scheme": "fp32", "activation_bits": 32, "weight_bits": 32,
        "N": n, "H": 1, "W": 1, "IC": inputs, "OC": out, "OH": 1, "OW": 1, "KH": 1, "KW": 1, "stride": 1,
        "groups": 1,
    }  # fmt: skip


def _sparse_dense(bb: relax.BlockBuilder, call: relax.Call, rows: sparse.SparseRows, out: int) -> relax.Expr:
    # What is read and multiplied is that of a layer with as many inputs as the lists are long.
    info = dense_info(1, rows.values.shape[1], out) | {"block": rows.block, "tile": [1], "sparse": True}

    def compute(x: te.Tensor, values: te.Tensor, inputs: te.Tensor) -> te.Tensor:
        return crop(sparse.multiply(x, values, inputs, kernel.kernel_attrs("fp32", info)), (1, out))

    return bb.call_te(
        compute, call.args[0], *sparse.constants(rows),
        primfunc_name_hint="dense_fp32_sparse", primfunc_attrs={"op_pattern": 4},
    )  # fmt: skip


def schedule(sch: s_tir.Schedule, fused: FusedKernel, rules: TargetRules) -> None:
    """Schedule a kernel that `legalize` made, with whatever was fused behind it."""
    info = fused.info
    dense = info["operator"] == "dense"
    spatial, channel, reduction = _split_loops(sch, fused.main, 1 if dense else 3)
    tiles = info["tile"] if dense else [1, *info["tile"]]
    pairs = [sch.split(loop, [None, size]) for loop, size in zip(spatial, tiles, strict=True)]
    outer, pixels = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    block, inside = sch.split(channel, [None, info["block"]])
    lanes = min(rules.fp32_lanes, info["block"])
    vectors, vector = sch.split(inside, [None, lanes])
    *rows, last_outer = outer
    macs = math.prod(int(info[key]) for key in ("N", "OH", "OW", "OC"))
    macs *= math.prod(kernel.loop_extent(sch, loop) for loop in reduction)
    overhang = info["OC"] % info["block"] != 0
    # A loop cannot be both cut and parallel. A large dense layer, which has no other loop, rather runs in
    # parallel: against its long reduction a scalar epilogue costs little.
    parallel_blocks = not rows and rules.threads > 1 and macs >= kernel.MIN_PARALLEL_MACS
    cut = overhang and not parallel_blocks
    # Blocks outside, so that their weights stay in the cache; but as many blocks as threads, side by side
    # in the lines of the cache, would be written at once.
    contested = rules.threads > 1 and 4 * info["block"] % LINE and info["OC"] <= info["block"] * rules.threads
    outside = [*rows, block] if contested else [*rows[:1], block, *rows[1:]]
    sch.reorder(*outside, last_outer, *reduction, *pixels, vectors, vector)
    if cut and rows:
        # The block loop must stand alone to be cut; outside, so that its weights stay in the cache.
        sch.reorder(block, *rows)
        parallel = sch.fuse(*rows)
        macs //= kernel.loop_extent(sch, block)
    else:
        parallel = sch.fuse(*outside) if rows else block
    _write(sch, fused, last_outer, lanes, cut)
    if cut:
        kernel.cut_at_predicate(sch, block)
    for loop in (*pixels, vectors):
        sch.unroll(loop)
    sch.vectorize(vector)
    _unroll_reduction(sch, reduction)
    if rows or not cut:
        kernel.parallelize(sch, parallel, rules, macs, kernel.MIN_PARALLEL_MACS)
    sch.decompose_reduction(fused.main, reduction[0])
    for producer in fused.producers:
        kernel.schedule_injective(sch, producer, rules)


def _split_loops(
    sch: s_tir.Schedule, block: SBlockRV, spatial: int
) -> tuple[list[LoopRV], LoopRV, list[LoopRV]]:
    loops = list(sch.get_loops(block))
    return loops[:spatial], loops[spatial], loops[spatial + 1 :]


def _unroll_reduction(sch: s_tir.Schedule, reduction: Sequence[LoopRV]) -> None:
    total = 1
    for loop in reversed(reduction[1:]):
        total *= kernel.loop_extent(sch, loop)
        if total > _UNROLLED_REDUCTION:
            return
        sch.unroll(loop)


def _write(sch: s_tir.Schedule, fused: FusedKernel, loop: LoopRV, lanes: int, cut: bool) -> None:
    """Write the tile through the epilogue, in whole vectors.

    Where the last block of channels overhangs, `cut` tells TVM to cut the loops at the true end: the full
    blocks lose their predicate, and of the last block only the last vector is scalar.
    """
    last = fused.write_at(loop)
    *pixels, channels = kernel.inner(sch, last, loop)
    vectors, vector = sch.split(channels, [None, lanes])
    sch.vectorize(vector)
    for unrolled in (*pixels, vectors):
        sch.unroll(unrolled)
    if cut:
        kernel.cut_at_predicate(sch, vectors)


FAMILY = KernelFamily("fp32", schedule)
