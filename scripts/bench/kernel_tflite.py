"""Writes a network as a TFLite model, in float32 or INT8, so that XNNPACK can be a peer (`kernel_peers.py`).

Of the operators only those that the networks of the benchmarks have. Batch norms are folded, activations
fused into what is before them. In INT8, by TFLite's specification, activations have ranges, here those of one
image, and weights are symmetric for each output channel.
"""

from collections.abc import Mapping, Sequence
from operator import add
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import torch
from ai_edge_litert import schema_py_generated as schema
from torch import fx, nn
from torch.fx.experimental.optimization import fuse

_TYPES = {"float32": "FLOAT32", "int8": "INT8", "int32": "INT32"}
# Of modules and functions of torch.
_ACTIVATIONS = {nn.ReLU: "RELU", nn.ReLU6: "RELU6", torch.relu: "RELU"}
_SPATIAL = np.array([1, 2], np.int32)


def write_tflite(network: nn.Module, x: np.ndarray, scheme: str, path: Path) -> Path:
    """Write a network of one NCHW input [1, C, H, W] as a model whose input is NHWC.

    Parameters
    ----------
    x
        The input that ranges follow from.
    scheme
        "fp32" or "int8"; inputs and outputs are float32 in either.

    Raises
    ------
    NotImplementedError
        An operator that is unknown here.
    """
    graph = fx.symbolic_trace(fuse(network))
    seen = fx.Interpreter(graph, garbage_collect_values=False)
    with torch.no_grad():
        seen.run(torch.from_numpy(x))
    model = _Model(quantized=scheme == "int8")
    modules = dict(graph.named_modules())
    tensors: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        operator = modules[node.target] if node.op == "call_module" else node.target
        if node.op == "placeholder":
            tensors[node] = model.add_input(_nhwc(seen.env[node]))
        elif node.op == "output":
            model.set_output(tensors[node.args[0]])
        elif _activation(operator):
            tensors[node] = tensors[node.args[0]]
        else:
            users = list(node.users)
            following = modules.get(users[0].target, users[0].target) if len(users) == 1 else None
            result = seen.env[users[0] if _activation(following) else node]
            data = [tensors[argument] for argument in node.args if isinstance(argument, fx.Node)]
            tensors[node] = model.add(operator, data, _nhwc(result), _activation(following))
    path.write_bytes(model.pack())
    return path


def _activation(operator: Any) -> str | None:
    return _ACTIVATIONS.get(type(operator) if isinstance(operator, nn.Module) else operator)


def _nhwc(value: torch.Tensor) -> np.ndarray:
    array = value.detach().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


