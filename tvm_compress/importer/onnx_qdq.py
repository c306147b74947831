"""QuantizeLinear and DequantizeLinear of ONNX files, in the form that this tool's integers have.

Tools write activations as uint8 or int8, weights as int8 or uint8, each with its zero point. Shifting
integers and zero point together changes nothing of what they stand for: activations become int8, and of
weights the zero point is taken off.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from tvm_compress.errors import ModelError

_CLEANED = ("_DequantizeLinear_Output", "_DequantizeLinear_Output_0", "_quantized", "_quant")
_BYTES = {np.dtype(np.int8): 0, np.dtype(np.uint8): 128}


@dataclass(frozen=True)
class WeightGrid:
    """Quantized weights: `scale * integers`.

    Attributes
    ----------
    integers
        Less the zero point; int32, of the weights' shape.
    scale
        float32 [n] along `axis`, n = 1 for one scale.
    axis
        Of the weights.
    """

    integers: np.ndarray
    scale: np.ndarray
    axis: int

    @property
    def values(self) -> np.ndarray:
        """What the integers stand for, float32."""
        return (self.integers * _along(self.scale, self.axis, self.integers.ndim)).astype(np.float32)

    def transposed(self, factor: float) -> "WeightGrid":
        """Return the grid of the transposed weights [in, out] times a factor."""
        return WeightGrid(self.integers.T, self.scale * np.float32(factor), 1 - self.axis)


def weight_grid(node: onnx.NodeProto, constants: Mapping[str, np.ndarray]) -> WeightGrid:
    """Read a DequantizeLinear of constant integers.

    Raises
    ------
    ModelError
        If its scale is not constant, or blocks of weights have scales of their own.
    """
    scale, zero_point, axis = _arguments(node, constants, constants[node.input[0]].ndim)
    integers = constants[node.input[0]].astype(np.int32)
    if zero_point is not None:
        integers = integers - _along(zero_point.astype(np.int32), axis, integers.ndim)
    return WeightGrid(integers, scale.astype(np.float32).reshape(-1), axis)


def quantized_constant(node: onnx.NodeProto, constants: Mapping[str, np.ndarray]) -> np.ndarray:
    """Compute a QuantizeLinear of a constant."""
    x = constants[node.input[0]]
    scale, zero_point, axis = _arguments(node, constants, x.ndim)
    zero_point = np.zeros(1, np.uint8) if zero_point is None else zero_point
    if zero_point.dtype not in _BYTES:
        raise ModelError(f"The weights of {node.name!r} are quantized to {zero_point.dtype}, not to bytes.")
    info = np.iinfo(zero_point.dtype)
    steps = np.rint(x.astype(np.float32) / _along(scale.astype(np.float32), axis, x.ndim))
    steps = steps + _along(zero_point.astype(np.int32), axis, x.ndim)
    return np.clip(steps, info.min, info.max).astype(zero_point.dtype)


def activation_nodes(
    quantize: onnx.NodeProto, dequantize: onnx.NodeProto, constants: dict[str, np.ndarray]
) -> list[onnx.NodeProto] | str:
    """Give the two nodes with int8 integers, or why the kernels do not take this quantization.

    Their scale and zero point become new constants.

    Raises
    ------
    ModelError
        If the two do not use one scale and one zero point.
    """
    scale, zero_point, _ = _arguments(quantize, constants, 1)
    scale_after, zero_point_after, _ = _arguments(dequantize, constants, 1)
    dtype = _type_of(quantize, zero_point)
    before, after = [
        np.zeros(1, np.int32) if z is None else z.astype(np.int32) for z in (zero_point, zero_point_after)
    ]
    if not (np.array_equal(scale, scale_after) and np.array_equal(before, after)):
        raise ModelError(
            f"QuantizeLinear {quantize.name!r} and DequantizeLinear {dequantize.name!r} differ in scale or "
            "zero point."
        )
    if scale.size != 1 or before.size != 1:
        return "its input has several scales or zero points; the kernels take one"
    if dtype not in _BYTES:
        return f"its input is quantized to {dtype}; the kernels take bytes"
    names = [f"{quantize.output[0]}_int8_{what}" for what in ("scale", "zero_point")]
    constants[names[0]] = np.asarray(scale, np.float32).reshape(())
    constants[names[1]] = np.asarray(int(before.reshape(())) - _BYTES[dtype], np.int8)
    return [
        helper.make_node("QuantizeLinear", [quantize.input[0], *names], [quantize.output[0]], quantize.name),
        helper.make_node(
            "DequantizeLinear", [quantize.output[0], *names], dequantize.output, dequantize.name
        ),
    ]


def clean_name(name: str) -> str:
    """Give a parameter's name without what quantizers append."""
    for ending in _CLEANED:
        name = name.removesuffix(ending)
    return name


def _arguments(
    node: onnx.NodeProto, constants: Mapping[str, np.ndarray], rank: int
) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Scale, zero point and axis of a QuantizeLinear or DequantizeLinear."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if attributes.get("block_size", 0):
        raise ModelError(f"{node.op_type} {node.name!r} has scales by blocks, which no kernel here takes.")
    names = [name for name in node.input[1:] if name]
    if any(name not in constants for name in names):
        raise ModelError(
            f"The scale or zero point of {node.op_type} {node.name!r} is computed, not constant."
        )
    scale = np.atleast_1d(constants[names[0]])
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise ModelError(
            f"The scale of {node.op_type} {node.name!r} must be finite and positive, not {scale.min()}."
        )
    zero_point = np.atleast_1d(constants[names[1]]) if len(names) > 1 else None
    return scale, zero_point, int(attributes.get("axis", 1)) % max(rank, 1)


def _type_of(node: onnx.NodeProto, zero_point: np.ndarray | None) -> np.dtype:
    if zero_point is not None:
        return zero_point.dtype
    given = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
    return np.dtype(helper.tensor_dtype_to_np_dtype(given)) if given else np.dtype(np.uint8)


def _along(values: np.ndarray, axis: int, rank: int) -> np.ndarray:
    if values.size == 1:
        return values.reshape(())
    return values.reshape([-1 if i == axis else 1 for i in range(rank)])
