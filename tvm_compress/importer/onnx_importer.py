"""Imports ONNX files; parameters keep the names of the initializers, where these say something."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tvm
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx
from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map

from tvm_compress.errors import ModelError, UnsupportedOperatorError
from tvm_compress.importer.parameters import finish_import

if TYPE_CHECKING:
    import onnx

    from tvm_compress.importer.onnx_qdq import WeightGrid


def read_onnx(path: Path) -> onnx.ModelProto:
    """Read an `.onnx` file; ModelError if it is missing, damaged, or `onnx` is not installed."""
    _require_onnx()
    import onnx

    if not path.is_file():
        raise ModelError(f"{path} does not exist.")
    try:
        model = onnx.load(str(path))
    except Exception as error:  # protobuf has errors of its own
        raise ModelError(f"{path} is not a readable ONNX file: {error}.") from error
    return model


@dataclass(frozen=True)
class ImportedOnnx:
    """A module, and what the file said of quantization (see `onnx_graph.NormalizedGraph`)."""

    module: tvm.IRModule
    grids: Mapping[str, WeightGrid]
    refused: Mapping[str, str]


def import_onnx(model: onnx.ModelProto, input_shape: Sequence[int] | None = None) -> ImportedOnnx:
    """Turn an ONNX model into a Relax module whose parameters bear their layers' names.

    `input_shape` (1, C, H, W) is for a file that leaves the size of its input open.

    Raises
    ------
    UnsupportedOperatorError
        If TVM's importer lacks an operator; names the operator and the layer.
    ModelError
        If the file, its inputs, output or parameters cannot be used, or `onnx` is not installed.
    """
    _require_onnx()
    import onnx

    from tvm_compress.importer.onnx_graph import normalize_graph

    if not model.graph.node:
        raise ModelError("The ONNX model holds no nodes.")
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        _check_operators(model)
        raise ModelError(f"The ONNX model is not valid: {str(error).splitlines()[0]}.") from error
    _check_operators(model)
    try:
        graph = normalize_graph(model, input_shape)
    except onnx.shape_inference.InferenceError as error:
        raise ModelError(f"The shapes in the ONNX model do not fit together: {error}.") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = from_onnx(graph.model, keep_params_in_input=True)
    except Exception as error:  # the importer raises assertions, key and value errors alike
        raise ModelError(f"TVM's importer fails on this ONNX model: {error}.") from error
    return ImportedOnnx(finish_import(_exact_epsilons(module), {}), graph.grids, graph.refused)


def _exact_epsilons(module: tvm.IRModule) -> tvm.IRModule:
    """Give batch norms the epsilon that was meant: 1e-5 where float32 of the file reads as 9.9999997e-06.

    Otherwise the same network from torch and from ONNX would differ in the last bits.
    """

    @relax.expr_functor.mutator
    class Rewriter(relax.PyExprMutator):
        def visit_call_(self, call: relax.Call) -> relax.Expr:
            call = super().visit_call_(call)
            if call.op != tvm.ir.Op.get("relax.nn.batch_norm"):
                return call
            attrs = {key: call.attrs[key] for key in ("axis", "center", "scale", "training")}
            for key in ("epsilon", "momentum"):
                attrs[key] = float(str(np.float32(call.attrs[key])))
            return relax.op.nn.batch_norm(*call.args, **attrs)

    return tvm.IRModule({"main": Rewriter(module).visit_expr(module["main"])})


def _check_operators(model: onnx.ModelProto) -> None:
    from tvm_compress.importer.onnx_graph import layer_name

    known = {*_get_convert_map(), "Constant"}
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx") or node.op_type not in known | {"CastLike", "If"}:
            domain = f"{node.domain}." if node.domain else ""
            raise UnsupportedOperatorError(
                f"The operator {domain + node.op_type!r} of layer {layer_name(node)!r} is not supported.",
                "Replace it in the network, then export again.",
            )


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise ModelError(
            "Reading ONNX files needs the package `onnx`.", "pip install 'tvm_compress[onnx]'"
        ) from error
