"""InsertQDQ: write the decided quantization into the module as quantize, clip and dequantize."""

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import IRModule, relax

from tvm_compress.errors import ModelError
from tvm_compress.passes.annotate_quantization import (
    SiteCall,
    quantization_of,
    quantized_tensors,
    site_calls,
)
from tvm_compress.passes.graph import bindings, substitute
from tvm_compress.passes.integer_points import find_integer_points
from tvm_compress.passes.module_pass import ModulePass
from tvm_compress.passes.params import get_params, require_stage, with_main, with_stage, with_values
from tvm_compress.passes.quantization import QuantizationParameters, weight_limit, weight_scale
from tvm_compress.schedules import ops

WEIGHT_SCALE = ".weight_scale"
INPUT_SCALE = ".input_scale"
STORED_SCALE = ".stored_scale"


@tvm.transform.module_pass(opt_level=0, name="tvm_compress.InsertQDQ")
class InsertQDQ(ModulePass):
    """Insert quantize -> clip -> dequantize for the quantized sites' inputs and weights: annotated -> qdq.

    New parameters, after all others: `SITE.weight_scale` (float32 [O]), `SITE.input_scale` and
    `SITE.stored_scale` (float32 []), and `SITE.output_scale` (float32 []) of the integer points. Every
    consumer of a quantized tensor reads the dequantized value. Batch norm stays unfolded, fp32 sites' weights
    stay as they are.

    Raises
    ------
    ModelError
        If the module is not at the stage "annotated", a quantized site is missing, or a weight is not finite.
    """

    def transform_module(self, module: IRModule, _: tvm.transform.PassContext) -> IRModule:
        """Return the module with the inserted operators and parameters."""
        require_stage(module, "annotated", what="InsertQDQ")
        inserter = _Inserter(module)
        values = [*get_params(module).values(), *inserter.new_values]
        return with_stage(with_main(module, with_values(inserter.run(), values)), "qdq")


@dataclass(frozen=True)
class _View:
    """How a tensor is quantized, and the parameter that holds the scale."""

    held: QuantizationParameters
    scale: str


class _Inserter:
    """Rebuilds `main` binding by binding, replacing what the quantized sites read."""

    def __init__(self, module: IRModule) -> None:
        self.function = module["main"]
        self.sites = quantization_of(module)
        calls = [call for call in site_calls(self.function) if call.name in self.sites]
        missing = sorted(set(self.sites) - {call.name for call in calls})
        if missing:
            raise ModelError(f"Site {missing[0]!r} is annotated, but the module has no such site.")
        stored = {call.tensor for call in calls if self.sites[call.name].stored is not None}
        # What all consumers of a tensor read, and what the sites read that quantize a stored value again.
        self.shared: dict[relax.Var, _View] = {}
        self.own: dict[relax.Var, _View] = {}
        self.by_weight = {call.weight: call for call in calls}
        self.new_params: dict[str, relax.Var] = {}
        self.new_values: list[np.ndarray] = []
        values = get_params(module)
        for call in calls:
            site = self.sites[call.name]
            self._parameter(
                call.name + WEIGHT_SCALE, weight_scale(values[call.weight.name], site.weight_bits)
            )
            if site.input is not None:
                view = self._view(call.name + INPUT_SCALE, site.input)
                if call.tensor in stored:
                    self.own[call.output] = view
                else:
                    self.shared[call.tensor] = view
            if site.stored is not None:
                self.shared[call.tensor] = self._view(call.name + STORED_SCALE, site.stored)
        held = quantized_tensors(module)
        for point in find_integer_points(self.function):
            if point.name in held:
                self.shared[point.tensor] = self._view(f"{point.name}_scale", held[point.name])
        self.builder = relax.BlockBuilder()
        # Variable of the old function -> what stands for it in the new one.
        self.replaced: dict[relax.Var, relax.Expr] = {}

    def _parameter(self, name: str, value: np.ndarray | np.floating) -> None:
        array = np.asarray(value, dtype=np.float32)
        self.new_params[name] = relax.Var(name, relax.TensorType(array.shape, "float32"))
        self.new_values.append(array)

    def _view(self, scale: str, held: QuantizationParameters) -> _View:
        self._parameter(scale, np.float32(held.scale))
        return _View(held, scale)

    def run(self) -> relax.Function:
        """Return the new function, still with the old parameters' values."""
        with self.builder.function("main", [*self.function.params, *self.new_params.values()]):
            with self.builder.dataflow():
                for tensor in self.function.params:
                    self._define(tensor, tensor)
                for var, value in bindings(self.function):
                    self._visit(var, value)
                result = substitute(self.function.body.body, self.replaced)
                if isinstance(result, relax.DataflowVar):
                    result = self.builder.emit_output(result)
            self.builder.emit_func_output(result)
        return self.builder.finalize()["main"].with_attrs(dict(self.function.attrs))

    def _define(self, old: relax.Var, new: relax.Expr) -> None:
        """Let `new` stand for a tensor, quantized where its consumers want that."""
        view = self.shared.get(old)
        self.replaced[old] = new if view is None else self._fake(new, view)

    def _visit(self, var: relax.Var, value: relax.Expr) -> None:
        if isinstance(value, relax.Call):
            for arg in value.args:
                if isinstance(arg, relax.Var) and arg in self.by_weight:
                    self.replaced[arg] = self._fake_weight(self.by_weight[arg])
        value = substitute(value, self.replaced)
        if var in self.own:
            value = with_args(value, [self._fake(value.args[0], self.own[var]), *value.args[1:]])
        inner = isinstance(var, relax.DataflowVar)
        emit = self.builder.emit if inner else self.builder.emit_output
        self._define(var, emit(value, name_hint=var.name))

    def _fake(self, x: relax.Expr, view: _View) -> relax.Var:
        """Emit dequantize(clip(quantize(x)))."""
        held, scale = view.held, self.new_params[view.scale]
        zero_point = relax.const(held.zero_point, held.dtype)
        q = self.builder.emit(relax.op.quantize(x, scale, zero_point, axis=-1, out_dtype=held.dtype))
        q = self.builder.emit(relax.op.clip(q, held.qmin, held.qmax))
        return self.builder.emit(relax.op.dequantize(q, scale, zero_point, axis=-1))

    def _fake_weight(self, call: SiteCall) -> relax.Var:
        """Emit a site's weights, quantized and dequantized."""
        bits, scale = self.sites[call.name].weight_bits, self.new_params[call.name + WEIGHT_SCALE]
        return emit_quantized_weight(self.builder, call.weight, scale, bits)


def emit_quantized_weight(
    builder: relax.BlockBuilder, weight: relax.Var, scale: relax.Var, bits: int
) -> relax.Var:
    """Emit weights, output channels first, quantized by a scale for each, and dequantized."""
    zero_point = relax.const(0, "int8")
    if bits == 1:
        q = builder.emit(ops.call("binarize", [weight]))
    else:
        q = builder.emit(relax.op.quantize(weight, scale, zero_point, axis=0, out_dtype="int8"))
        q = builder.emit(relax.op.clip(q, -weight_limit(bits), weight_limit(bits)))
    return builder.emit(relax.op.dequantize(q, scale, zero_point, axis=0))


def with_args(call: relax.Call, args: list[relax.Expr]) -> relax.Call:
    """Return the same call of other arguments."""
    return relax.Call(call.op, args, call.attrs, call.ty_args, call.span)
