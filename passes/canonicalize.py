"""Bring what importers produce into the canonical form of docs/architecture.md."""

import re
from typing import Any

import numpy as np
import tvm
from tvm import IRModule, relax
from tvm.ir import GenericConst, Op, Tuple

from tvm_compress.errors import ModelError, TvmCompressError, UnsupportedOperatorError
from tvm_compress.passes.canonical_folding import FOLDED
from tvm_compress.passes.canonical_ops import HANDLERS
from tvm_compress.passes.canonical_values import Array, Builder, Tensor, UnsupportedFormError, Value
from tvm_compress.passes.graph import bindings, operator, tensors
from tvm_compress.passes.module_pass import ModulePass
from tvm_compress.passes.params import STAGE, num_inputs, parameter_vars, with_values

# Every operator that a float module may hold: what the twin computes and the kernels lower.
# `reshape` and `expand_dims` leave axis 0, the batch, what it is.
SUPPORTED_OPERATORS = frozenset(
    (
        "relax.nn.conv2d",
        "relax.matmul",
        "relax.permute_dims",
        "relax.add",
        "relax.subtract",
        "relax.multiply",
        "relax.divide",
        "relax.maximum",
        "relax.minimum",
        "relax.nn.batch_norm",
        "relax.nn.relu",
        "relax.clip",
        "relax.sigmoid",
        "relax.tanh",
        "relax.nn.silu",
        "relax.nn.softmax",
        "relax.nn.log_softmax",
        "relax.nn.max_pool2d",
        "relax.nn.avg_pool2d",
        "relax.mean",
        "relax.concat",
        "relax.reshape",
        "relax.expand_dims",
        "relax.nn.batch_flatten",
    )
)


_KERNELS = frozenset(
    "relax." + name for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum")
)


@tvm.transform.module_pass(opt_level=0, name="tvm_compress.Canonicalize")
class Canonicalize(ModulePass):
    """Rebuild `main` in the canonical form: importer output -> float, or qdq where activations are quantized.

    The imported operators are read one by one, with their layouts as bookkeeping: transpositions and reshapes
    to and from extents of 1 cost nothing until an operator needs the axes in another order. Constants and
    parameters are folded through such operators too, and become parameters where a layer takes them, one for
    each use. Names given are kept; what has no name is named after its layer (`BASE.bias`,
    `BASE.running_mean`); the scales of quantized activations become `quantize_N.scale`. Applying it twice is
    applying it once.

    Raises
    ------
    UnsupportedOperatorError
        On an operator that the tool does not know; names it and the layer before it.
    ModelError
        On a model without `main`, with extents that are not constant, or with several outputs.
    """

    def transform_module(self, module: IRModule, context: tvm.transform.PassContext) -> IRModule:
        """Apply the pass."""
        del context
        if "main" not in {var.name_hint for var in module.get_global_vars()}:
            raise ModelError("The module has no function `main`.")
        return _Reader(module).read()


