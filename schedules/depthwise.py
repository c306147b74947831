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
from dataclasses import asdict
from math import gcd
from typing import Any

from tvm import relax, s_tir, te, tirx
from tvm.s_tir.schedule import LoopRV

from tvm_compress.schedules import kernel, packing
from tvm_compress.schedules.codebook import Weights
from tvm_compress.schedules.depthwise_plan import (
    MOST_UNROLLED,
    Plan,
    cuts,
    form_for,
    pack_pairs,
    pack_taps,
)
from tvm_compress.schedules.intrin.pairs import pair_dot_for
from tvm_compress.schedules.kernel import FusedKernel, KernelFamily, kernel_attrs
from tvm_compress.schedules.packing import IntegerLayer, round_up
from tvm_compress.schedules.target_rules import TargetRules

# op_pattern of TVM's fusion: element-wise operators may follow in the same PrimFunc.
_OUT_FUSABLE = 4


def is_depthwise(groups: int, in_channels: int) -> bool:
    """Whether each group has one input channel."""
    return groups > 1 and groups == in_channels


def legalize_float(
    bb: relax.BlockBuilder, call: relax.Call, info: dict[str, Any], weight: Weights, rules: TargetRules
) -> relax.Expr:
    """Replace a float32 depthwise convolution; `info` is its geometry (kernel.conv_geometry)."""
    form = form_for(rules, False, info["OC"])
    info = info | {"scheme": "fp32", "activation_bits": 32, "weight_bits": 32, "form": "float32"}
    plan = rules.choices.cut(info, "depthwise", cuts(rules, form, info))
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
    info = layer.info() | {"form": form.name}
    plan = rules.choices.cut(info, "depthwise", cuts(rules, form, info))
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
    if info["KH"] * info["KW"] * plan.columns <= MOST_UNROLLED:
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


FP32 = KernelFamily("depthwise_fp32", schedule)
INT8 = KernelFamily("depthwise_int8", schedule)
