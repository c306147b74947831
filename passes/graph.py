"""Walk the bindings of a Relax function."""

from collections.abc import Iterator, Mapping

from tvm import relax
from tvm.ir import Op, Tuple

from tvm_compress.passes.params import parameter_vars

# What can stand between a parameter and the layer that uses it as its weight.
_WEIGHT_WRAPPERS = frozenset(
    (
        "relax.permute_dims",
        "relax.quantize",
        "relax.clip",
        "relax.dequantize",
        "tvm_compress.binarize",
        "tvm_compress.lookup",
    )
)


def bindings(function: relax.Function) -> Iterator[tuple[relax.Var, relax.Expr]]:
    """Give a function's variables with what they are bound to, in order of execution."""
    for block in function.body.blocks:
        for binding in block.bindings:
            if isinstance(binding, relax.VarBinding):
                yield binding.var, binding.value


def definitions(function: relax.Function) -> dict[relax.Var, relax.Expr]:
    """Give what each variable of a function is bound to."""
    return dict(bindings(function))


def operator(expr: relax.Expr) -> str:
    """Give the name of the operator that an expression calls ("relax.nn.conv2d"); "" where it calls none."""
    return str(expr.op.name) if isinstance(expr, relax.Call) and isinstance(expr.op, Op) else ""


def tensors(expr: relax.Expr) -> list[relax.Expr]:
    """Give the expressions that an expression reads, those in a tuple argument one by one."""
    if isinstance(expr, relax.Call):
        return [field for arg in expr.args for field in (arg.fields if isinstance(arg, Tuple) else [arg])]
    if isinstance(expr, Tuple):
        return list(expr.fields)
    if isinstance(expr, relax.TupleGetItem):
        return [expr.tuple_value]
    return [expr]


def substitute(expr: relax.Expr, replaced: Mapping[relax.Var, relax.Expr]) -> relax.Expr:
    """Give a binding's expression with its variables replaced; one that is not named stays."""
    if isinstance(expr, relax.Var):
        return replaced.get(expr, expr)
    if isinstance(expr, relax.Call):
        args = [substitute(arg, replaced) for arg in expr.args]
        return relax.Call(expr.op, args, expr.attrs, expr.ty_args)
    if isinstance(expr, Tuple):
        return Tuple([substitute(field, replaced) for field in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        return relax.TupleGetItem(substitute(expr.tuple_value, replaced), expr.index)
    return expr


def weight_parameter(
    expr: relax.Expr, defined: Mapping[relax.Var, relax.Expr], function: relax.Function
) -> relax.Var | None:
    """Give the parameter that a weight comes from, through transposition and quantization, or None."""
    while isinstance(expr, relax.Var) and expr in defined:
        expr = defined[expr]
        if operator(expr) in _WEIGHT_WRAPPERS:
            expr = expr.args[0]
    return expr if isinstance(expr, relax.Var) and expr in set(parameter_vars(function)) else None
