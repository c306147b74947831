"""Winograd convolutions in float32: 3 x 3 at stride 1, by F(2 x 2, 3 x 3) or F(4 x 4, 3 x 3).

The output is cut into blocks of tiles. For each block its patches are transformed (`input`), multiplied by
the transformed weights (`products`, a matrix product for each of the n * n places of a patch), and
transformed back (`conv`, annotated), through whatever was fused behind. What lies between the stages is one
block's, so that it stays in the cache.

Against the exact result, relative to its largest value, F2 errs by less than 1e-5 and F4 by less than 1e-4
(`winograd_algorithm.Algorithm.relative_error`) on data of one magnitude.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import relax, s_tir, te, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

from tvm_compress.schedules import fp32, kernel, kernel_tables
from tvm_compress.schedules.codebook import read_weights
from tvm_compress.schedules.kernel import FusedKernel, KernelFamily
from tvm_compress.schedules.target_rules import TargetRules
from tvm_compress.schedules.winograd_algorithm import ALGORITHMS, Algorithm, pack_weights

# Numbers in a line of the caches.
_LINE = 16
# Cycles per byte from the second cache and from beyond it: the Cortex-A72's, as its emulation assumes them.
_NEAR, _FAR = 8 / 64, 24 / 64
# Most bytes of what lies between the stages, for a block.
_MOST_BYTES = 4 << 20


@dataclass(frozen=True)
class Blocking:
    """How the work is cut.

    Attributes
    ----------
    rows, columns
        Tiles of a block.
    vectors, tiles
        Of the matrix product's register tile: vectors of output channels, tiles of the image.
    """

    rows: int
    columns: int
    vectors: int
    tiles: int


def applies(info: dict[str, Any]) -> bool:
    """Whether a convolution, by the names of kernel.kernel_attrs, is 3 x 3 at stride 1, without groups."""
    return (info["KH"], info["KW"], info["strides"], info["dilation"], info["groups"]) == (
        3, 3, [1, 1], [1, 1], 1,
    )  # fmt: skip


def choose_blocking(rules: TargetRules, info: dict[str, Any], algorithm: Algorithm) -> Blocking:
    """Choose the block of tiles and the register tile with the least estimated cycles.

    Blocks are of about the same size, as the last ones of a row or column compute what lies beyond the image.
    """
    rows, columns = (-(-info[key] // algorithm.m) for key in ("OH", "OW"))
    best, least = None, math.inf
    for high, wide in ((high, wide) for high in _even_parts(rows) for wide in _even_parts(columns)):
        if high > 1 and wide < columns:
            # Whole rows first: neighbours share what they read.
            continue
        if _block_bytes(info, algorithm, high * wide) > _MOST_BYTES and high * wide > 1:
            continue
        blocks = info["N"] * -(-rows // high) * -(-columns // wide)
        tile = fp32.choose_tile(rules, 1, high * wide, info["OC"], info["IC"])
        product = fp32.tile_cycles(rules, tile, 1, high * wide, info["OC"], info["IC"])
        cycles = max(
            blocks * algorithm.n**2 * product, _memory_cycles(rules, info, algorithm, blocks, high * wide)
        )
        if cycles < least:
            best, least = Blocking(high, wide, tile.vectors, tile.columns), cycles
    assert best is not None
    return best


def _even_parts(extent: int) -> list[int]:
    """Return the sizes of parts into which an extent can be cut evenly, large to small."""
    return sorted({-(-extent // parts) for parts in range(1, extent + 1)}, reverse=True)


def _block_bytes(info: dict[str, Any], algorithm: Algorithm, tiles: int) -> int:
    """Bytes of the transformed inputs and outputs of so many tiles."""
    return 4 * algorithm.n**2 * tiles * (info["IC"] + info["OC"])


def _memory_cycles(
    rules: TargetRules, info: dict[str, Any], algorithm: Algorithm, blocks: int, tiles: int
) -> float:
    """Estimate the cycles of fetching weights and what lies between the stages."""
    weights = 4 * algorithm.n**2 * info["IC"] * info["OC"]
    data = _block_bytes(info, algorithm, tiles)
    weight_rate = _NEAR if weights + data <= rules.l2_bytes else _FAR
    data_rate = _NEAR if data <= rules.l2_bytes // 2 else _FAR
    return blocks * (weight_rate * weights + 2 * data_rate * data)


def choose_algorithm(info: dict[str, Any], rules: TargetRules) -> Algorithm | None:
    """Return the algorithm that is the fastest by the target's table, None for the direct kernel.

    Where nothing was measured the direct kernel is taken: it is never much slower than it has to be, and its
    weights take the least memory.
    """
    work: dict[str, Callable[[int, int], float]] = {"direct": lambda height, width: 9.0 * height * width}
    work |= {name: partial(_multiplications, algorithm) for name, algorithm in ALGORITHMS.items()}
    shape = {"H": info["OH"], "W": info["OW"], "IC": info["IC"], "OC": info["OC"]}
    rows = kernel_tables.load_rows(rules.isa, "conv2d_fp32")
    return ALGORITHMS.get(kernel_tables.fastest(rows, shape, work, "direct"))


def _multiplications(algorithm: Algorithm, height: int, width: int) -> float:
    """Multiplications for an output, per pair of an input and an output channel."""
    return float(algorithm.n**2 * -(-height // algorithm.m) * -(-width // algorithm.m))


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
    # Transformed weights would have no codebook.
    algorithm = choose_algorithm(info, rules) if applies(info) and weight.codebook is None else None
    if algorithm is None:
        return fp32.legalize(bb, call, rules)
    blocking = choose_blocking(rules, info, algorithm)
    block = blocking.vectors * rules.fp32_lanes
    in_channels = -(-info["IC"] // rules.fp32_lanes) * rules.fp32_lanes
    info |= {
        "scheme": "fp32", "activation_bits": 32, "weight_bits": 32, "algorithm": algorithm.name,
        "block": block, "padded_IC": in_channels,
        "tile_block": [blocking.rows, blocking.columns], "register_tiles": blocking.tiles,
    }  # fmt: skip
    packed = relax.const(pack_weights(weight.array, algorithm, block, in_channels))
    return bb.call_te(
        _compute, call.args[0], packed, info,
        primfunc_name_hint="conv2d_fp32_winograd", primfunc_attrs={"op_pattern": 4},
    )  # fmt: skip


def _choice(index: Any, values: Sequence[Any]) -> Any:
    """Return values[index]; the loop of the index is unrolled, which decides."""
    result = values[-1]
    for place in range(len(values) - 2, -1, -1):
        result = tirx.Select(tirx.EQ(index, place), values[place], result)
    return result


def _compute(x: te.Tensor, weight: te.Tensor, info: dict[str, Any]) -> te.Tensor:
    algorithm = ALGORITHMS[info["algorithm"]]
    m, n, block = algorithm.m, algorithm.n, info["block"]
    high, wide = info["tile_block"]
    rows, columns = -(-info["OH"] // (m * high)), -(-info["OW"] // (m * wide))
    tiles = -(-high * wide // info["register_tiles"]) * info["register_tiles"]
    outs = -(-info["OC"] // block) * block
    padded = _padded_input(x, info, rows * high * m + 2, columns * wide * m + 2)
    chunks = (info["N"], rows, columns)

    def patch_rows(b: Any, y: Any, x: Any, i: Any, k: Any, t: Any, c: Any) -> Any:
        # What fills up the last register tile repeats the last tile.
        t = t if tiles == high * wide else tirx.min(t, high * wide - 1)
        row, column = (y * high + t // wide) * m, (x * wide + t % wide) * m + k
        return _choice(
            i, algorithm.transform_input([padded[b, row + place, column, c] for place in range(n)])
        )

    half = te.compute((*chunks, n, n, tiles, info["padded_IC"]), patch_rows, name="input_rows")
    data = te.compute(
        (*chunks, n, n, tiles, info["padded_IC"]),
        lambda b, y, x, i, j, t, c: _choice(
            j, algorithm.transform_input([half[b, y, x, i, place, t, c] for place in range(n)])
        ),
        name="input",
    )
    ic = te.reduce_axis((0, info["padded_IC"]), "ic")
    products = te.compute(
        (*chunks, n, n, tiles, outs),
        lambda b, y, x, i, j, t, c: te.sum(
            data[b, y, x, i, j, t, ic] * weight[i, j, c // block, ic, c % block], axis=[ic]
        ),
        name="products",
    )
    back = te.compute(
        (*chunks, m, n, tiles, outs),
        lambda b, y, x, i, j, t, c: _choice(
            i, algorithm.transform_output([products[b, y, x, place, j, t, c] for place in range(n)])
        ),
        name="output_rows",
    )

    def output(b: Any, h: Any, w: Any, c: Any) -> Any:
        (y, row), (x, column) = (h // (m * high), h // m % high), (w // (m * wide), w // m % wide)
        tile = row * wide + column
        values = [back[b, y, x, h % m, place, tile, c] for place in range(n)]
        return _choice(w % m, algorithm.transform_output(values))

    shape = (info["N"], rows * high * m, columns * wide * m, outs)
    result = te.compute(shape, output, name="conv", attrs=kernel.kernel_attrs("winograd", info))
    true_shape = (info["N"], info["OH"], info["OW"], info["OC"])
    if shape == true_shape:
        return result
    return te.compute(true_shape, lambda *indices: result(*indices), name="crop")


def _padded_input(x: te.Tensor, info: dict[str, Any], rows: int, columns: int) -> te.Tensor:
    """Pad an NHWC tensor to `rows` x `columns` and to whole vectors of channels, if that takes padding."""
    top, left, _, _ = info["padding"]
    shape = (info["N"], rows, columns, info["padded_IC"])
    if tuple(int(extent) for extent in x.shape) == shape and not (top or left):
        return x

    def value(b: Any, h: Any, w: Any, c: Any) -> Any:
        inside = [h >= top, h < top + info["H"], w >= left, w < left + info["W"]]
        if info["padded_IC"] != info["IC"]:
            inside.append(c < info["IC"])
        return tirx.if_then_else(tirx.all(*inside), x[b, h - top, w - left, c], tirx.const(0, "float32"))

    return te.compute(shape, value, name="pad")


def schedule(sch: s_tir.Schedule, fused: FusedKernel, rules: TargetRules) -> None:
    """Schedule a kernel that `legalize` made, with whatever was fused behind it."""
    info = fused.info
    m, lanes = ALGORITHMS[info["algorithm"]].m, rules.fp32_lanes
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
    for name in ("products", "input"):
        sch.compute_at(stages[name], chunk, preserve_unit_loops=True)
        # An odd number of lines from one place of a patch to the next: else they share few sets of the cache.
        sch.storage_align(stages[name], 0, 4, 2 * _LINE, _LINE)
    sch.vectorize(vector)
    sch.unroll(hi)
    sch.unroll(wi)
    kernel.vectorize_inner(sch, kernel.inner(sch, last, vectors), lanes)
    kernel.vectorize_inner(sch, kernel.inner(sch, stages["output_rows"], vectors), lanes)
    if info["OC"] % info["block"]:
        kernel.cut_at_predicate(sch, vectors)
    product = _order_products(sch, stages["products"], chunk, info, lanes)
    tile = _schedule_input(sch, stages, chunk, lanes)
    # Blocks in parallel, or where there are fewer of them than threads, the parts of each stage.
    several = kernel.loop_extent(sch, chunk) >= rules.threads
    macs = 9 * math.prod(info[key] for key in ("N", "OH", "OW", "OC", "IC"))
    for loop in (chunk,) if several else (product, tile, row):
        kernel.parallelize(sch, loop, rules, macs, kernel.MIN_PARALLEL_MACS)
    sch.decompose_reduction(stages["products"], kernel.inner(sch, stages["products"], product)[2])
    for producer in others:
        if kernel.block_name(sch, producer) == "pad" and info["padded_IC"] != info["IC"]:
            # Vectors up to the last of a pixel, which is partly of zeros.
            rest, vector = sch.split(sch.get_loops(producer)[-1], [None, lanes])
            sch.vectorize(vector)
            kernel.cut_at_predicate(sch, rest)
        else:
            kernel.schedule_injective(sch, producer, rules)


def _order_products(
    sch: s_tir.Schedule, block: SBlockRV, chunk: LoopRV, info: dict[str, Any], lanes: int
) -> LoopRV:
    """Order the loops of the matrix products; returns the loop over them."""
    i, j, tile, channel, ic = kernel.inner(sch, block, chunk)[-5:]
    tiles, inner_tile = sch.split(tile, [None, info["register_tiles"]])
    blocks, vectors, vector = sch.split(channel, [None, info["block"] // lanes, lanes])
    sch.reorder(i, j, blocks, tiles, ic, inner_tile, vectors, vector)
    product = sch.fuse(i, j)
    written = sch.cache_write(block, 0, "local")
    sch.reverse_compute_at(written, tiles, preserve_unit_loops=True)
    kernel.vectorize_inner(sch, kernel.inner(sch, written, tiles), lanes)
    sch.vectorize(vector)
    sch.unroll(inner_tile)
    sch.unroll(vectors)
    return product


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


FAMILY = KernelFamily("winograd", legalize, schedule)
