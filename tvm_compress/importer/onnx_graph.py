"""Rewrites an ONNX graph so that its initializers are exactly the parameters of its layers, named after them.

Files differ by exporter: weights stand in initializers, in Constant nodes or behind Identity and Transpose;
shapes are computed from shapes; one initializer serves several layers that happen to hold equal values.
Afterwards each layer owns its parameters, dense layers are `Gemm` with weights [out, in], and whatever else
is constant is a Constant node.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from tvm_compress.errors import ModelError
from tvm_compress.importer.onnx_padding import take_padding
from tvm_compress.importer.onnx_qdq import (
    WeightGrid,
    activation_nodes,
    clean_name,
    quantized_constant,
    weight_grid,
)

_ANONYMOUS = re.compile(
    r"onnx::.*|\d+|val_\d+|t_\d+|.*_output_\d+|(Constant|Identity|Transpose)(_\d+)?(_\w+)?|/.*|"
)
_BATCH_NORM_SLOTS = ("weight", "bias", "running_mean", "running_var")
_LAYERS = ("Conv", "Gemm")
# Folded constants that are still the same parameter, in another type or shape.
_SAME_VALUES = (
    "Identity",
    "Transpose",
    "Reshape",
    "Cast",
    "CastLike",
    "Squeeze",
    "Unsqueeze",
)
_SCOPES = "pkg.torch.onnx.name_scopes"


def layer_name(node: onnx.NodeProto) -> str:
    """Dotted name of the module that made a node, where the exporter tells, else the node's own name.

    torch's exporters tell by a list of scopes in the metadata, or by paths: "/layer1/layer1.0/conv1/Conv".
    """
    for entry in node.metadata_props:
        scopes = re.findall(r"'([^']*)'", entry.value) if entry.key == _SCOPES else []
        if len(scopes) >= 2 and scopes[-2]:
            return scopes[-2]
    if node.name.startswith("/"):
        parts: list[str] = []
        for part in node.name.split("/")[1:-1]:
            if parts and part.startswith(parts[-1].split(".")[0] + "."):
                parts[-1] = part
            else:
                parts.append(part)
        if parts:
            return ".".join(parts)
    return node.name or (node.output[0] if node.output else node.op_type)


@dataclass(frozen=True)
class NormalizedGraph:
    """A rewritten model, with what it says of quantization.

    Attributes
    ----------
    grids
        Parameter of weights -> the integers that they were stored as, axis 0 being the output channels.
    refused
        Parameter of weights -> why the layer's input is not quantized here, though the file says so.
    """

    model: onnx.ModelProto
    grids: dict[str, WeightGrid]
    refused: dict[str, str]


def normalize_graph(model: onnx.ModelProto, input_shape: Sequence[int] | None = None) -> NormalizedGraph:
    """Return a copy of the model in the form that the module's docstring describes, for batches of one image.

    Parameters
    ----------
    input_shape
        (1, C, H, W) for what the file leaves open; a batch that is left open is 1 image.

    Raises
    ------
    ModelError
        If a layer was exported in training mode, a constant cannot be computed, or an extent of the input is
        neither in the file nor given, or differs.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    graph = fixed.graph
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]
    for value in inputs:
        _fix_extents(value, input_shape)
    del graph.input[:]
    graph.input.extend(inputs)
    # Shapes that the exporter wrote may still hold the symbolic batch.
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    rewriter = _Rewriter(onnx.shape_inference.infer_shapes(fixed, data_prop=True))
    rewriter.run()
    return NormalizedGraph(rewriter.result(), rewriter.grids, rewriter.refused)


def _fix_extents(value: onnx.ValueInfoProto, given: Sequence[int] | None) -> None:
    """Write the extents that an input leaves open (a name, nothing, or -1) into it."""
    dims = value.type.tensor_type.shape.dim
    said = [dim.dim_value if dim.dim_value > 0 else None for dim in dims]
    shown = f"[{', '.join('?' if extent is None else str(extent) for extent in said)}]"
    if given is None:
        given = [extent or int(axis == 0) for axis, extent in enumerate(said)]
        if 0 in given:
            raise ModelError(
                f"The input {value.name!r} is {shown}: the file leaves its size open.",
                "Say it, and save what was imported: "
                "Model.from_onnx(path, input_shape=(1, 3, 224, 224)).save('net').",
            )
    fits = len(given) == len(said)
    if not fits or any(want not in (None, extent) for want, extent in zip(said, given, strict=True)):
        raise ModelError(f"The input {value.name!r} is {shown}, which {tuple(given)} does not fit.")
    for dim, extent in zip(dims, given, strict=True):
        dim.dim_value = extent


