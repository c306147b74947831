"""Fold batch norms into the convolutions and dense layers before them, for fp32 kernels."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import IRModule, relax

from tvm_compress.passes.graph import bindings, operator, substitute, tensors, weight_parameter
from tvm_compress.passes.module_pass import ModulePass
from tvm_compress.passes.params import (
    get_params,
    num_inputs,
    parameter_vars,
    require_stage,
    with_main,
    with_values,
)
from tvm_compress.passes.sites import site_name

_SITES = ("relax.nn.conv2d", "relax.matmul")


@tvm.transform.module_pass(opt_level=0, name="tvm_compress.FoldBatchNorm")
class FoldBatchNorm(ModulePass):
    """Fold each batch norm whose input is an fp32 site's own output, with or without bias: the stage stays.

    With a = gamma / sqrt(variance + epsilon), per output channel, w becomes a * w and b becomes
    a * (b - mean) + beta. The weight keeps its name, so does the bias, which is named after the site where
    there was none; the four parameters of the batch norm go. A batch norm after anything else, or after a
    quantized site, stays. Weights that are looked up in a codebook stay as they are: the site's result is
    multiplied by a, a new parameter, before the bias.
    """

    def transform_module(self, module: IRModule, context: tvm.transform.PassContext) -> IRModule:
        """Apply the pass to a module of stage float or qdq."""
        del context
        require_stage(module, "float", "qdq", what="FoldBatchNorm")
        folder = _Folder(module)
        return with_main(module, folder.rewrite()) if folder.found else module


@dataclass(frozen=True)
class _Match:
    """A batch norm to fold: what the site gives (`made`), what the norm takes (with a bias), parameters."""

    norm: relax.Var
    made: relax.Var
    data: relax.Var
    weight: relax.Var
    bias: relax.Var | None
    call: relax.Call
    looked_up: bool


class _Folder:
    def __init__(self, module: IRModule) -> None:
        self._function = module["main"]
        self._values = get_params(module)
        self._bindings = list(bindings(self._function))
        self._defined = dict(self._bindings)
        self._parameters = set(parameter_vars(self._function))
        self._uses = Counter(arg for _, value in self._bindings for arg in tensors(value))
        self._uses.update(tensors(self._function.body.body))
        # Item 0 of a batch norm -> how it is folded.
        self.found = {
            var: match for var, value in self._bindings if (match := self._match(value)) is not None
        }

    def _match(self, value: relax.Expr) -> _Match | None:
        if not isinstance(value, relax.TupleGetItem) or value.index != 0:
            return None
        norm = value.tuple_value
        call: Any = self._defined.get(norm)
        if operator(call) != "relax.nn.batch_norm" or self._uses[norm] != 1:
            return None
        data = call.args[0]
        if int(call.attrs.axis) != len(data.ty.shape) - 1 or any(
            a not in self._parameters for a in call.args[1:]
        ):
            return None
        made, bias = data, None
        added: Any = self._defined.get(data)
        if operator(added) == "relax.add" and self._is_bias(added.args[1], data):
            made, bias = added.args
        site: Any = self._defined.get(made)
        if operator(site) not in _SITES or self._uses[made] != 1 or self._uses[data] != 1:
            return None
        looked_up = self._is_looked_up(site.args[1])
        if looked_up:
            weight = weight_parameter(site.args[1], self._defined, self._function)
        else:
            weight = self._own_weight(site.args[1])
        return None if weight is None else _Match(norm, made, data, weight, bias, call, looked_up)

    def _is_looked_up(self, expr: relax.Expr) -> bool:
        while operator(self._defined.get(expr)) == "relax.permute_dims":
            expr = self._defined[expr].args[0]
        return operator(self._defined.get(expr)) == "tvm_compress.lookup"

    def _is_bias(self, expr: relax.Expr, data: relax.Var) -> bool:
        return expr in self._parameters and self._uses[expr] == 1 and expr.ty.shape[0] == data.ty.shape[-1]

    def _own_weight(self, expr: relax.Expr) -> relax.Var | None:
        # A quantized weight is left alone: its scales belong to the values that it has.
        if expr not in self._parameters and operator(self._defined.get(expr)) != "relax.permute_dims":
            return None
        weight = weight_parameter(expr, {k: v for k, v in self._defined.items() if k == expr}, self._function)
        return weight if weight is not None and self._uses[weight] == 1 else None

    def rewrite(self) -> relax.Function:
        """Give the function without the batch norms that were found."""
        added: dict[relax.Var, relax.Var] = {}
        factors: dict[relax.Var, relax.Var] = {}
        gone: set[relax.Var] = set()
        for match in self.found.values():
            bias, factor = self._fold(match)
            if match.bias is None:
                added[match.weight] = bias
            if factor is not None:
                factors[match.weight] = factor
            gone.update(match.call.args[1:])
        params = list(self._function.params)[: num_inputs(self._function)]
        for var in parameter_vars(self._function):
            if var not in gone:
                params += [var, *(new[var] for new in (factors, added) if var in new)]
        body = self._body(params, added, factors)
        values = [self._values[var.name] for var in params[num_inputs(self._function) :]]
        return with_values(body.with_attrs(dict(self._function.attrs)), values)

    def _fold(self, match: _Match) -> tuple[relax.Var, relax.Var | None]:
        """Change the values of a site's weight and bias.

        Gives the bias, a new parameter if there was none, and the new parameter of factors for a weight that
        is looked up.
        """
        gamma, beta, mean, variance = (
            self._values[arg.name].astype(np.float64) for arg in match.call.args[1:]
        )
        factor = gamma / np.sqrt(variance + float(match.call.attrs.epsilon))
        bias = match.bias
        before = 0.0 if bias is None else self._values[bias.name].astype(np.float64)
        if bias is None:
            bias = self._new_vector(match, "bias", factor.size)
        self._values[bias.name] = (factor * (before - mean) + beta).astype(np.float32)
        if match.looked_up:
            scale = self._new_vector(match, "scale", factor.size)
            self._values[scale.name] = factor.astype(np.float32)
            return bias, scale
        weight = self._values[match.weight.name].astype(np.float64)
        scaled = weight * factor.reshape((-1,) + (1,) * (weight.ndim - 1))
        self._values[match.weight.name] = scaled.astype(np.float32)
        return bias, None

    def _new_vector(self, match: _Match, ending: str, size: int) -> relax.Var:
        name = f"{site_name(match.weight.name)}.{ending}"
        while name in self._values:
            name += "_folded"
        return relax.Var(name, relax.TensorType((size,), "float32"))

    def _body(
        self,
        params: list[relax.Var],
        added: dict[relax.Var, relax.Var],
        factors: dict[relax.Var, relax.Var],
    ) -> relax.Function:
        scaled = {match.made: factors[match.weight] for match in self.found.values() if match.looked_up}
        norms = {match.norm for match in self.found.values()}
        replaced: dict[relax.Var, relax.Expr] = {}
        builder = relax.BlockBuilder()
        with builder.function("main", params):
            with builder.dataflow():
                for var, value in self._bindings:
                    match = self.found.get(var)
                    if match is not None:
                        data = replaced[match.data]
                        bias = added.get(match.weight)
                        replaced[var] = data if bias is None else builder.emit(relax.op.add(data, bias))
                    elif var not in norms:
                        replaced[var] = builder.emit(substitute(value, replaced), name_hint=var.name)
                        if var in scaled:
                            replaced[var] = builder.emit(relax.op.multiply(replaced[var], scaled[var]))
                result = builder.emit_output(substitute(self._function.body.body, replaced))
            builder.emit_func_output(result)
        module = relax.transform.CanonicalizeBindings()(builder.finalize())
        return module["main"]
