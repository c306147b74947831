"""Emits values of a QDQ function, in integers where it can.

A value is emitted when somebody asks for it, and only in the form asked for: as integers of a given scale, or
as floats. So bias, batch norm and ReLU reach the layer or the requantization that they fold into.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax

from tvm_compress.passes.integer_functions import evaluate
from tvm_compress.passes.integer_layer import IntegerLayer, fold_integer_layer
from tvm_compress.passes.integer_values import (
    Clamp,
    Float,
    Function,
    Layer,
    Mean,
    Moved,
    Product,
    Quantized,
    Sum,
    Value,
    is_integer,
)
from tvm_compress.passes.quantization import INT32_MAX, QuantizationParameters, fixed_point_within
from tvm_compress.schedules import ops

# The sides of an addition are brought to 2**-8 of the output's scale, so that rounding them costs nothing.
ADD_SHIFT = 8

# Sums of residual additions are clamped to this on the way, far out of any output's range: with the rounding
# term they fit 32 bits.
_FINE_MAX = 2**30 - 1

# Terms of a global average may exceed the average's range by this factor (in bits) before they are clamped.
_MEAN_HEADROOM = 6


@dataclass(frozen=True)
class _Grid:
    """Integers that are asked for: `clamp(round(clip(x, low, high) / scale) + zero_point, qmin, qmax)`."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int
    dtype: str
    low: float = -math.inf
    high: float = math.inf

    @property
    def output_scale(self) -> float:
        """One step of the output; int32 is a step on the way, finer by ADD_SHIFT bits."""
        return self.scale * 2**ADD_SHIFT if self.dtype == "int32" else self.scale

    def clamped(self, low: float, high: float) -> "_Grid":
        """Return the grid for a value that is clipped to [low, high] first."""
        low, high = (min(max(bound, self.low), self.high) for bound in (low, high))
        return replace(self, low=low, high=high)

    def bounds(self) -> tuple[int, int]:
        """Return (qmin, qmax) with the clip folded in: rounding is monotone, so it commutes with clip."""

        def place(bound: float) -> int:
            position = bound / self.scale + self.zero_point
            return round(min(max(position, self.qmin), self.qmax))

        return place(self.low), place(self.high)

    def quantize(self, x: np.ndarray) -> np.ndarray:
        """Return float32 numbers on the grid, rounded as the operator quantize rounds."""
        steps = np.rint(x / np.float32(self.scale)).astype(np.float64) + self.zero_point
        return steps.clip(*self.bounds()).astype(self.dtype)