class _Rewriter:
    """One walk over the nodes, in order, that collects the new nodes, parameters and constants."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = []
        self.parameters: dict[str, np.ndarray] = {}
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self.origin = {name: name for name in self.constants}
        self.alias: dict[str, str] = {}
        self.producer: dict[str, onnx.NodeProto] = {}
        self.types = {
            value.name: value.type.tensor_type
            for value in (*model.graph.input, *model.graph.value_info, *model.graph.output)
        }
        self.uses = Counter(name for node in model.graph.node for name in node.input)
        self.uses.update(value.name for value in model.graph.output)
        self.grids: dict[str, WeightGrid] = {}
        self.refused: dict[str, str] = {}
        # QuantizeLinear nodes by their output, what their integers became, and why they could not be kept.
        self.quantizing: dict[str, onnx.NodeProto] = {}
        self.dequantized: dict[str, str] = {}
        self.dropped: dict[str, str] = {}

    def run(self) -> None:
        for original in self.model.graph.node:
            node = onnx.NodeProto()
            node.CopyFrom(original)
            node.input[:] = [self.alias.get(name, name) for name in node.input]
            if self._quantize(node) or self._dequantize(node):
                continue
            if self._fold(node) or self._skip(node) or self._add_bias(node):
                continue
            if node.op_type == "Conv":
                before = self.producer.get(node.input[0])
                if before is not None and before.op_type == "Pad":
                    take_padding(node, before, self.constants)
                self._layer(node, self._constant(node, 1))
            elif node.op_type in ("Gemm", "MatMul"):
                self._dense(node)
            elif node.op_type == "BatchNormalization":
                self._batch_norm(node)
            elif node.op_type == "Sum":
                node = self._as_additions(node)
            self.nodes.append(node)
            self.producer |= {name: node for name in node.output}

    def result(self) -> onnx.ModelProto:
        graph = self.model.graph
        used = {name for node in self.nodes for name in node.input} | {value.name for value in graph.output}
        constants = [
            helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value), name))
            for name, value in self.constants.items()
            if name in used and name not in self.parameters
        ]
        # A Pad whose zeros convolutions took over.
        nodes = [node for node in self.nodes if node.op_type != "Pad" or node.output[0] in used]
        outputs = [self._identity_of(value.name) for value in graph.output if value.name in self.alias]
        rewritten = helper.make_graph(
            [*constants, *nodes, *outputs],
            graph.name or "main",
            graph.input,
            graph.output,
            [numpy_helper.from_array(value, name) for name, value in self.parameters.items()],
        )
        result = onnx.ModelProto()
        result.CopyFrom(self.model)
        result.graph.CopyFrom(rewritten)
        return result

    def _identity_of(self, name: str) -> onnx.NodeProto:
        return helper.make_node("Identity", [self.alias[name]], [name])

    def _fold(self, node: onnx.NodeProto) -> bool:
        """Compute a node whose every input is known; True if it is gone."""
        if node.op_type == "Shape" and node.input[0] not in self.constants:
            shape = self._static_shape(node.input[0])
            if shape is None:
                return False
            bounds = {a.name: a.i for a in node.attribute}
            part = shape[bounds.get("start", 0) : bounds.get("end", len(shape))]
            self.constants[node.output[0]] = np.asarray(part, np.int64)
            return True
        inputs = [name for name in node.input if name]
        if node.op_type == "CastLike":
            # Only the type of the second input matters.
            inputs = inputs[:1]
        foldable = all(name in self.constants for name in inputs) and (inputs or node.op_type == "Constant")
        if not foldable or any(a.HasField("g") or a.graphs for a in node.attribute):
            return False
        try:
            values = self._evaluate(node, inputs)
        except Exception as error:  # the evaluator raises what its operators raise
            raise ModelError(
                f"The constant {node.op_type} {layer_name(node)!r} cannot be computed: {error}."
            ) from error
        for name, value in zip(node.output, values, strict=False):
            self.constants[name] = np.asarray(value)
            if node.op_type in _SAME_VALUES:
                self.origin[name] = self.origin.get(inputs[0], inputs[0])
        return True

    def _evaluate(self, node: onnx.NodeProto, inputs: list[str]) -> list[np.ndarray]:
        if node.op_type == "CastLike":
            known = self.types.get(node.input[1])
            dtype = known.elem_type if known is not None and known.elem_type else onnx.TensorProto.FLOAT
            return [self.constants[inputs[0]].astype(helper.tensor_dtype_to_np_dtype(dtype))]
        feeds = {name: self.constants[name] for name in inputs}
        infos = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in feeds.items()
        ]
        outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
        graph = helper.make_graph([node], "constant", infos, outputs)
        alone = helper.make_model(graph, opset_imports=self.model.opset_import)
        return ReferenceEvaluator(alone).run(None, feeds)

    def _quantize(self, node: onnx.NodeProto) -> bool:
        """Keep a QuantizeLinear for the DequantizeLinear after it; True if the node is one."""
        for name in node.input:
            if name in self.quantizing and node.op_type != "DequantizeLinear":
                raise ModelError(
                    f"The integers {name!r} are used by {node.op_type} {layer_name(node)!r}; only "
                    "DequantizeLinear may follow QuantizeLinear.",
                    "Export the model in QDQ form.",
                )
        if node.op_type != "QuantizeLinear":
            return False
        if node.input[0] in self.constants:
            self.constants[node.output[0]] = quantized_constant(node, self.constants)
            self.origin[node.output[0]] = self.origin.get(node.input[0], node.input[0])
        else:
            self.quantizing[node.output[0]] = node
        return True

    def _dequantize(self, node: onnx.NodeProto) -> bool:
        """Compute a DequantizeLinear of constants, or put it behind its QuantizeLinear; True if it is one."""
        if node.op_type != "DequantizeLinear":
            return False
        source, result = node.input[0], node.output[0]
        if source in self.constants:
            name = clean_name(self.origin.get(source, source))
            name = result if name in self.constants and name != self.origin.get(source) else name
            grid = weight_grid(node, self.constants)
            self.constants[name] = grid.values
            self.origin[name] = self.origin[result] = name
            self.alias[result] = name
            self.grids[name] = grid
        elif source in self.dequantized:
            self.alias[result] = self.dequantized[source]
        elif source in self.quantizing:
            nodes = activation_nodes(self.quantizing[source], node, self.constants)
            if isinstance(nodes, str):
                self.alias[result] = self.quantizing[source].input[0]
                self.dropped[self.alias[result]] = nodes
            else:
                self.nodes += nodes
            self.dequantized[source] = self.alias.get(result, result)
        else:
            raise ModelError(
                f"DequantizeLinear {layer_name(node)!r} reads {source!r}, which no QuantizeLinear made.",
                "Export the model in QDQ form.",
            )
        return True

    def _skip(self, node: onnx.NodeProto) -> bool:
        """Drop what does nothing in inference."""
        if node.op_type not in ("Identity", "Dropout") or any(self.uses[name] for name in node.output[1:]):
            return False
        self.alias[node.output[0]] = node.input[0]
        return True

    def _add_bias(self, node: onnx.NodeProto) -> bool:
        """Give a constant that is added to a layer without bias to that layer; True if done."""
        if node.op_type != "Add":
            return False
        for data, constant in ((0, 1), (1, 0)):
            layer = self.producer.get(node.input[data])
            value = self.constants.get(node.input[constant])
            if layer is None or value is None or layer.op_type not in _LAYERS or len(layer.input) != 2:
                continue
            if self.uses[layer.output[0]] != 1 or layer.input[1] not in self.parameters:
                continue
            channels = len(self.parameters[layer.input[1]])
            tail = (1, 1) if layer.op_type == "Conv" else ()
            if value.shape not in ((channels, *tail), (1, channels, *tail)):
                continue
            site = re.sub(r"[._]weight$", "", layer.input[1])
            layer.input.append(self._parameter(node.input[constant], f"{site}.bias", value.reshape(-1)))
            self.alias[node.output[0]] = layer.output[0]
            return True
        return False

    def _layer(self, node: onnx.NodeProto, weight: np.ndarray | None, bias: np.ndarray | None = None) -> None:
        """Make a layer's weight and bias its own parameters."""
        if weight is None:
            return
        grid = self.grids.pop(node.input[1], None)
        name = self._parameter(node.input[1], f"{layer_name(node)}.weight", weight)
        if grid is not None:
            self.grids[name] = grid
        if node.input[0] in self.dropped:
            self.refused[name] = self.dropped[node.input[0]]
        if bias is None:
            bias = self._constant(node, 2)
        source = node.input[2] if len(node.input) > 2 else ""
        # What torch's exporter calls the bias that batch norm leaves behind when it is folded.
        derived_source = source == f"{node.input[1]}_bias"
        node.input[:] = [node.input[0], name, *([source] if source else [])]
        if bias is None:
            return
        if not bias.any() and _ANONYMOUS.fullmatch(source):
            # torch's exporter gives every convolution without bias one of zeros.
            del node.input[2]
            return
        derived = re.sub(r"[._]weight$", "", name) + ".bias"
        node.input[2] = self._parameter(derived if derived_source else source, derived, bias)

    def _dense(self, node: onnx.NodeProto) -> None:
        """Turn a product with a constant matrix into `Gemm` with weights [out, in], alpha and beta 1."""
        weight = self._constant(node, 1)
        known = self.types.get(node.input[0])
        rank = len(known.shape.dim) if known is not None and known.HasField("shape") else None
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if weight is None or weight.ndim != 2 or attributes.get("transA", 0):
            return
        if node.op_type == "MatMul" and rank not in (2, None):
            return
        grid, alpha = self.grids.pop(node.input[1], None), attributes.get("alpha", 1.0)
        if not attributes.get("transB", 0):
            weight = weight.T
            grid = None if grid is None else grid.transposed(alpha)
        elif grid is not None:
            grid = grid.transposed(alpha).transposed(1.0)
        if grid is not None:
            self.grids[node.input[1]] = grid
        weight = np.ascontiguousarray(weight * weight.dtype.type(alpha))
        bias = self._constant(node, 2)
        if bias is not None:
            bias = bias * bias.dtype.type(attributes.get("beta", 1.0))
            bias = np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), (len(weight),)))
        node.op_type = "Gemm"
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("transB", 1))
        self._layer(node, weight, bias)

    def _batch_norm(self, node: onnx.NodeProto) -> None:
        if any(a.name == "training_mode" and a.i for a in node.attribute):
            raise ModelError(
                f"The batch norm {layer_name(node)!r} was exported in training mode.",
                "Call module.eval() before the export.",
            )
        layer = layer_name(node)
        for index, slot in enumerate(_BATCH_NORM_SLOTS, start=1):
            value = self._constant(node, index)
            if value is not None:
                node.input[index] = self._parameter(node.input[index], f"{layer}.{slot}", value)

    def _as_additions(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """Spell a sum as additions, as residual networks of today do; returns the last of them."""
        total = node.input[0]
        for index, term in enumerate(node.input[1:-1]):
            partial = f"{node.output[0]}_sum_{index}"
            self.nodes.append(helper.make_node("Add", [total, term], [partial], name=node.name))
            total = partial
        last = [total, node.input[-1]] if len(node.input) > 1 else [total]
        return helper.make_node("Add" if len(last) > 1 else "Identity", last, node.output, name=node.name)

    def _constant(self, node: onnx.NodeProto, index: int) -> np.ndarray | None:
        return self.constants.get(node.input[index]) if len(node.input) > index else None

    def _parameter(self, source: str, derived: str, value: np.ndarray) -> str:
        """Make a parameter: named as in the file if that name says something and is free, else `derived`."""
        candidates = [source, self.origin.get(source, ""), derived]
        names: Iterable[str] = (
            *candidates,
            *(f"{derived}_{count}" for count in range(2, len(self.parameters) + 3)),
        )
        free = (name for name in names if name not in self.parameters and not (_ANONYMOUS.fullmatch(name)))
        name = next(free, f"parameter_{len(self.parameters)}")
        self.parameters[name] = np.ascontiguousarray(value)
        return name

    def _static_shape(self, name: str) -> tuple[int, ...] | None:
        known = self.types.get(name)
        if known is None or not known.HasField("shape"):
            return None
        dims = known.shape.dim
        return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None
