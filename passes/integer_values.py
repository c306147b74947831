"""Values of a QDQ function that are not computed yet; `integer_writer` emits them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tvm import relax

from tvm_compress.passes.graph import operator
from tvm_compress.passes.quantization import QuantizationParameters
from tvm_compress.schedules import ops


@dataclass(frozen=True, eq=False)
class Value:
    """Base of all values; compared and hashed by identity."""


@dataclass(frozen=True, eq=False)
class Float(Value):
    """Something emitted already, of whatever type."""

    expr: relax.Expr


@dataclass(frozen=True, eq=False)
class Quantized(Value):
    """Integers emitted already; at the same time the reals that they stand for."""

    expr: relax.Expr
    held: QuantizationParameters


@dataclass(frozen=True, eq=False)
class Layer(Value):
    """`factor * (convolution or dense layer of x) + shift`, channels on the last axis.

    Attributes
    ----------
    call
        The call as it stands in the QDQ module, for its attributes.
    weight
        float32, or int8 of a quantized site; OIHW or [out, in].
    scale
        Of int8 weights, [O].
    bits
        Of int8 weights.
    factor, shift
        float64 [O].
    """

    site: str
    call: relax.Call
    x: Value
    weight: np.ndarray
    scale: np.ndarray | None
    bits: int
    factor: np.ndarray
    shift: np.ndarray

    @property
    def integer(self) -> bool:
        """Whether the layer multiplies integers."""
        rank = len(self.call.args[0].ty.shape)
        return self.scale is not None and isinstance(self.x, Quantized) and rank == self.weight.ndim

    def affine(self, factor: np.ndarray | float, shift: np.ndarray | float) -> "Layer":
        """Return `factor * self + shift`, both [O] or scalars."""
        return replace(self, factor=self.factor * factor, shift=self.shift * factor + shift)


@dataclass(frozen=True, eq=False)
class Clamp(Value):
    """`clip(x, low, high)`; ReLU has high = inf."""

    x: Value
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Sum(Value):
    """Terms of equal shape, added."""

    terms: tuple[Value, ...]


@dataclass(frozen=True, eq=False)
class Mean(Value):
    """Average of x over `area` pixels; `call` is the mean or the average pooling in the module."""

    x: Value
    area: int
    call: relax.Call

    def total(self, terms: relax.Expr) -> relax.Call:
        """Return the sums of int32 terms, of x's shape, that the averages are of."""
        attrs = self.call.attrs
        if operator(self.call) == "relax.mean":
            return relax.op.sum(terms, axis=[1, 2], keepdims=bool(attrs["keepdims"]))
        window = {name: [int(v) for v in attrs[name]] for name in ("pool_size", "strides", "padding")}
        return ops.call("window_sum", [terms], **window)


@dataclass(frozen=True, eq=False)
class Function(Value):
    """A function of the numbers of one tensor of integers, such as hard-swish: a table of what it gives.

    Attributes
    ----------
    source
        The tensor.
    parts
        The operands of the last operator: the source itself, or functions of it.
    compute
        What that operator makes of them, float32 in numpy.
    rebuild
        The operator, of the operands as floats.
    """

    source: Quantized
    parts: tuple[Value, ...]
    compute: Callable[..., np.ndarray]
    rebuild: Callable[[Sequence[relax.Expr]], relax.Expr]


@dataclass(frozen=True, eq=False)
class Product(Value):
    """Two tensors of integers multiplied, one of which may be broadcast."""

    left: Quantized
    right: Quantized


@dataclass(frozen=True, eq=False)
class Moved(Value):
    """A function that only moves or selects numbers: max pooling, permutation, flatten, concatenation.

    It commutes with every monotone function, such as quantization.
    """

    parts: tuple[Value, ...]
    rebuild: Callable[[Sequence[relax.Expr]], relax.Expr]


def is_integer(value: Value) -> bool:
    """Whether a value can be had without computing floats."""
    match value:
        case Quantized() | Function() | Product():
            return True
        case Layer():
            return value.integer
        case Clamp() | Mean():
            return is_integer(value.x)
        case Sum():
            return all(is_integer(term) for term in value.terms)
        case Moved():
            return all(is_integer(part) for part in value.parts)
    return False
