"""Operators on parameters and constants alone: Canonicalize computes them while reading."""

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from tvm_compress.passes.canonical_values import Array


def _view(change: Callable[[relax.Call, np.ndarray], np.ndarray]) -> Callable[..., Array]:
    """Fold an operator that only shows a parameter in another shape: its name stays."""

    def fold(call: relax.Call, array: Array, *_: Any) -> Array:
        return Array(change(call, array.value), array.name)

    return fold


def _to_shape(call: relax.Call, value: np.ndarray) -> np.ndarray:
    return value.reshape([int(extent) for extent in call.ty.shape])


def _transpose(call: relax.Call, value: np.ndarray) -> np.ndarray:
    return value.transpose(None if call.attrs.axes is None else [int(axis) for axis in call.attrs.axes])


def _cast(call: relax.Call, value: np.ndarray) -> np.ndarray:
    return value.astype(str(call.ty.dtype))


def _computed(function: Callable[..., np.ndarray]) -> Callable[..., Array]:
    """Fold an operator on constants: what it gives has no name."""

    def fold(call: relax.Call, *arrays: Array) -> Array:
        return Array(np.asarray(function(*(array.value for array in arrays)), dtype=str(call.ty.dtype)))

    return fold


FOLDED: dict[str, Callable[..., Array]] = {
    "relax.reshape": _view(_to_shape),
    "relax.squeeze": _view(_to_shape),
    "relax.expand_dims": _view(_to_shape),
    "relax.flatten": _view(_to_shape),
    "relax.permute_dims": _view(_transpose),
    "relax.astype": _view(_cast),
    "relax.add": _computed(np.add),
    "relax.subtract": _computed(np.subtract),
    "relax.multiply": _computed(np.multiply),
    "relax.divide": _computed(np.divide),
    "relax.maximum": _computed(np.maximum),
    "relax.minimum": _computed(np.minimum),
    "relax.sqrt": _computed(np.sqrt),
    "relax.isnan": _computed(np.isnan),
    "relax.where": _computed(np.where),
}
