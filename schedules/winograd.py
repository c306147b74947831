"""Winograd convolutions: 3 x 3 at stride 1 or 2, in tiles of 2 x 2 or 4 x 4 outputs, in float32 or integers.

The output is cut into blocks of tiles. For each block its patches are transformed (`input`), multiplied by
the transformed weights (`products`, a matrix product for each of the n * n places of a patch), and
transformed back (`conv`, annotated), through whatever was fused behind. What lies between the stages is one
block's, so that it stays in the cache.

In float32, against the exact result and relative to its largest value, tiles of 2 x 2 err by less than 1e-5
and those of 4 x 4 by less than 1e-4 (`winograd_algorithm.Algorithm.relative_error`) on data of one magnitude.
In integers (see `IntegerAlgorithm`) the result is exact: int16 holds transformed inputs and weights, and 32
bits that wrap around hold the sums.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from tvm import relax, s_tir, te, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

from tvm_compress.schedules import fp32, kernel, packing
from tvm_compress.schedules.codebook import read_weights
from tvm_compress.schedules.intrin.dot import Dot
from tvm_compress.schedules.kernel import FusedKernel, KernelFamily
from tvm_compress.schedules.packing import IntegerLayer
from tvm_compress.schedules.target_rules import TargetRules
from tvm_compress.schedules.threads import LINE
from tvm_compress.schedules.winograd_algorithm import (
    ALGORITHMS,
    INTEGER_ALGORITHMS,
    Algorithm,
    IntegerAlgorithm,
    fits,
    pack_weights,
)
from tvm_compress.schedules.winograd_choice import applies, choose_algorithm, costs_by_kernel, of_stride
from tvm_compress.schedules.winograd_plan import (
    FLOATS,
    Numbers,
    cuts,
    integers,
    shares_blocks,
    shares_rows,
)


def legalize(bb: relax.BlockBuilder, call: relax.Call, rules: TargetRules) -> relax.Expr:
    """Replace `relax.nn.conv2d` (NHWC, OIHW) by whichever fp32 kernel is the fastest for its shape.

    Raises
    ------
    KernelError
        As fp32.legalize.
    """
    attrs = call.attrs
    if attrs.data_layout != "NHWC" or attrs.kernel_layout != "OIHW":
        return fp32.legalize(bb, call, rules)
    weight = read_weights(bb, call.args[1], "weights")
    info = kernel.conv_geometry(call, weight.shape)
    info |= {"scheme": "fp32", "activation_bits": 32, "weight_bits": 32}
    algorithm = None
    # Transformed weights would have no codebook.
    if applies(info) and weight.codebook is None:
        algorithm = choose_algorithm(info, rules, "conv2d_fp32", of_stride(ALGORITHMS, info))
    if algorithm is None:
        return fp32.legalize(bb, call, rules)
    info |= _plan(rules, info, algorithm, FLOATS)
    packed = relax.const(pack_weights(weight.array, algorithm, info["block"], info["padded_IC"]))

    def compute(x: te.Tensor, weight: te.Tensor) -> te.Tensor:
        result = _stages(x, weight, info, algorithm, FLOATS)
        return fp32.crop(result, [info[key] for key in ("N", "OH", "OW", "OC")])

    return bb.call_te(
        compute, call.args[0], packed,
        primfunc_name_hint="conv2d_fp32_winograd", primfunc_attrs={"op_pattern": 4},
    )  # fmt: skip


def speedup(layer: IntegerLayer, rules: TargetRules) -> float:
    """How many times as fast as the direct INT8 kernel the chosen one is by the target's table, from 1 on."""
    info = layer.info()
    algorithm = _choose_integer(layer, info, rules)
    costs = costs_by_kernel(info, rules, "conv2d_int8", INTEGER_ALGORITHMS) if algorithm else {}
    return costs["direct"] / costs[algorithm.name] if algorithm and algorithm.name in costs else 1.0


def _choose_integer(layer: IntegerLayer, info: dict[str, Any], rules: TargetRules) -> IntegerAlgorithm | None:
    """Choose among the algorithms that weights and activations prove to fit."""
    if layer.operator != "conv2d" or not applies(info):
        return None
    return choose_algorithm(info, rules, "conv2d_int8", fitting_algorithms(layer, info))


def fitting_algorithms(layer: IntegerLayer, info: dict[str, Any]) -> dict[str, IntegerAlgorithm]:
    """Return the algorithms for a layer's stride that its weights and activations prove to be exact."""
    return {
        name: algorithm
        for name, algorithm in of_stride(INTEGER_ALGORITHMS, info).items()
        if fits(algorithm, layer.weight, layer.data_range)
    }


