"""RealizeInteger: turn fake quantization into integer arithmetic, one module for all kernels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import tvm
from tvm import IRModule, relax

from tvm_compress.errors import ModelError
from tvm_compress.passes.annotate_quantization import QUANTIZATION, count_uses
from tvm_compress.passes.graph import bindings, operator
from tvm_compress.passes.insert_qdq import with_args
from tvm_compress.passes.integer_functions import COMPUTED, function_of
from tvm_compress.passes.integer_points import sums_whole_windows
from tvm_compress.passes.integer_values import (
    Clamp,
    Float,
    Layer,
    Mean,
    Moved,
    Product,
    Quantized,
    Sum,
    Value,
)
from tvm_compress.passes.integer_writer import Writer
from tvm_compress.passes.module_pass import ModulePass
from tvm_compress.passes.params import get_params, num_inputs, require_stage, with_main, with_stage
from tvm_compress.passes.quantization import QuantizationParameters, quantize_weights, weight_limit
from tvm_compress.passes.sites import site_name


@tvm.transform.module_pass(opt_level=0, name="tvm_compress.RealizeInteger")
class RealizeInteger(ModulePass):
    """Compute the quantized sites in integers and bind all parameters: qdq -> integer.

    The result holds the operators of `tvm_compress.schedules.ops`, no batch norm, no parameters. On the same
    input integers, each site's next quantized value is that of the QDQ module but for rounding: one step.

    Raises
    ------
    ModelError
        If the module is not at the stage "qdq", or a scale is not finite and positive.
    KernelError
        If int32 cannot hold a site's sums: states the bound and the site.
    """

    def transform_module(self, module: IRModule, _: tvm.transform.PassContext) -> IRModule:
        """Return the module with `main` in integers."""
        require_stage(module, "qdq", what="RealizeInteger")
        return with_stage(with_main(module, _Realizer(module).run()), "integer")


@dataclass(frozen=True, eq=False)
class _Parameter(Value):
    """Numbers that are known now: a parameter or a constant, or what quantization made of it.

    `integers` with their `scale` [O] and `bits` stand for a quantized weight; `transposed` for the [in, out]
    view of a dense layer's weights, which are kept as [out, in].
    """

    name: str
    array: np.ndarray
    integers: np.ndarray | None = None
    scale: np.ndarray | None = None
    bits: int = 0
    transposed: bool = False

    def real(self) -> np.ndarray:
        """Return the real numbers that it stands for."""
        array = self.array
        if self.integers is not None and self.scale is not None:
            array = self.integers * self.scale.reshape(-1, *[1] * (array.ndim - 1))
        return array.T if self.transposed else array


@dataclass(frozen=True, eq=False)
class _Quantizing(Value):
    """The integers between quantize (or binarize) and dequantize, not made yet."""

    x: Value
    scale: np.ndarray | None
    zero_point: int
    qmin: int
    qmax: int
    dtype: str
    binary: bool = False


@dataclass(frozen=True, eq=False)
class _Items(Value):
    """The items of a tuple that are of use, from the first on."""

    items: tuple[Value, ...]


class _Realizer:
    """Walks `main` and keeps what each variable stands for."""

    def __init__(self, module: IRModule) -> None:
        self.function = module["main"]
        self.params = get_params(module)
        self.builder = relax.BlockBuilder()
        self.writer = Writer(self.builder)
        self.values: dict[relax.Var, Value] = {}
        self.uses = count_uses(self.function)
        self.handlers = dict.fromkeys(COMPUTED, self._function) | {
            "relax.quantize": self._quantize,
            "tvm_compress.binarize": self._binarize,
            "relax.dequantize": self._dequantize,
            "relax.clip": self._clip,
            "relax.nn.relu": self._relu,
            "relax.nn.conv2d": self._layer,
            "relax.matmul": self._layer,
            "relax.add": self._add,
            "relax.multiply": self._multiply,
            "relax.nn.batch_norm": self._batch_norm,
            "relax.mean": self._mean,
            "relax.nn.avg_pool2d": self._average_pool,
            "relax.permute_dims": self._move,
            "relax.reshape": self._move,
            "relax.expand_dims": self._move,
            "relax.nn.max_pool2d": self._move,
            "relax.nn.batch_flatten": self._move,
            "relax.concat": self._concat,
        }

    def run(self) -> relax.Function:
        """Return the function in integers, of the inputs alone."""
        count = num_inputs(self.function)
        inputs = list(self.function.params)[:count]
        for var in inputs:
            self.values[var] = Float(var)
        for var in list(self.function.params)[count:]:
            self.values[var] = _Parameter(var.name, self.params[var.name])
        with self.builder.function("main", inputs):
            with self.builder.dataflow():
                for var, value in bindings(self.function):
                    self.values[var] = self._visit(value)
                result = self.builder.emit_output(self._expr(self.function.body.body))
            self.builder.emit_func_output(result)
        dropped = ("params", QUANTIZATION)
        attrs = {name: value for name, value in self.function.attrs.items() if name not in dropped}
        return self.builder.finalize()["main"].with_attrs(attrs)

    def _visit(self, expr: relax.Expr) -> Value:
        if isinstance(expr, relax.Var):
            return self.values[expr]
        if isinstance(expr, tvm.ir.GenericConst):
            return _Parameter("", expr.value.numpy())
        if isinstance(expr, relax.TupleGetItem) and isinstance(expr.tuple_value, relax.Var):
            whole = self.values[expr.tuple_value]
            if isinstance(whole, _Items) and expr.index < len(whole.items):
                return whole.items[expr.index]
        handler = self.handlers.get(operator(expr))
        value = None if handler is None else handler(expr)
        if value is not None:
            return value
        return Float(self.builder.emit(self._expr(expr)))

    def _value(self, expr: relax.Expr) -> Value:
        """Return what an argument stands for."""
        if isinstance(expr, relax.Var | tvm.ir.GenericConst):
            return self._visit(expr)
        return Float(expr)

    def _expr(self, expr: relax.Expr) -> relax.Expr:
        """Return an expression on floats: what has no integer form is computed so."""
        if isinstance(expr, relax.Var):
            value = self.values[expr]
            if isinstance(value, _Parameter):
                return relax.const(np.array(value.real(), dtype=value.array.dtype, order="C"))
            if isinstance(value, _Quantizing):
                raise ModelError(
                    f"The integers {expr.name!r} are used by something else than clip and dequantize."
                )
            return self.writer.floats(value)
        if isinstance(expr, relax.Call):
            return with_args(expr, [self._expr(arg) for arg in expr.args])
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self._expr(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self._expr(expr.tuple_value), expr.index)
        return expr

    def _numbers(self, expr: relax.Expr) -> np.ndarray | None:
        """Return an argument's value where it is known now."""
        value = self._value(expr)
        return value.real() if isinstance(value, _Parameter) else None

    # Each handler returns what the call stands for, or None to compute it in float.

    def _quantize(self, call: relax.Call) -> Value | None:
        scale, zero_point = self._numbers(call.args[1]), self._numbers(call.args[2])
        if scale is None or zero_point is None or np.unique(zero_point).size != 1:
            raise ModelError("A quantization whose scale or zero point is computed cannot be realised.")
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            name = getattr(call.args[1], "name", "of a constant")
            raise ModelError(f"The scale {name} must be finite and positive, not {scale.min()}.")
        info = np.iinfo(str(call.attrs["out_dtype"]))
        x = self._value(call.args[0])
        return _Quantizing(x, scale, int(zero_point.flat[0]), int(info.min), int(info.max), str(info.dtype))

    def _binarize(self, call: relax.Call) -> Value | None:
        return _Quantizing(self._value(call.args[0]), None, 0, -1, 1, "int8", binary=True)

    def _clip(self, call: relax.Call) -> Value | None:
        x = self._value(call.args[0])
        low, high = (float(bound.value) for bound in call.args[1:])
        if isinstance(x, _Quantizing):
            return replace(x, qmin=max(x.qmin, math.ceil(low)), qmax=min(x.qmax, math.floor(high)))
        return None if isinstance(x, _Parameter) else Clamp(x, low, high)

    def _relu(self, call: relax.Call) -> Value | None:
        x = self._value(call.args[0])
        return None if isinstance(x, _Parameter) else Clamp(x, 0.0, math.inf)

    def _dequantize(self, call: relax.Call) -> Value | None:
        q = self._value(call.args[0])
        scale = self._numbers(call.args[1])
        if not isinstance(q, _Quantizing) or scale is None:
            raise ModelError("A dequantization of something else than quantize and clip cannot be realised.")
        if isinstance(q.x, _Parameter):
            bits = 1 if q.binary else q.qmax.bit_length() + 1
            if not q.binary and (q.qmin, q.qmax) != (-weight_limit(bits), weight_limit(bits)):
                raise ModelError(
                    f"Weights {q.x.name!r} are clipped to [{q.qmin}, {q.qmax}], which is not symmetric."
                )
            return replace(q.x, integers=quantize_weights(q.x.array, scale, bits), scale=scale, bits=bits)
        if q.scale is None or scale.size != 1 or not np.array_equal(q.scale, scale):
            raise ModelError("An activation must be quantized and dequantized with one and the same scale.")
        held = QuantizationParameters(float(scale.flat[0]), q.zero_point, q.qmin, q.qmax, q.dtype)
        return self.writer.quantize(q.x, held)

    def _layer(self, call: relax.Call) -> Value | None:
        x, weight = self._value(call.args[0]), self._value(call.args[1])
        kernel = call.op.name == "relax.nn.conv2d"
        if (
            not isinstance(weight, _Parameter)
            or isinstance(x, _Parameter)
            or weight.array.ndim != (4 if kernel else 2)
        ):
            return None
        if kernel:
            layouts = tuple(str(call.attrs[name]) for name in ("data_layout", "kernel_layout"))
            if layouts != ("NHWC", "OIHW"):
                return None
        elif not weight.transposed:
            return None
        channels = weight.array.shape[0]
        values = weight.array if weight.integers is None else weight.integers
        unit = np.ones(channels), np.zeros(channels)
        return Layer(site_name(weight.name), call, x, values, weight.scale, weight.bits, *unit)

    def _function(self, call: relax.Call) -> Value | None:
        operands: list[Value | np.ndarray] = []
        for arg in call.args:
            value = self._value(arg)
            if isinstance(value, _Parameter):
                if value.array.size != 1:
                    return None
                operands.append(value.real().reshape(()))
            else:
                operands.append(value)
        return function_of(call, operands)

    def _multiply(self, call: relax.Call) -> Value | None:
        a, b = (self._value(arg) for arg in call.args)
        if isinstance(a, Quantized) and isinstance(b, Quantized) and a is not b:
            return Product(a, b)
        return self._function(call)

    def _add(self, call: relax.Call) -> Value | None:
        function = self._function(call)
        if function is not None:
            return function
        a, b = (self._value(arg) for arg in call.args)
        if isinstance(a, _Parameter):
            a, b = b, a
        if isinstance(b, _Parameter):
            bias = b.real()
            # One number per channel, the last axis (or a single number). A layer that is read by something
            # else too would be computed twice.
            if (
                isinstance(a, Layer)
                and self._is_read_once(call, a)
                and bias.size in (1, *bias.shape[-1:])
                and bias.size in (1, a.factor.size)
            ):
                return a.affine(1.0, bias.astype(np.float64).reshape(-1))
            return None
        shapes = [[int(extent) for extent in arg.ty.shape] for arg in call.args]
        if isinstance(a, _Parameter) or shapes[0] != shapes[1]:
            return None
        terms = [term for value in (a, b) for term in (value.terms if isinstance(value, Sum) else (value,))]
        return Sum(tuple(terms))

    def _is_read_once(self, call: relax.Call, value: Value) -> bool:
        return all(self.uses[arg] == 1 for arg in call.args if self.values.get(arg) is value)

    def _batch_norm(self, call: relax.Call) -> Value | None:
        x = self._value(call.args[0])
        numbers = [self._numbers(arg) for arg in call.args[1:]]
        if any(value is None for value in numbers) or int(call.attrs["axis"]) % len(
            call.args[0].ty.shape
        ) != (len(call.args[0].ty.shape) - 1):
            raise ModelError("Batch norm must normalise the last axis with known statistics to be folded.")
        gamma, beta, mean, variance = (np.asarray(value, dtype=np.float64) for value in numbers)
        factor = 1 / np.sqrt(variance + float(call.attrs["epsilon"]))
        if call.attrs["scale"]:
            factor = factor * gamma
        shift = (beta if call.attrs["center"] else 0.0) - mean * factor
        if isinstance(x, Layer):
            return _Items((x.affine(factor, shift),))
        # Without a layer before it, it is a multiplication and an addition of floats.
        expr = self.builder.emit(
            relax.op.multiply(self.writer.floats(x), relax.const(factor.astype(np.float32)))
        )
        expr = self.builder.emit(relax.op.add(expr, relax.const(shift.astype(np.float32))))
        return _Items((Float(expr),))

    def _mean(self, call: relax.Call) -> Value | None:
        x, shape = self._value(call.args[0]), call.args[0].ty.shape
        axes = [int(axis) for axis in call.attrs["axis"] or []]
        if isinstance(x, _Parameter) or axes != [1, 2] or len(shape) != 4:
            return None
        return Mean(x, int(shape[1]) * int(shape[2]), call)

    def _average_pool(self, call: relax.Call) -> Value | None:
        x = self._value(call.args[0])
        if isinstance(x, _Parameter) or not sums_whole_windows(call):
            return None
        height, width = (int(extent) for extent in call.attrs["pool_size"])
        return Mean(x, height * width, call)

    def _move(self, call: relax.Call) -> Value | None:
        x = self._value(call.args[0])
        if isinstance(x, _Parameter):
            is_dense = call.op.name == "relax.permute_dims" and x.array.ndim == 2 and not x.transposed
            return replace(x, transposed=True) if is_dense else None
        return self._moved((x,), lambda parts: with_args(call, [*parts, *call.args[1:]]))

    def _concat(self, call: relax.Call) -> Value | None:
        fields = call.args[0]
        if not isinstance(fields, relax.Tuple):
            return None
        parts = tuple(self._value(field) for field in fields.fields)
        if any(isinstance(part, _Parameter) for part in parts):
            return None
        return self._moved(parts, lambda exprs: with_args(call, [relax.Tuple(list(exprs))]))

    def _moved(
        self, parts: tuple[Value, ...], rebuild: Callable[[Sequence[relax.Expr]], relax.Expr]
    ) -> Value:
        held = [part.held if isinstance(part, Quantized) else None for part in parts]
        if held[0] is None or any(other != held[0] for other in held):
            return Moved(parts, rebuild)
        exprs = [part.expr for part in parts if isinstance(part, Quantized)]
        return Quantized(self.builder.emit(rebuild(exprs)), held[0])
