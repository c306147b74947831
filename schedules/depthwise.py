"""Depthwise convolutions, float32 and integer: vectors over channels, a strip of padded rows in the cache.

A kernel runs over strips of rows and chunks of channels. `stored` holds the strip's input, padded and in the
form that the products take; it is filled once per strip and chunk and stays in the first-level cache. `sums`
(annotated) keeps a tile of pixels by one vector of channels in registers, all taps unrolled. Three forms:

float32
    One multiply-add a tap.
"pairs" (x86)
    `stored` holds two pixels, a tap apart, as the halves of an int32, so that (v)pmaddwd multiplies two taps
    and adds them exactly in int32.
"bytes" (Arm)
    Two taps' products of bytes are summed in 16 bits (smull, smlal), which weights in [-127, 127] cannot
    overflow, then added to int32 (saddw).

Several output channels per input channel (a multiplier) take the same kernels: `stored` repeats the channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import gcd
from typing import Any

import numpy as np
from tvm import relax, s_tir, te, tirx
from tvm.s_tir.schedule import LoopRV

from tvm_compress.schedules import kernel, packing
from tvm_compress.schedules.codebook import Weights, read_weights
from tvm_compress.schedules.intrin.pairs import pair_dot_for
from tvm_compress.schedules.kernel import FusedKernel, KernelFamily, conv_geometry, kernel_attrs
from tvm_compress.schedules.packing import IntegerLayer, round_up
from tvm_compress.schedules.target_rules import TargetRules

# op_pattern of TVM's fusion: element-wise operators may follow in the same PrimFunc.
_OUT_FUSABLE = 4

# Most multiply-add statements that a tile is unrolled into: more would miss the instruction cache.
_MOST_UNROLLED = 200

# What a tile costs beside its multiply-adds, in multiply-adds: its loop, its addresses.
_TILE_OVERHEAD = 4

# Most accumulators of a tile: enough to hide the latency of an addition.
_MOST_ACCUMULATORS = 8


@dataclass(frozen=True)
class Plan:
    """How a depthwise kernel is cut.

    Attributes
    ----------
    lanes
        Channels of a vector.
    columns
        Pixels of a row that a register tile holds.
    rows
        Output rows of a strip, a divisor of the output's height.
    chunk
        Channels whose strip is stored at once, a divisor of the padded channels.
    """

    lanes: int
    columns: int
    rows: int
    chunk: int


@dataclass(frozen=True)
class Form:
    """What the products of a depthwise kernel are made of.

    Attributes
    ----------
    name
        "float32", "pairs" or "bytes".
    lanes
        Channels of a vector.
    item_bytes
        Of one channel of one pixel in `stored`.
    accumulators
        Vector registers that the sums of one pixel and vector take.
    """

    name: str
    lanes: int
    item_bytes: int
    accumulators: int


def is_depthwise(groups: int, in_channels: int) -> bool:
    """Whether each group has one input channel."""
    return groups > 1 and groups == in_channels


def form_for(rules: TargetRules, integer: bool, channels: int) -> Form:
    """Return the form in which a target multiplies fastest."""
    if not integer:
        return Form("float32", rules.fp32_lanes, 4, 1)
    if rules.is_arm:
        lanes = 16 if channels % 16 == 0 else 8
        return Form("bytes", lanes, 1, lanes // 4)
    return Form("pairs", rules.vector_bits // 32, 4, 1)


def choose_plan(rules: TargetRules, form: Form, info: dict[str, Any]) -> Plan:
    """Return the cut for a layer, `info` being what `kernel_attrs` takes."""
    kh, kw = info["KH"], info["KW"]
    (sh, sw), (dh, dw) = info["strides"], info["dilation"]
    taps = kh * (-(-kw // 2) if form.name == "pairs" else kw)
    # Weights stay in registers where they leave enough of them for a tile.
    held = taps if taps <= rules.vector_registers - 4 * form.accumulators - 2 else 1
    most = (rules.vector_registers - held - 1) // form.accumulators
    most = max(1, min(most, _MOST_ACCUMULATORS, _MOST_UNROLLED // taps, info["OW"]))
    columns = min(
        range(1, most + 1),
        key=lambda t: (-(-info["OW"] // t) * (t * taps + _TILE_OVERHEAD + (info["OW"] % t > 0) * taps), -t),
    )
    channels = round_up(info["OC"], form.lanes)
    overhang = channels != info["OC"]
    width = (round_up(info["OW"], columns) - 1) * sw + dw * (kw - 1) + 1

    def strip_bytes(rows: int, chunk: int) -> int:
        return ((rows - 1) * sh + dh * (kh - 1) + 1) * width * chunk * form.item_bytes

    def filled_per_row(rows: int) -> float:
        return ((rows - 1) * sh + dh * (kh - 1) + 1) / rows

    line = 64 // form.item_bytes
    chunks = [c for c in range(form.lanes, channels + 1, form.lanes) if channels % c == 0]
    # Chunks of whole lines of the cache, if the channels allow it.
    whole = [c for c in chunks if c % line == 0] or chunks
    # The loop over vectors is cut where channels overhang: it must then run over all of them.
    chunks = [channels] if overhang else whole
    half = rules.l1_bytes // 2
    divisors = [r for r in range(1, info["OH"] + 1) if info["OH"] % r == 0]
    fitting = [(r, c) for r in divisors for c in chunks if strip_bytes(r, c) <= half]
    if not fitting:
        fitting = [(divisors[0], chunks[0])]
    # Few rows are stored twice, then few passes over the input.
    rows, chunk = min(fitting, key=lambda cut: (filled_per_row(cut[0]), -cut[1]))
    return Plan(form.lanes, columns, rows, chunk)


def pack_taps(weight: np.ndarray, lanes: int) -> np.ndarray:
    """Turn [O, 1, KH, KW] into [KH, KW, C], C being O filled up with zeros to whole vectors."""
    o, _, kh, kw = weight.shape
    channels = round_up(o, lanes)
    return np.ascontiguousarray(packing.pad_axes(weight[:, 0].transpose(1, 2, 0), (kh, kw, channels)))


def pack_pairs(weight: np.ndarray, lanes: int) -> np.ndarray:
    """Turn int8 [O, 1, KH, KW] into int16 [KH, pairs of KW, C, 2]; zeros for what is missing."""
    taps = pack_taps(weight, lanes).astype(np.int16)
    kh, kw, channels = taps.shape
    even = packing.pad_axes(taps, (kh, round_up(kw, 2), channels))
    return np.ascontiguousarray(even.reshape(kh, -1, 2, channels).swapaxes(2, 3))


def legalize_float(
    bb: relax.BlockBuilder, call: relax.Call, info: dict[str, Any], weight: Weights, rules: TargetRules
) -> relax.Expr:
    """Replace a float32 depthwise convolution; `info` is its geometry (kernel.conv_geometry)."""
    form = form_for(rules, False, info["OC"])
    plan = choose_plan(rules, form, info)
    info = info | {"scheme": "fp32", "activation_bits": 32, "weight_bits": 32, "form": "float32"}
    info["plan"] = asdict(plan)
    packed = weight.packed(
        bb,
        lambda array: pack_taps(array, plan.lanes),
        lambda *place: place[-1],
        round_up(info["OC"], plan.lanes),
    )

    def compute(x: te.Tensor, taps: te.Tensor) -> te.Tensor:
        stored = _stored(x, info, plan, "float32", 0.0)
        (sh, sw), (dh, dw) = info["strides"], info["dilation"]
        ky, kx = te.reduce_axis((0, info["KH"]), "ky"), te.reduce_axis((0, info["KW"]), "kx")
        sums = te.compute(
            _sums_shape(info, plan),
            lambda n, y, x, c: te.sum(
                stored[n, y * sh + ky * dh, x * sw + kx * dw, c] * taps[ky, kx, c], axis=[ky, kx]
            ),
            name="sums",
            attrs=kernel_attrs("depthwise_fp32", info),
        )
        shape = (info["N"], info["OH"], info["OW"], info["OC"])
        if shape == _sums_shape(info, plan):
            return sums
        return te.compute(shape, lambda *place: sums(*place), name="crop")

    return _call(bb, compute, [call.args[0], packed], "fp32")


def legalize_integer(
    bb: relax.BlockBuilder, call: relax.Call, layer: IntegerLayer, rules: TargetRules
) -> relax.Expr:
    """Replace an integer depthwise convolution by an exact kernel.

    Raises
    ------
    KernelError
        Where the sums may overflow int32.
    """
    form = form_for(rules, True, layer.out_channels)
    info = layer.info() | {
        "strides": list(layer.strides),
        "dilation": list(layer.dilation),
        "padding": list(layer.padding),
        "form": form.name,
    }
    plan = choose_plan(rules, form, info)
    info["plan"] = asdict(plan)
    low, high = (-128, 127) if layer.data_dtype == "int8" else (0, 255)
    # Bytes are multiplied signed.
    offset = -128 if form.name == "bytes" and layer.data_dtype == "uint8" else 0
    packing.check_accumulator(layer, low + offset, high + offset)
    pack = pack_pairs if form.name == "pairs" else pack_taps

    def compute(x: te.Tensor, taps: te.Tensor, bias: te.Tensor) -> te.Tensor:
        if form.name == "pairs":
            sums = _sum_pairs(x, taps, info, plan, layer.zero_point)
        else:
            sums = _sum_bytes(x, taps, info, plan, layer.zero_point, offset)
        shape = (info["N"], info["OH"], info["OW"], info["OC"])
        return te.compute(
            shape, lambda n, y, x, c: packing.wrapping_sum(sums[n, y, x, c], bias[c]), name="biased"
        )

    constants = [relax.const(pack(layer.weight, plan.lanes)), relax.const(packing.fold_bias(layer, offset))]
    return _call(bb, compute, [call.args[0], *constants], "int8")


def _call(
    bb: relax.BlockBuilder, compute: Callable[..., te.Tensor], args: Sequence[relax.Expr], scheme: str
) -> relax.Expr:
    return bb.call_te(
        compute,
        *args,
        primfunc_name_hint=f"depthwise_{scheme}",
        primfunc_attrs={"op_pattern": _OUT_FUSABLE},
    )


def _sums_shape(info: dict[str, Any], plan: Plan) -> tuple[int, int, int, int]:
    return (
        info["N"],
        info["OH"],
        round_up(info["OW"], plan.columns),
        round_up(info["OC"], plan.lanes),
    )


def _rows_read(info: dict[str, Any]) -> int:
    return (info["OH"] - 1) * info["strides"][0] + info["dilation"][0] * (info["KH"] - 1) + 1


def _columns_read(info: dict[str, Any], plan: Plan) -> int:
    last = round_up(info["OW"], plan.columns) - 1
    return last * info["strides"][1] + info["dilation"][1] * (info["KW"] - 1) + 1


def _pixel(
    data: te.Tensor,
    info: dict[str, Any],
    plan: Plan,
    columns: int,
    convert: Callable[[Any], Any],
    outside: Any,
) -> Callable[..., Any]:
    """Return the function that gives the value at (image, row, column, channel) of the padded input.

    `columns` of it are read; what lies outside of the image or behind the last channel is `outside`.
    """
    top, left, _, _ = info["padding"]
    h, w, channels = info["H"], info["W"], info["OC"]
    multiplier = channels // info["IC"]

    def value(image: Any, y: Any, x: Any, c: Any) -> Any:
        conditions = []
        if top or _rows_read(info) > h:
            conditions += [y >= top, y < top + h]
        if left or columns > w:
            conditions += [x >= left, x < left + w]
        if channels % plan.lanes:
            conditions.append(c < channels)
        element = convert(data[image, y - top, x - left, c if multiplier == 1 else c // multiplier])
        return tirx.if_then_else(tirx.all(*conditions), element, outside) if conditions else element

    return value


def _stored(
    data: te.Tensor, info: dict[str, Any], plan: Plan, dtype: str, outside: float, offset: int = 0
) -> te.Tensor:
    """Pad the input, add `offset`, repeat the channels; or return it as it is where tiles can read that."""
    rows, columns = _rows_read(info), _columns_read(info, plan)
    top, left, _, _ = info["padding"]
    channels = round_up(info["OC"], plan.lanes)
    inside = not top and not left and rows <= info["H"] and columns <= info["W"]
    if inside and channels == info["IC"] and dtype == data.dtype:
        return data

    def convert(element: Any) -> Any:
        if offset:
            element = element.astype("int16") + tirx.const(offset, "int16")
        return element.astype(dtype)

    value = _pixel(data, info, plan, columns, convert, tirx.const(outside, dtype))
    return te.compute((info["N"], rows, columns, channels), value, name="stored")


def _sum_pairs(
    data: te.Tensor, taps: te.Tensor, info: dict[str, Any], plan: Plan, zero_point: int
) -> te.Tensor:
    """Sums of products of pairs: `stored` holds the pixels of two neighbouring taps in one int32."""
    (sh, sw), (dh, dw) = info["strides"], info["dilation"]
    pairs = -(-info["KW"] // 2)
    # Only columns that a pair can begin at are stored.
    step = gcd(sw, 2 * dw) if pairs > 1 else sw
    last = (round_up(info["OW"], plan.columns) - 1) * sw + 2 * dw * (pairs - 1)
    columns = last // step + 1
    pixel = _pixel(
        data,
        info,
        plan,
        last + dw + 1,
        lambda element: element.astype("int32"),
        tirx.const(zero_point, "int32"),
    )

    def value(image: Any, y: Any, x: Any, c: Any) -> Any:
        low = pixel(image, y, x * step, c) & tirx.const(0xFFFF, "int32")
        return low | (pixel(image, y, x * step + dw, c) << tirx.const(16, "int32"))

    shape = (info["N"], _rows_read(info), columns, round_up(info["OC"], plan.lanes))
    stored = te.compute(shape, value, name="stored")
    extents = {"ky": info["KH"], "pair": pairs, "half": 2}
    ky, pair, half = (te.reduce_axis((0, extent), name) for name, extent in extents.items())

    def products(n: Any, y: Any, x: Any, c: Any) -> Any:
        both = stored[n, y * sh + ky * dh, x * (sw // step) + pair * (2 * dw // step), c]
        high = (both >> tirx.const(16, "int32")).astype("int16")
        one = tirx.Select(half == 0, both.astype("int16"), high).astype("int32")
        return te.sum(one * taps[ky, pair, c, half].astype("int32"), axis=[ky, pair, half])

    attrs = kernel_attrs("depthwise_int8", info)
    return te.compute(_sums_shape(info, plan), products, name="sums", attrs=attrs)


def _sum_bytes(
    data: te.Tensor, taps: te.Tensor, info: dict[str, Any], plan: Plan, zero_point: int, offset: int
) -> te.Tensor:
    """Sums of products of bytes, two taps at a time in 16 bits."""
    (sh, sw), (dh, dw) = info["strides"], info["dilation"]
    kw, count = info["KW"], info["KH"] * info["KW"]
    stored = _stored(data, info, plan, "int8", zero_point + offset, offset)
    pair = te.reduce_axis((0, -(-count // 2)), "pair")

    def products(n: Any, y: Any, x: Any, c: Any) -> Any:
        def product(tap: Any) -> Any:
            ky, kx = tap // kw, tap % kw
            value = stored[n, y * sh + ky * dh, x * sw + kx * dw, c].astype("int16")
            return value * taps[ky, kx, c].astype("int16")

        second: Any = pair * 2 + 1
        if count == 1:
            return te.sum(product(pair).astype("int32"), axis=[pair])
        there = product(tirx.min(second, count - 1))
        if count % 2:
            there = tirx.if_then_else(second < count, there, tirx.const(0, "int16"))
        return te.sum((product(pair * 2) + there).astype("int32"), axis=[pair])

    attrs = kernel_attrs("depthwise_int8", info)
    return te.compute(_sums_shape(info, plan), products, name="sums", attrs=attrs)


def schedule(sch: s_tir.Schedule, fused: FusedKernel, rules: TargetRules) -> None:
    """Schedule a fused depthwise PrimFunc in place."""
    info, plan = fused.info, Plan(**fused.info["plan"])
    sums = fused.main
    image, y, x, c, *reduction = sch.get_loops(sums)
    chunk, vectors, lane = sch.split(c, [None, plan.chunk // plan.lanes, plan.lanes])
    strip, y_in = sch.split(y, [None, plan.rows])
    x_tile, x_in = sch.split(x, [None, plan.columns])
    tensorized = reduction[-1:] if info["form"] == "pairs" else []
    steps = reduction[: len(reduction) - len(tensorized)]
    sch.reorder(image, strip, chunk, vectors, y_in, x_tile, *steps, x_in, lane, *tensorized)
    outer = sch.fuse(image, strip, chunk)
    _write(sch, fused, vectors, x_tile, plan)
    _fill_strips(sch, fused, outer, plan)
    macs = info["N"] * info["OH"] * info["OW"] * info["OC"] * info["KH"] * info["KW"]
    kernel.parallelize(sch, outer, rules, macs, kernel.MIN_PARALLEL_MACS)
    if tensorized:
        init = sch.decompose_reduction(sums, steps[0])
        kernel.vectorize_inner(sch, kernel.inner(sch, init, x_tile), plan.lanes)
        sch.tensorize(lane, pair_dot_for(plan.lanes).name)
    else:
        sch.vectorize(lane)
    sch.unroll(x_in)
    if info["KH"] * info["KW"] * plan.columns <= _MOST_UNROLLED:
        for loop in steps:
            sch.unroll(loop)
    if not tensorized:
        sch.decompose_reduction(sums, steps[0])


def _write(sch: s_tir.Schedule, fused: FusedKernel, vectors: LoopRV, x_tile: LoopRV, plan: Plan) -> None:
    """Write each tile through the epilogue, the true pixels and channels of it."""
    last = fused.write_at(x_tile)
    *pixels, channels = kernel.inner(sch, last, x_tile)
    sch.vectorize(channels)
    for loop in pixels:
        sch.unroll(loop)
    if fused.info["OC"] % plan.lanes:
        kernel.cut_at_predicate(sch, vectors)
    if fused.info["OW"] % plan.columns:
        kernel.cut_at_predicate(sch, x_tile)


def _fill_strips(sch: s_tir.Schedule, fused: FusedKernel, outer: LoopRV, plan: Plan) -> None:
    """Fill `stored` strip by strip, in whole vectors."""
    stored = fused.producer("stored")
    if stored is None:
        return
    sch.compute_at(stored, outer, preserve_unit_loops=True)
    *_, columns, channels = kernel.inner(sch, stored, outer)
    several = kernel.vector_factor(plan.chunk // plan.lanes, 4) if plan.lanes <= 8 else 1
    _, lane = sch.split(channels, [None, several * plan.lanes])
    sch.vectorize(lane)
    kernel.cut_at_predicate(sch, columns)


def legalize(bb: relax.BlockBuilder, call: relax.Call, rules: TargetRules) -> relax.Expr:
    """Replace a call of a depthwise convolution, of either operator."""
    if call.op.name == "relax.nn.conv2d":
        weight = read_weights(bb, call.args[1], "weights")
        return legalize_float(bb, call, conv_geometry(call, weight.shape), weight, rules)
    return legalize_integer(bb, call, packing.read_layer(call), rules)


FP32 = KernelFamily("depthwise_fp32", legalize, schedule)
INT8 = KernelFamily("depthwise_int8", legalize, schedule)
