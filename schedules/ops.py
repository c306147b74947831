"""The integer operators that realised modules hold, registered with Relax on first use.

They are the contract between whoever writes integers into a module (`passes.realize_integer`), whoever
computes them with torch (the twin) and whoever lowers them to kernels (`schedules.apply`). Activations are
NHWC, weights keep the source framework's layout (OIHW, or [out, in]). What each computes, exactly:

quantize(x: float32)
    `clamp(round_half_to_even(x / scale) + zero_point, qmin, qmax)` as `dtype`; x / scale is a true float32
    division.
dequantize(x: integer, scale: float32 [C] or [])
    `float32(x - zero_point) * scale`; one multiplication, so it rounds once on every machine.
conv2d(x: int8 | uint8 NHWC, w: int8 OIHW, b: int32 [O]) -> int32 NHWC
    `sum((x - zero_point) * w) + b`; outside of the image x counts as zero_point, that is as 0.
dense(x: int8 | uint8 [N, I], w: int8 [O, I], b: int32 [O]) -> int32 [N, O]
    The same without space.
requantize(x: int32, multiplier: int32 [C] or [1])
    `clamp(round_half_away_from_zero(x * multiplier / 2**shift) + zero_point, qmin, qmax)` as `dtype`, the
    product in 64 bits, the last axis of x being C. dtype may be int32, for the sides of a residual addition.
    An optional attribute `bound` states that |x| never exceeds it, as whoever wrote the call has proven; with
    it kernels may find that 32 bits hold all products. It changes no result.
table(x: int8 | uint8, values: int8 | uint8 | int32 [256]) -> integers of the values' type, the shape of x
    `values[x - lowest]`, lowest being the smallest number of x's type: any function of one number, such as
    hard-swish.
window_sum(x: int32 NHWC) -> int32 NHWC
    The sum over each window of `pool_size`, every `strides`, with zeros around x (`padding`: top, left,
    bottom, right): what an average is taken of.
binarize(w: float32)
    int8 +1 where w >= 0, else -1 (stands only in QDQ modules, before weights are realised).
lookup(indices: uint8, codebook: float32 [R, K]) -> float32, the shape of the indices
    `codebook[r, indices[...]]`, r being the index along `axis`, or 0 where R is 1: the weights of an fp32
    site that are stored as indices into few values.

`scheme` says which integers a site computes ("int8" or "bitserial"), `activation_bits` and `weight_bits` how
many bits they need; with weight_bits = 1 the weights are -1 and +1, else two's complement within
+-(2**(bits - 1) - 1). With scheme "bitserial" activations are uint8 in [0, 2**activation_bits - 1].
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import tvm
from tvm import relax
from tvm.ir import Op, _ffi_api

PREFIX = "tvm_compress."


def _attr(call: relax.Call, name: str) -> Any:
    return call.attrs[name]


def conv2d_output_shape(
    data: Sequence[int], weight: Sequence[int], attrs: Mapping[str, Any]
) -> tuple[int, ...]:
    """Shape (N, OH, OW, O) of a convolution of NHWC data with OIHW weights."""
    n, h, w, _ = data
    o, _, kh, kw = weight
    top, left, bottom, right = (int(p) for p in attrs["padding"])
    (sh, sw), (dh, dw) = ([int(v) for v in attrs[k]] for k in ("strides", "dilation"))
    out_h = (h + top + bottom - dh * (kh - 1) - 1) // sh + 1
    out_w = (w + left + right - dw * (kw - 1) - 1) // sw + 1
    return (n, out_h, out_w, o)


def static_shape(expr: relax.Expr) -> tuple[int, ...]:
    """Shape of an expression whose every extent is a constant."""
    return tuple(int(extent) for extent in expr.ty.shape)


def _infer_conv2d(call: relax.Call, _: relax.BlockBuilder) -> relax.TensorType:
    shape = conv2d_output_shape(static_shape(call.args[0]), static_shape(call.args[1]), call.attrs)
    return relax.TensorType(shape, "int32")


def _infer_dense(call: relax.Call, _: relax.BlockBuilder) -> relax.TensorType:
    return relax.TensorType((static_shape(call.args[0])[0], static_shape(call.args[1])[0]), "int32")


def _infer_window_sum(call: relax.Call, _: relax.BlockBuilder) -> relax.TensorType:
    n, h, w, c = static_shape(call.args[0])
    top, left, bottom, right = (int(p) for p in call.attrs["padding"])
    (kh, kw), (sh, sw) = ([int(v) for v in call.attrs[key]] for key in ("pool_size", "strides"))
    shape = n, (h + top + bottom - kh) // sh + 1, (w + left + right - kw) // sw + 1, c
    return relax.TensorType(shape, "int32")


def _infer_cast(dtype: str | None) -> Callable[[relax.Call, relax.BlockBuilder], relax.TensorType]:
    def infer(call: relax.Call, _: relax.BlockBuilder) -> relax.TensorType:
        return relax.TensorType(call.args[0].ty.shape, dtype or str(_attr(call, "dtype")))

    return infer


def _infer_lookup(call: relax.Call, _: relax.BlockBuilder) -> relax.TensorType:
    return relax.TensorType(call.args[0].ty.shape, "float32")


def _infer_table(call: relax.Call, _: relax.BlockBuilder) -> relax.TensorType:
    return relax.TensorType(call.args[0].ty.shape, str(call.args[1].ty.dtype))


# Name -> (number of arguments, how the result's type follows from the call).
_OPERATORS: dict[str, tuple[int, Callable]] = {
    "quantize": (1, _infer_cast(None)),
    "dequantize": (2, _infer_cast("float32")),
    "conv2d": (3, _infer_conv2d),
    "dense": (3, _infer_dense),
    "requantize": (2, _infer_cast(None)),
    "table": (2, _infer_table),
    "window_sum": (1, _infer_window_sum),
    "binarize": (1, _infer_cast("int8")),
    "lookup": (2, _infer_lookup),
}


@cache
def register() -> None:
    """Register the operators with Relax; any further call does nothing."""
    for name, (num_inputs, infer) in _OPERATORS.items():
        full_name = PREFIX + name
        _ffi_api.RegisterOp(full_name, __doc__)
        tvm.ir.register_op_attr(full_name, "FInferType", infer)
        tvm.ir.register_op_attr(full_name, "FPurity", True)
        op = Op.get(full_name)
        op.set_num_inputs(num_inputs)
        op.set_attrs_type_key("ir.DictAttrs")


def call(name: str, args: Sequence[relax.Expr], **attrs: Any) -> relax.Call:
    """Make a call of one of the operators above, such as `call("dense", [x, w, b], zero_point=0, ...)`."""
    register()
    return relax.Call(Op.get(PREFIX + name), list(args), tvm.ir.make_node("ir.DictAttrs", **attrs))