class _Model:
    """A model that grows by one operator at a time; tensors are their places in it."""

    def __init__(self, quantized: bool) -> None:
        self._quantized = quantized
        self._graph = schema.SubGraphT()
        self._graph.tensors, self._graph.operators = [], []
        self._model = schema.ModelT()
        self._model.version, self._model.subgraphs = 3, [self._graph]
        self._model.operatorCodes, self._model.buffers = [], [schema.BufferT()]

    def pack(self) -> bytes:
        """Give the file's bytes."""
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(self._model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def add_input(self, value: np.ndarray) -> int:
        """Add the model's input, with a value that shows its range; returns it as operators take it."""
        outside = self._tensor(value.shape, "float32")
        self._graph.inputs = [outside]
        return self._emit("QUANTIZE", [outside], self._result(value)) if self._quantized else outside

    def set_output(self, tensor: int) -> None:
        """Make a tensor the model's output."""
        if self._quantized:
            outside = self._tensor(self._graph.tensors[tensor].shape, "float32")
            tensor = self._emit("DEQUANTIZE", [tensor], outside)
        self._graph.outputs = [tensor]

    def add(self, operator: Any, data: Sequence[int], value: np.ndarray, activation: str | None) -> int:
        """Add an operator of torch on tensors, with the value of its result; returns the result."""
        options: dict[str, Any] = {"fusedActivationFunction": activation or "NONE"}
        inputs = list(data)
        if isinstance(operator, nn.Conv2d):
            return self._add_convolution(operator, data[0], value, options)
        if isinstance(operator, nn.Linear):
            inputs += self._weights(operator.weight, operator.bias, data[0], 0)
            return self._emit(
                "FULLY_CONNECTED", inputs, self._result(value), "FullyConnectedOptions", options
            )
        if isinstance(operator, nn.MaxPool2d):
            # Behind a ReLU: zeros are no larger than what is there.
            inputs = [self._padded(data[0], operator.padding)]
            options |= _steps(operator.stride) | {"padding": "VALID"}
            options |= {"filterHeight": operator.kernel_size, "filterWidth": operator.kernel_size}
            # The result is some of the inputs: with their scale.
            result = self._tensor(value.shape, self._data_type, like=data[0])
            return self._emit("MAX_POOL_2D", inputs, result, "Pool2DOptions", options)
        if operator is add:
            return self._emit("ADD", inputs, self._result(value), "AddOptions", options)
        if operator == "mean":
            # The dense layer behind it takes four dimensions as well.
            inputs.append(self._constant(_SPATIAL))
            result = self._result(value[:, None, None, :])
            return self._emit("MEAN", inputs, result, "ReducerOptions", {"keepDims": True})
        raise NotImplementedError(f"{operator} is not written as TFLite.")

    def _add_convolution(
        self, layer: nn.Conv2d, data: int, value: np.ndarray, options: dict[str, Any]
    ) -> int:
        depthwise = layer.groups == layer.in_channels > 1
        if not depthwise and layer.groups > 1:
            raise NotImplementedError(f"{layer} is not written as TFLite.")
        same = layer.stride == (1, 1) and layer.padding[0] == layer.kernel_size[0] // 2
        source = data if same else self._padded(data, layer.padding[0])
        options |= _steps(layer.stride[0]) | {"padding": "SAME" if same else "VALID"}
        # [1, KH, KW, O] or [O, KH, KW, I].
        weight = layer.weight.permute((1, 2, 3, 0) if depthwise else (0, 2, 3, 1))
        inputs = [source, *self._weights(weight, layer.bias, data, 3 if depthwise else 0)]
        kind = "DepthwiseConv2DOptions" if depthwise else "Conv2DOptions"
        options |= {"depthMultiplier": 1} if depthwise else {}
        code = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
        return self._emit(code, inputs, self._result(value), kind, options)

    @property
    def _data_type(self) -> str:
        return "int8" if self._quantized else "float32"

    def _padded(self, data: int, padding: int) -> int:
        """Pad in space: TFLite's own padding at a stride would be one-sided."""
        if not padding:
            return data
        batch, height, width, channels = self._graph.tensors[data].shape
        shape = (batch, height + 2 * padding, width + 2 * padding, channels)
        sides = np.array([[0, 0], [padding, padding], [padding, padding], [0, 0]], np.int32)
        result = self._tensor(shape, self._data_type, like=data)
        return self._emit("PAD", [data, self._constant(sides)], result, "PadOptions", {})

    def _weights(self, weight: torch.Tensor, bias: torch.Tensor, data: int, axis: int) -> list[int]:
        """Constants of a layer's weights, quantized along an axis, and of its biases."""
        array, biases = (np.ascontiguousarray(value.detach().numpy()) for value in (weight, bias))
        if not self._quantized:
            return [self._constant(array), self._constant(biases)]
        others = tuple(place for place in range(array.ndim) if place != axis)
        scale = np.maximum(np.abs(array).max(axis=others, keepdims=True), 1e-9) / 127
        integers = np.rint(array / scale).astype(np.int8)
        sums = scale.ravel() * self._graph.tensors[data].quantization.scale[0]
        return [
            self._constant(integers, scale.ravel(), axis),
            self._constant(np.rint(biases / sums).astype(np.int32), sums, 0),
        ]

    def _constant(self, value: np.ndarray, scale: np.ndarray | None = None, axis: int = 0) -> int:
        tensor = self._tensor(value.shape, value.dtype.name)
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(value.tobytes(), np.uint8)
        self._graph.tensors[tensor].buffer = len(self._model.buffers)
        self._model.buffers.append(buffer)
        if scale is not None:
            self._graph.tensors[tensor].quantization = _quantization(scale, [0] * len(scale), axis)
        return tensor

    def _result(self, value: np.ndarray) -> int:
        """Add a tensor of activations, in INT8 with the range of a value and zero."""
        result = self._tensor(value.shape, self._data_type)
        if self._quantized:
            low, high = min(0.0, float(value.min())), max(1e-9, float(value.max()))
            scale = (high - low) / 255
            zero_point = int(np.rint(-128 - low / scale))
            self._graph.tensors[result].quantization = _quantization(np.array([scale]), [zero_point], 0)
        return result

    def _tensor(self, shape: Sequence[int], dtype: str, like: int | None = None) -> int:
        tensor = schema.TensorT()
        tensor.shape, tensor.type = list(shape), getattr(schema.TensorType, _TYPES[dtype])
        tensor.name = f"t{len(self._graph.tensors)}"
        if like is not None:
            tensor.quantization = self._graph.tensors[like].quantization
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1

    def _emit(
        self,
        code: str,
        inputs: Sequence[int],
        result: int,
        kind: str = "",
        options: Mapping[str, Any] | None = None,
    ) -> int:
        """Add an operator by TFLite's names; returns its result."""
        operator = schema.OperatorT()
        operator.inputs, operator.outputs = list(inputs), [result]
        operator.opcodeIndex = len(self._model.operatorCodes)
        if kind:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            operator.builtinOptions = getattr(schema, f"{kind}T")()
            for name, value in (options or {}).items():
                enum = {"padding": schema.Padding, "fusedActivationFunction": schema.ActivationFunctionType}
                known = getattr(enum[name], value) if name in enum else value
                setattr(operator.builtinOptions, name, known)
        entry = schema.OperatorCodeT()
        entry.builtinCode = entry.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, code)
        # The first version that has INT8 with scales for each channel.
        entry.version = 3 if self._quantized else 1
        self._model.operatorCodes.append(entry)
        self._graph.operators.append(operator)
        return result


def _steps(stride: int) -> dict[str, int]:
    return {"strideH": stride, "strideW": stride}


def _quantization(scale: np.ndarray, zero_point: Sequence[int], axis: int) -> Any:
    quantization = schema.QuantizationParametersT()
    quantization.scale, quantization.zeroPoint = scale.astype(np.float32), np.array(zero_point, np.int64)
    quantization.quantizedDimension = axis
    return quantization