class _Reader:
    """Reads an imported `main` and emits its canonical form."""

    def __init__(self, module: IRModule) -> None:
        self._function = module["main"]
        self._bindings = list(bindings(self._function))
        self._defined = dict(self._bindings)
        count = num_inputs(self._function)
        self._inputs = list(self._function.params)[:count]
        self._values: dict[relax.Var, Any] = {}
        self._live = self._find_live()
        self._take_parameters()

    def _find_live(self) -> set[relax.Var]:
        # Importers leave dead tuples (indices of a max pooling): nothing must stumble over what nobody reads.
        defined = self._defined
        live: set[relax.Var] = set()
        waiting = [expr for expr in tensors(self._function.body.body) if isinstance(expr, relax.Var)]
        while waiting:
            var = waiting.pop()
            if var in live:
                continue
            live.add(var)
            value = defined.get(var)
            if isinstance(value, relax.TupleGetItem):
                source = defined.get(value.tuple_value)
                reads = [source.fields[value.index]] if isinstance(source, Tuple) else [value.tuple_value]
            else:
                reads = tensors(value) if value is not None else []
            waiting += [expr for expr in reads if isinstance(expr, relax.Var)]
        return live

    def _take_parameters(self) -> None:
        variables = parameter_vars(self._function)
        values = list((self._function.attrs or {}).get("params", []))
        if len(values) != len(variables):
            raise ModelError(
                f"The module has {len(variables)} parameters, but values for {len(values)}.",
                "Import with keep_params_as_input=True.",
            )
        for var, value in zip(variables, values, strict=True):
            self._values[var] = Array(value.numpy(), var.name)

    def read(self) -> IRModule:
        """Give the canonical module."""
        builder = relax.BlockBuilder()
        new_inputs = [self._input(var) for var in self._inputs]
        build = Builder(builder, new_inputs)
        failure: TvmCompressError | None = None
        with builder.function("main"):
            with builder.dataflow():
                try:
                    output = builder.emit_output(self._body(build))
                except TvmCompressError as error:
                    # The builder complains on standard error where a function is left open.
                    failure, output = error, builder.emit_output(new_inputs[0])
            variables = [var for var, _ in build.parameters.values()]
            builder.emit_func_output(output, params=[*new_inputs, *variables])
        if failure is not None:
            raise failure
        return _finish(builder.finalize(), build)

    def _body(self, build: Builder) -> relax.Var:
        for var, value in self._bindings:
            if var in self._live:
                self._values[var] = self._evaluate(build, value)
        return self._output(build)

    def _input(self, var: relax.Var) -> relax.Var:
        extents = getattr(var.ty, "shape", None)
        try:
            shape = tuple(int(extent) for extent in extents)  # type: ignore[union-attr]
        except (TypeError, ValueError) as error:
            raise ModelError(
                f"Input {var.name!r} has no constant shape: {var.ty}.",
                "Export the model with example inputs of a fixed shape, batch 1.",
            ) from error
        new = relax.Var(var.name, relax.TensorType(shape, var.ty.dtype))
        self._values[var] = Tensor(new, tuple(range(len(shape))), shape)
        return new

    def _output(self, build: Builder) -> relax.Var:
        outputs: list[Any] = [self._evaluate(build, self._function.body.body)]
        while len(outputs) == 1 and isinstance(outputs[0], tuple):
            outputs = list(outputs[0])
        if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
            raise ModelError(
                f"The model gives {len(outputs)} outputs; exactly one that depends on the input is needed."
            )
        return build.ordered(outputs[0], range(len(outputs[0].shape)))

    def _evaluate(self, build: Builder, expr: relax.Expr) -> Any:
        """Give an expression's value; a Python tuple for a Relax tuple."""
        if isinstance(expr, relax.Var):
            # What is missing is dead: no live binding reads it.
            return self._values.get(expr)
        if isinstance(expr, GenericConst):
            return Array(expr.value.numpy() if hasattr(expr.value, "numpy") else np.asarray(expr.value))
        if isinstance(expr, Tuple):
            return tuple(self._evaluate(build, one) for one in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            source = self._defined.get(expr.tuple_value, expr.tuple_value)
            if isinstance(source, Tuple):
                return self._evaluate(build, source.fields[expr.index])
            return self._evaluate(build, expr.tuple_value)[expr.index]
        if isinstance(expr, relax.Call):
            return self._call(build, expr)
        raise UnsupportedOperatorError(f"A {type(expr).__name__} {_where(build)} is not supported.")

    def _call(self, build: Builder, call: relax.Call) -> Any:
        name, sources = operator(call), list(call.args)
        if name == "relax.call_tir":
            # The ONNX importer spells some operators as a kernel, which bears the operator's name.
            name, sources = _kernel_name(sources[0]), list(sources[1].fields)
        elif not isinstance(call.op, Op):
            raise UnsupportedOperatorError(f"A call of {call.op} {_where(build)} is not supported.")
        arguments = [self._evaluate(build, s) if _is_value(s) else s for s in sources]
        try:
            if name in FOLDED and all(isinstance(a, Array) for a in arguments if _is_known(a)):
                return FOLDED[name](call, *arguments)
            if name in HANDLERS:
                return HANDLERS[name](build, call, *arguments)
        except UnsupportedFormError as error:
            raise UnsupportedOperatorError(
                f"Operator {name} {_where(build)} is not supported: {error}."
            ) from error
        raise UnsupportedOperatorError(
            f"Operator {name} {_where(build)} is not supported.",
            f"Supported are: {', '.join(sorted(SUPPORTED_OPERATORS))}.",
        )


def _kernel_name(kernel: tvm.ir.GlobalVar) -> str:
    """Give the operator that a kernel of the ONNX importer computes, if it is one without attributes."""
    name = "relax." + re.sub(r"_?\d+$", "", kernel.name_hint)
    return name if name in _KERNELS else f"relax.call_tir({kernel.name_hint})"


def _is_value(expr: relax.Expr) -> bool:
    return isinstance(expr, relax.Var | GenericConst | Tuple | relax.TupleGetItem | relax.Call)


def _is_known(argument: Any) -> bool:
    return isinstance(argument, Value | tuple)


def _where(build: Builder) -> str:
    return f"after {build.last_site}" if build.last_site else "before the first layer"


def _finish(module: IRModule, build: Builder) -> IRModule:
    """Drop what nothing reads, and write the attributes."""
    module = relax.transform.CanonicalizeBindings()(module)
    module = relax.transform.DeadCodeElimination()(module)
    function = module["main"]
    read = {arg for _, value in bindings(function) for arg in tensors(value)}
    quantized = any(operator(value) == "relax.quantize" for _, value in bindings(function))
    read |= set(tensors(function.body.body))
    inputs, variables = list(function.params)[: len(build.inputs)], list(function.params)[len(build.inputs) :]
    variables = [var for var in variables if var in read]
    params = [*inputs, *variables]
    function = relax.Function(params, function.body, function.ret_ty, function.is_pure, function.attrs)
    function = function.with_attr("num_input", len(build.inputs))
    function = function.with_attr(STAGE, "qdq" if quantized else "float")
    function = with_values(function, [build.parameters[var.name][1] for var in variables])
    return IRModule({module.get_global_var("main"): function})