class Writer:
    """Emits values into a block builder, each accumulator and each float form once."""

    def __init__(self, builder: relax.BlockBuilder) -> None:
        self.builder = builder
        self._floats: dict[Value, relax.Expr] = {}
        self._accumulators: dict[Value, tuple[relax.Expr, np.ndarray, int]] = {}
        self._sums: dict[Value, relax.Expr] = {}
        self._products: dict[Value, relax.Expr] = {}

    def floats(self, value: Value) -> relax.Expr:
        """Return the value as float32 (or as what it is, if emitted already)."""
        if isinstance(value, Float):
            return value.expr
        if value not in self._floats:
            self._floats[value] = self.builder.emit(self._float_form(value))
        return self._floats[value]

    def quantize(self, value: Value, held: QuantizationParameters) -> Quantized:
        """Return the value quantized."""
        if isinstance(value, Quantized) and value.held == held:
            return value
        grid = _Grid(held.scale, held.zero_point, held.qmin, held.qmax, held.dtype)
        return Quantized(self._integers(value, grid), held)

    def _float_form(self, value: Value) -> relax.Expr:
        match value:
            case Quantized():
                scale = np.float32(value.held.scale)
                return self._dequantize(value.expr, scale, value.held.zero_point)
            case Layer() if value.integer:
                return self._dequantize(*self._accumulate(value, None)[:2], 0)
            case Layer():
                return self._float_layer(value)
            case Clamp():
                if (value.low, value.high) == (0.0, math.inf):
                    return relax.op.nn.relu(self.floats(value.x))
                return relax.op.clip(self.floats(value.x), value.low, value.high)
            case Sum():
                total, *terms = [self.floats(term) for term in value.terms]
                for term in terms[:-1]:
                    total = self.builder.emit(relax.op.add(total, term))
                return relax.op.add(total, terms[-1])
            case Mean(x=Quantized() as x):
                return self._dequantize(self._sum(value), np.float32(x.held.scale / value.area), 0)
            case Mean():
                return relax.Call(value.call.op, [self.floats(value.x)], value.call.attrs)
            case Product():
                scale = np.float32(value.left.held.scale * value.right.held.scale)
                return self._dequantize(self._multiply(value), scale, 0)
            case Moved() | Function():
                return value.rebuild([self.floats(part) for part in value.parts])
        raise AssertionError(type(value))

    def _dequantize(self, x: relax.Expr, scale: Any, zero_point: int) -> relax.Expr:
        return ops.call("dequantize", [x, _const(scale, np.float32)], zero_point=zero_point)

    def _float_layer(self, layer: Layer) -> relax.Expr:
        column = layer.factor.reshape(-1, *[1] * (layer.weight.ndim - 1))
        weight = layer.weight * column
        if layer.scale is not None:
            weight = weight * layer.scale.reshape(column.shape)
        constant: relax.Expr = _const(weight, np.float32)
        if layer.weight.ndim == 2:
            constant = self.builder.emit(relax.op.permute_dims(constant))
        result = relax.Call(layer.call.op, [self.floats(layer.x), constant], layer.call.attrs)
        if not layer.shift.any():
            return result
        return relax.op.add(self.builder.emit(result), _const(layer.shift, np.float32))

    def _accumulate(self, layer: Layer, output_scale: float | None) -> tuple[relax.Expr, np.ndarray, int]:
        """Emit the layer's int32 sums; give their scale [O] and bound. Once, for the first output scale."""
        if layer not in self._accumulators:
            assert isinstance(layer.x, Quantized)
            assert layer.scale is not None
            held = layer.x.held
            folded = fold_integer_layer(
                layer.weight,
                held.scale * layer.scale.astype(np.float64),
                layer.factor,
                layer.shift,
                layer.bits,
                _reach(held),
                output_scale,
                layer.site,
            )
            sums = self._emit_layer(layer, layer.x, folded)
            self._accumulators[layer] = sums, folded.scale, int(folded.bound.max(initial=0))
        return self._accumulators[layer]

    def _emit_layer(self, layer: Layer, x: Quantized, folded: IntegerLayer) -> relax.Expr:
        held, bits = x.held, folded.fraction_bits
        counted = held.dtype == "uint8"
        attrs: dict[str, Any] = {
            "site": layer.site,
            "scheme": "bitserial" if counted else "int8",
            "activation_bits": (held.qmax - held.qmin).bit_length(),
            # The INT8 kernels are the same for weights on a coarser grid.
            "weight_bits": layer.bits if counted else 8,
            "zero_point": held.zero_point,
        }
        kind = "dense"
        if layer.weight.ndim == 4:
            kind = "conv2d"
            for name in ("strides", "padding", "dilation"):
                attrs[name] = [int(extent) for extent in layer.call.attrs[name]]
            attrs["groups"] = int(layer.call.attrs["groups"])
        bias = _const(folded.bias if bits == 0 else np.zeros_like(folded.bias), np.int32)
        expr = self.builder.emit(ops.call(kind, [x.expr, _const(folded.weight, np.int8), bias], **attrs))
        if bits > 0:
            expr = self.builder.emit(relax.op.multiply(expr, _const(2**bits, np.int32)))
            expr = self.builder.emit(relax.op.add(expr, _const(folded.bias, np.int32)))
        return expr

    def _integers(self, value: Value, grid: _Grid) -> relax.Expr:
        """Emit the value on a grid."""
        match value:
            case Clamp():
                return self._integers(value.x, grid.clamped(value.low, value.high))
            case Moved():
                parts = [self._integers(part, grid) for part in value.parts]
                return self.builder.emit(value.rebuild(parts))
            case Quantized():
                ratio = value.held.scale / grid.scale
                return self._requantize(self._centred(value), ratio, grid, _reach(value.held))
            case Function():
                table = relax.const(grid.quantize(evaluate(value)))
                return self.builder.emit(ops.call("table", [value.source.expr, table]))
            case Product():
                ratio = value.left.held.scale * value.right.held.scale / grid.scale
                bound = _reach(value.left.held) * _reach(value.right.held)
                return self._requantize(self._multiply(value), ratio, grid, bound)
            case Layer() if value.integer:
                accumulator, scale, bound = self._accumulate(value, grid.output_scale)
                return self._requantize(accumulator, scale / grid.scale, grid, bound)
            case Sum() if is_integer(value):
                return self._add(value, grid)
            case Mean() if is_integer(value):
                return self._mean(value, grid)
        qmin, qmax = grid.bounds()
        attrs = {
            "scale": grid.scale,
            "zero_point": grid.zero_point,
            "qmin": qmin,
            "qmax": qmax,
            "dtype": grid.dtype,
        }
        return self.builder.emit(ops.call("quantize", [self.floats(value)], **attrs))

    def _add(self, value: Sum, grid: _Grid) -> relax.Expr:
        """Add on a grid 2**ADD_SHIFT times finer and requantize once."""
        if grid.dtype == "int32":  # fine enough already
            return self._add_fine(value, grid)
        fine = _Grid(grid.scale / 2**ADD_SHIFT, 0, -_FINE_MAX, _FINE_MAX, "int32")
        return self._requantize(self._add_fine(value, fine), None, grid, _FINE_MAX, shift=ADD_SHIFT)

    def _add_fine(self, value: Sum, grid: _Grid) -> relax.Expr:
        """Add on an int32 grid of zero point 0."""
        # Each side is clamped so that the sum stays in the grid's range; that far out, any output saturates.
        limit = grid.qmax // len(value.terms)
        side = _Grid(grid.scale, 0, -limit, limit, "int32")
        total, *terms = [self._integers(term, side) for term in value.terms]
        for term in terms:
            total = self.builder.emit(relax.op.add(total, term))
        if (grid.low, grid.high) == (-math.inf, math.inf):
            return total
        if (grid.low, grid.high) == (0.0, math.inf):
            return self.builder.emit(relax.op.nn.relu(total))
        return self.builder.emit(relax.op.clip(total, *grid.bounds()))

    def _mean(self, value: Mean, grid: _Grid) -> relax.Expr:
        """Sum integers over the pixels; the division is part of the requantization."""
        if isinstance(value.x, Quantized):
            held = value.x.held
            ratio = held.scale / value.area / grid.scale
            return self._requantize(self._sum(value), ratio, grid, _reach(held) * value.area)
        limit = INT32_MAX // value.area
        wanted = (grid.qmax - grid.qmin).bit_length() + _MEAN_HEADROOM
        shift = min(ADD_SHIFT, max(0, limit.bit_length() - 1 - wanted))
        fine = _Grid(grid.scale / 2**shift, 0, -limit, limit, "int32")
        terms = self._integers(value.x, fine)
        total = self.builder.emit(value.total(terms))
        return self._requantize(total, 1 / (2**shift * value.area), grid, limit * value.area)

    def _sum(self, value: Mean) -> relax.Expr:
        """Emit the sums over the pixels of q - zero_point, once."""
        assert isinstance(value.x, Quantized)
        if value not in self._sums:
            self._sums[value] = self.builder.emit(value.total(self._centred(value.x)))
        return self._sums[value]

    def _multiply(self, value: Product) -> relax.Expr:
        """Emit the products of the integers less their zero points, once."""
        if value not in self._products:
            left, right = self._centred(value.left), self._centred(value.right)
            self._products[value] = self.builder.emit(relax.op.multiply(left, right))
        return self._products[value]

    def _centred(self, value: Quantized) -> relax.Expr:
        """Emit q - zero_point as int32."""
        wide = self.builder.emit(relax.op.astype(value.expr, "int32"))
        if value.held.zero_point == 0:
            return wide
        return self.builder.emit(relax.op.subtract(wide, _const(value.held.zero_point, np.int32)))

    def _requantize(
        self,
        x: relax.Expr,
        multipliers: np.ndarray | float | None,
        grid: _Grid,
        bound: int,
        shift: int = 0,
    ) -> relax.Expr:
        """Emit `x * multipliers` on a grid, |x| being at most `bound`; None stands for 2**-shift."""
        if multipliers is None:
            multiplier = np.ones(1, np.int32)
        else:
            multiplier, shift = fixed_point_within(np.atleast_1d(multipliers), bound)
        qmin, qmax = grid.bounds()
        attrs = {
            "shift": shift,
            "zero_point": grid.zero_point,
            "qmin": qmin,
            "qmax": qmax,
            "dtype": grid.dtype,
            "bound": bound,
        }
        return self.builder.emit(ops.call("requantize", [x, _const(multiplier, np.int32)], **attrs))


def _reach(held: QuantizationParameters) -> int:
    """Return the largest |q - zero_point|."""
    return max(held.qmax - held.zero_point, held.zero_point - held.qmin)


def _const(value: Any, dtype: type) -> relax.Expr:
    # A copy in C order: a constant of a view would keep the view's strides.
    return relax.const(np.array(value, dtype=dtype, order="C"))