def legalize_layer(
    bb: relax.BlockBuilder, call: relax.Call, layer: IntegerLayer, rules: TargetRules
) -> relax.Expr | None:
    """Replace tvm_compress.conv2d by a Winograd kernel, or return None where the direct one serves better."""
    info = layer.info()
    algorithm = _choose_integer(layer, info, rules)
    if algorithm is None:
        return None
    numbers = integers(rules, algorithm)
    offset = algorithm.offset(layer.data_range)
    info |= _plan(rules, info, algorithm, numbers)
    packed = pack_weights(layer.weight, algorithm, info["block"], info["padded_IC"], numbers.depth)
    if numbers.dot:
        packed = numbers.dot.pack(packed)

    def compute(x: te.Tensor, weight: te.Tensor, bias: te.Tensor) -> te.Tensor:
        sums = _stages(x, weight, info, algorithm, numbers, layer.zero_point, offset)
        return packing.add_bias(layer, sums, bias)

    return bb.call_te(
        compute, call.args[0], relax.const(packed), relax.const(packing.fold_bias(layer, offset)),
        primfunc_name_hint="conv2d_int8_winograd", primfunc_attrs={"op_pattern": 4},
    )  # fmt: skip


def _plan(rules: TargetRules, info: dict[str, Any], algorithm: Algorithm, numbers: Numbers) -> dict[str, Any]:
    """Return how the work is cut, in the terms of the schedule."""
    blocking = rules.choices.cut(info, algorithm.name, cuts(rules, info, algorithm, numbers))
    # Half of a vector of int16 is still one of 64 bits or more.
    lanes = rules.fp32_lanes
    return {
        "algorithm": algorithm.name,
        "block": blocking.vectors * lanes, "padded_IC": -(-info["IC"] // lanes) * lanes,
        "tile_block": [blocking.rows, blocking.columns], "register_tiles": blocking.tiles,
        "blocks_first": blocking.blocks_first,
    }  # fmt: skip


def _choice(index: Any, values: Sequence[Any]) -> Any:
    """Return values[index]; the loop of the index is unrolled, which decides."""
    result = values[-1]
    for place in range(len(values) - 2, -1, -1):
        result = tirx.Select(tirx.EQ(index, place), values[place], result)
    return result


def _stages(
    x: te.Tensor,
    weight: te.Tensor,
    info: dict[str, Any],
    algorithm: Algorithm,
    numbers: Numbers,
    zero_point: int = 0,
    offset: int = 0,
) -> te.Tensor:
    """Return the convolution of x + offset, with the tiles and blocks of channels that overhang."""
    m, n, patch, block = algorithm.m, algorithm.n, algorithm.patch, info["block"]
    high, wide = info["tile_block"]
    rows, columns = -(-info["OH"] // (m * high)), -(-info["OW"] // (m * wide))
    tiles = -(-high * wide // info["register_tiles"]) * info["register_tiles"]
    outs = -(-info["OC"] // block) * block
    extents = algorithm.extent(rows * high), algorithm.extent(columns * wide)
    padded = _padded_input(x, info, *extents, zero_point)
    step = m * algorithm.stride
    chunks = (info["N"], rows, columns)
    transform_input = partial(algorithm.transform_input, constant=partial(_constant, dtype=numbers.data))
    transform_output = partial(algorithm.transform_output, constant=partial(_constant, dtype=numbers.wrapped))

    def patch_rows(b: Any, y: Any, x: Any, i: Any, k: Any, t: Any, c: Any) -> Any:
        # What fills up the last register tile repeats the last tile.
        t = t if tiles == high * wide else tirx.min(t, high * wide - 1)
        row, column = (y * high + t // wide) * step, (x * wide + t % wide) * step + k
        values = [padded[b, row + place, column, c].astype(numbers.data) for place in range(patch)]
        if offset:
            values = [value + tirx.const(offset, numbers.data) for value in values]
        return _choice(i, transform_input(values))

    half = te.compute((*chunks, n, patch, tiles, info["padded_IC"]), patch_rows, name="input_rows")
    data = te.compute(
        (*chunks, n, n, tiles, info["padded_IC"]),
        lambda b, y, x, i, j, t, c: _choice(
            j, transform_input([half[b, y, x, i, place, t, c] for place in range(patch)])
        ),
        name="input",
    )
    ic = te.reduce_axis((0, info["padded_IC"]), "ic")

    def product(b: Any, y: Any, x: Any, i: Any, j: Any, t: Any, c: Any) -> Any:
        rows = (i, j)
        if algorithm.weight_rows < n:
            rows = tuple(tirx.min(k, algorithm.weight_rows - 1) for k in rows)
        factors = data[b, y, x, i, j, t, ic], weight[*rows, c // block, *numbers.place(ic, c % block)]
        if numbers is FLOATS:
            return te.sum(factors[0] * factors[1], axis=[ic])
        first, second = (factor.astype("int32") for factor in factors)
        return te.sum((first * second).astype(numbers.sums), axis=[ic])

    products = te.compute((*chunks, n, n, tiles, outs), product, name="products")
    back = te.compute(
        (*chunks, m, n, tiles, outs),
        lambda b, y, x, i, j, t, c: _choice(
            i, transform_output([numbers.wrap(products[b, y, x, place, j, t, c]) for place in range(n)])
        ),
        name="output_rows",
    )

    def output(b: Any, h: Any, w: Any, c: Any) -> Any:
        (y, row), (x, column) = (h // (m * high), h // m % high), (w // (m * wide), w // m % wide)
        tile = row * wide + column
        values = transform_output([back[b, y, x, h % m, place, tile, c] for place in range(n)])
        if isinstance(algorithm, IntegerAlgorithm):
            values = [_undo(value, algorithm, h % m, place) for place, value in enumerate(values)]
        return _choice(w % m, values)

    shape = (info["N"], rows * high * m, columns * wide * m, outs)
    return te.compute(shape, output, name="conv", attrs=kernel.kernel_attrs(numbers.family, info))


def _constant(value: Any, dtype: str) -> Any:
    return tirx.const(np.float32(value).item() if dtype == "float32" else int(value), dtype)


def _undo(value: Any, algorithm: IntegerAlgorithm, row: Any, column: int) -> Any:
    """Divide a transformed uint32 sum by the factors of its row and column in the tile; returns int32."""
    if algorithm.inverse != 1:
        value = value * tirx.const(algorithm.inverse, "uint32")
    signed = tirx.reinterpret("int32", value)
    shifts = [shift + algorithm.shifts[column] for shift in algorithm.shifts]
    return _choice(row, [signed >> tirx.const(shift, "int32") for shift in shifts])


def _padded_input(x: te.Tensor, info: dict[str, Any], rows: int, columns: int, value: int) -> te.Tensor:
    """Pad an NHWC tensor to `rows` x `columns` and to whole vectors of channels, if that takes padding."""
    top, left, _, _ = info["padding"]
    shape = (info["N"], rows, columns, info["padded_IC"])
    if tuple(int(extent) for extent in x.shape) == shape and not (top or left):
        return x

    def padded(b: Any, h: Any, w: Any, c: Any) -> Any:
        inside = [h >= top, h < top + info["H"], w >= left, w < left + info["W"]]
        if info["padded_IC"] != info["IC"]:
            inside.append(c < info["IC"])
        return tirx.if_then_else(tirx.all(*inside), x[b, h - top, w - left, c], tirx.const(value, x.dtype))

    return te.compute(shape, padded, name="pad")


def schedule(sch: s_tir.Schedule, fused: FusedKernel, rules: TargetRules) -> None:
    """Schedule a kernel that `legalize` made, with whatever was fused behind it."""
    info = fused.info
    if fused.family == FLOATS.family:
        m, numbers = ALGORITHMS[info["algorithm"]].m, FLOATS
    else:
        algorithm = INTEGER_ALGORITHMS[info["algorithm"]]
        m, numbers = algorithm.m, integers(rules, algorithm)
    lanes = rules.fp32_lanes
    stages = {name: fused.producer(name) for name in ("input_rows", "input", "products", "output_rows")}
    others = [block for block in fused.producers if kernel.block_name(sch, block) not in stages]
    b, h, w, c = sch.get_loops(fused.main)
    (y, row, hi), (x, column, wi) = (
        sch.split(loop, [None, size, m]) for loop, size in zip((h, w), info["tile_block"], strict=True)
    )
    vectors, vector = sch.split(c, [None, lanes])
    sch.reorder(b, y, x, row, column, vectors, hi, wi, vector)
    chunk = sch.fuse(b, y, x)
    last = fused.write_at(vectors)
    sch.compute_at(stages["output_rows"], vectors, preserve_unit_loops=True)
    sch.set_scope(stages["output_rows"], 0, "local")
    sch.compute_at(stages["products"], chunk, preserve_unit_loops=True)
    product = _order_products(sch, stages["products"], chunk, info, lanes, numbers.dot)
    sch.compute_at(stages["input"], chunk, preserve_unit_loops=True)
    _spread_places(sch, stages["input"], numbers.data_bytes)
    sch.vectorize(vector)
    sch.unroll(hi)
    sch.unroll(wi)
    kernel.vectorize_inner(sch, kernel.inner(sch, last, vectors), lanes)
    kernel.vectorize_inner(sch, kernel.inner(sch, stages["output_rows"], vectors), lanes)
    if info["OC"] % info["block"]:
        kernel.cut_at_predicate(sch, vectors)
    data_lanes = kernel.vector_factor(info["padded_IC"], rules.vector_bits // (8 * numbers.data_bytes))
    tile = _schedule_input(sch, stages, chunk, data_lanes)
    # Blocks in parallel, or where threads would not get as many of them each, the parts of each stage.
    several = shares_blocks(rules, kernel.loop_extent(sch, chunk))
    last_stage = row if several or shares_rows(rules, info["tile_block"][0]) else sch.fuse(row, column)
    macs = 9 * math.prod(info[key] for key in ("N", "OH", "OW", "OC", "IC"))
    for loop in (chunk,) if several else (product, tile, last_stage):
        kernel.parallelize(sch, loop, rules, macs, kernel.MIN_PARALLEL_MACS)
    _write_products(sch, stages["products"], product, lanes, numbers.dot)
    for producer in others:
        item_bits = 32 if numbers is FLOATS else 8
        if kernel.block_name(sch, producer) == "pad" and info["padded_IC"] != info["IC"]:
            # Vectors up to the last of a pixel, which is partly of zeros.
            width = kernel.vector_factor(info["padded_IC"], rules.vector_bits // item_bits)
            rest, vector = sch.split(sch.get_loops(producer)[-1], [None, width])
            sch.vectorize(vector)
            kernel.cut_at_predicate(sch, rest)
        else:
            kernel.schedule_injective(sch, producer, rules, item_bits)


def _spread_places(sch: s_tir.Schedule, block: SBlockRV, item_bytes: int) -> None:
    """Put an odd number of lines between the places of a patch: else they share few sets of the cache."""
    sch.storage_align(block, 0, 4, 2 * LINE // item_bytes, LINE // item_bytes)


def _order_products(
    sch: s_tir.Schedule, block: SBlockRV, chunk: LoopRV, info: dict[str, Any], lanes: int, dot: Dot | None
) -> LoopRV:
    """Order the loops of the matrix products; returns the outermost one."""
    i, j, tile, channel, ic = kernel.inner(sch, block, chunk)[-5:]
    # The last register tile is whole: a predicate of its parts would stand in the innermost loop.
    tiles, inner_tile = sch.split(tile, [None, info["register_tiles"]], disable_predication=True)
    blocks, vectors, vector = sch.split(channel, [None, info["block"] // lanes, lanes])
    step, k = sch.split(ic, [None, dot.depth if dot else 1])
    outer = [blocks, i, j] if info["blocks_first"] else [i, j, blocks]
    sch.reorder(*outer, tiles, step, inner_tile, vectors, vector, k)
    product = blocks if info["blocks_first"] else sch.fuse(i, j)
    written = sch.cache_write(block, 0, "local")
    _spread_places(sch, written, 4)
    sch.reverse_compute_at(written, tiles, preserve_unit_loops=True)
    kernel.vectorize_inner(sch, kernel.inner(sch, written, tiles), lanes)
    if dot is None:
        sch.vectorize(vector)
    sch.unroll(inner_tile)
    sch.unroll(vectors)
    return product


def _write_products(
    sch: s_tir.Schedule, block: SBlockRV, product: LoopRV, lanes: int, dot: Dot | None
) -> None:
    """Take the first values of the sums out of their loops, and multiply by the target's instruction."""
    *_, tiles, step, _, _, vector, _ = kernel.inner(sch, block, product)
    init = sch.decompose_reduction(block, step)
    if dot:
        kernel.vectorize_inner(sch, kernel.inner(sch, init, tiles), lanes)
        sch.tensorize(vector, dot.name)


def _schedule_input(sch: s_tir.Schedule, stages: dict[str, SBlockRV], chunk: LoopRV, lanes: int) -> LoopRV:
    """Transform the inputs patch by patch, in vectors of channels; returns the loop over the patches."""
    i, j, tile, channel = kernel.inner(sch, stages["input"], chunk)[-4:]
    vectors, vector = sch.split(channel, [None, lanes])
    sch.reorder(tile, vectors, i, j, vector)
    sch.compute_at(stages["input_rows"], vectors, preserve_unit_loops=True)
    sch.set_scope(stages["input_rows"], 0, "local")
    sch.vectorize(vector)
    sch.unroll(i)
    sch.unroll(j)
    kernel.vectorize_inner(sch, kernel.inner(sch, stages["input_rows"], vectors), lanes)
    return tile


FP32 = KernelFamily("winograd_fp32", schedule)
INT8 = KernelFamily("winograd_int8", schedule)
