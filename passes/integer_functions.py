"""Functions of the numbers of one tensor, such as hard-swish, as tables of 8-bit integers."""

from collections.abc import Callable

import numpy as np
from tvm import relax

from tvm_compress.errors import ModelError
from tvm_compress.passes.graph import operator
from tvm_compress.passes.insert_qdq import with_args
from tvm_compress.passes.integer_values import Clamp, Function, Quantized, Value


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # exp may be infinite: what is divided by it is 0 then, as it should be.
    return 1 / (1 + np.exp(-x))


# What each operator makes of float32 numbers.
COMPUTED: dict[str, Callable[..., np.ndarray]] = {
    "relax.sigmoid": _sigmoid,
    "relax.tanh": np.tanh,
    "relax.nn.silu": lambda x: x * _sigmoid(x),
    "relax.add": np.add,
    "relax.subtract": np.subtract,
    "relax.multiply": np.multiply,
    "relax.divide": np.divide,
    "relax.maximum": np.maximum,
    "relax.minimum": np.minimum,
}


def function_of(call: relax.Call, operands: list[Value | np.ndarray]) -> Function | None:
    """Return what a call computes as a function of one tensor of integers; None where it is none.

    Parameters
    ----------
    operands
        For each argument, the value that it stands for, or its number where it is one, of shape [].
    """
    parts = [each for each in operands if isinstance(each, Value)]
    sources = {_source(part) for part in parts}
    if len(sources) != 1 or None in sources:
        return None
    source = sources.pop()
    assert source is not None
    operate = COMPUTED[operator(call)]

    def fill(given: list, known: list) -> list:
        """Return all operands: those given, where there is a value, and else what is known."""
        rest = iter(given)
        return [next(rest) if isinstance(each, Value) else k for each, k in zip(operands, known, strict=True)]

    return Function(
        source,
        tuple(parts),
        lambda *given: operate(*fill(list(given), operands)),
        lambda exprs: with_args(
            call,
            fill(list(exprs), [relax.const(k) if isinstance(k, np.ndarray) else None for k in operands]),
        ),
    )


def _source(value: Value) -> Quantized | None:
    match value:
        case Quantized():
            return value
        case Function():
            return value.source
        case Clamp():
            return _source(value.x)
    return None


def evaluate(function: Function) -> np.ndarray:
    """Return the function's values, float32 [256], for all integers of its source's type in order.

    They are computed as the QDQ module computes them. An integer that the source never holds stands for the
    nearest that it does.

    Raises
    ------
    ModelError
        If the function gives NaN for a number that the source can hold.
    """
    held = function.source.held
    limits = np.iinfo(held.dtype)
    integers = np.arange(limits.min, limits.max + 1).clip(held.qmin, held.qmax)
    reals = ((integers - held.zero_point) * np.float32(held.scale)).astype(np.float32)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        values = _evaluate(function, reals).astype(np.float32)
    if np.isnan(values).any():
        raise ModelError(
            f"An element-wise function gives NaN at {reals[np.isnan(values)][0]}, within its input's range.",
            "Leave the sites around it at fp32, or change the function.",
        )
    return values


def _evaluate(value: Value, reals: np.ndarray) -> np.ndarray:
    match value:
        case Function():
            return value.compute(*[_evaluate(part, reals) for part in value.parts])
        case Clamp():
            return np.clip(_evaluate(value.x, reals), np.float32(value.low), np.float32(value.high))
    return reals
