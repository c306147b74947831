"""The packing of activations into bit planes: a PrimFunc of its own in front of a bit-serial kernel."""

import json
from typing import Any

from tvm import relax, s_tir
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from tvm_compress.schedules.intrin.bits import WORD_CHANNELS, word_packer
from tvm_compress.schedules.kernel import INFO, MIN_PARALLEL_ELEMENTS, parallelize
from tvm_compress.schedules.packing import IntegerLayer
from tvm_compress.schedules.target_rules import TargetRules

# op_pattern of TVM's fusion: nothing is fused with it.
_OPAQUE = 8

# Kernels by all that they depend on: parsing one takes as long as scheduling two others.
_MADE: dict[tuple[Any, ...], PrimFunc] = {}
_MOST_MADE = 1024


def packed_shape(layer: IntegerLayer) -> tuple[int, ...]:
    """Return the shape (N, padded H, padded W, activation_bits, IC / 32, 4) of packed activations."""
    words = layer.in_channels // WORD_CHANNELS
    return (layer.data_shape[0], *layer.padded_size, layer.activation_bits, words, 4)


def pack_activations(
    bb: relax.BlockBuilder, data: relax.Expr, layer: IntegerLayer, rules: TargetRules
) -> relax.Var:
    """Emit a call of the kernel that pads activations with the zero point and packs their bit planes."""
    facts = (layer.operator, layer.data_shape, layer.padding, layer.activation_bits, layer.zero_point, rules)
    if facts not in _MADE:
        if len(_MADE) >= _MOST_MADE:
            _MADE.clear()
        _MADE[facts] = packing_kernel(layer, rules)
    func = bb.add_func(_MADE[facts], f"bitpack{layer.activation_bits}")
    return bb.emit(relax.call_tir(func, [data], out_ty=relax.TensorType(packed_shape(layer), "uint8")))


def packing_kernel(layer: IntegerLayer, rules: TargetRules) -> PrimFunc:
    """Return the scheduled PrimFunc (data uint8 NHWC or [N, I]) -> packed activations."""
    n, h, w, ic = layer.data_shape
    top, left, _, _ = layer.padding
    bits = layer.activation_bits
    _, height, width, _, words, _ = shape = packed_shape(layer)
    is_dense = layer.operator == "dense"
    data_shape = (w, ic) if is_dense else (n, h, w, ic)
    everything = tuple(slice(0, extent) for extent in data_shape)
    is_padded, zero_point = layer.is_padded, layer.zero_point
    pack = word_packer(rules.isa)

    def index(image: Any, y: Any, x: Any, c: Any) -> list[Any]:
        return [x, c] if is_dense else [image, y - top, x - left, c]

    def inside(y: Any, x: Any) -> Any:
        return T.And(T.And(y >= top, y < top + h), T.And(x >= left, x < left + w))

    def border(bit: Any) -> Any:
        # All ones where the zero point has the bit, else zeros.
        return T.broadcast(T.Cast("uint8", T.int32(0) - (T.shift_right(T.int32(zero_point), bit) & 1)), 4)

    @T.prim_func(s_tir=True)
    def main(data_handle: T.handle, packed_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "op_pattern": _OPAQUE, "tirx.is_scheduled": True})
        data = T.match_buffer(data_handle, data_shape, "uint8")
        packed = T.match_buffer(packed_handle, shape, "uint8")
        for i, y, x in T.grid(n, height, width):
            with T.sblock("pack"):
                vi, vy, vx = T.axis.remap("SSS", [i, y, x])
                T.reads(data[everything])
                T.writes(packed[vi, vy, vx, 0:bits, 0:words, 0:4])
                for k in T.serial(words):
                    if not is_padded or inside(vy, vx):
                        for b in T.unroll(bits):
                            packed[vi, vy, vx, b, k, T.ramp(T.int32(0), 1, 4)] = pack(
                                data, index(vi, vy, vx, k * WORD_CHANNELS), b
                            )
                    else:
                        for b in T.unroll(bits):
                            packed[vi, vy, vx, b, k, T.ramp(T.int32(0), 1, 4)] = border(b)

    sch = s_tir.Schedule(main)
    loops = sch.get_loops(sch.get_sblock("pack"))
    parallelize(sch, sch.fuse(*loops[:2]), rules, n * h * w * ic, MIN_PARALLEL_ELEMENTS)
    return sch.mod["main"].without_attr("global_symbol").with_attr(INFO, json.dumps(_info(layer)))


def _info(layer: IntegerLayer) -> dict[str, Any]:
    """Return what the kernel does, for latency models: an operator of its own, without multiplications."""
    facts = layer.info()
    names = ("N", "H", "W", "IC", "activation_bits")
    return {"operator": "bitpack"} | {name: facts[name] for name in names}
