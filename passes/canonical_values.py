"""What Canonicalize works on: tensors with a free layout, known arrays, and the module being built."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import relax

from tvm_compress.passes.sites import site_name


@dataclass(frozen=True)
class Tensor:
    """A tensor that the network computes, in a layout of its own.

    Parameters
    ----------
    expr
        The variable that holds it.
    axes
        Axis i of `expr` holds axis axes[i] of the tensor. Axes of extent 1 may be missing.
    shape
        The tensor's shape as the source has it.
    """

    expr: relax.Var
    axes: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Array:
    """A parameter (with a name) or a constant (without): a value that is known at compile time."""

    value: np.ndarray
    name: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return self.value.shape


@dataclass(frozen=True)
class Padded:
    """A tensor between zeros that nobody has stored: a convolution takes them as padding of its own.

    `around` has the zeros before and after each of the tensor's axes.
    """

    tensor: Tensor
    around: tuple[tuple[int, int], ...]


Value = Tensor | Array | Padded


@dataclass(frozen=True)
class Quantizer:
    """What a quantization computes with: the parameter that holds the scale, its value, the zero point."""

    scale: relax.Var
    value: float
    zero_point: int


@dataclass
class _Found:
    """What was emitted under a variable, as far as later operators want to know it."""

    site: str = ""  # the site's name, where a site computed it that has no bias yet
    clipped: tuple[Tensor, float, float] | None = None  # what was clipped, to which range
    averaged: relax.Expr | None = None  # what R.mean over axes 1 and 2 took
    quantized: "Quantizer | None" = None  # how integers were made


def channels_last(rank: int, axis: int = 1) -> tuple[int, ...]:
    """Give the order of axes that has `axis` last and the others as they stand."""
    return (*(a for a in range(rank) if a != axis), axis)


@dataclass
class Builder:
    """Emits canonical operators and collects parameters; each parameter gets exactly one consumer."""

    block: relax.BlockBuilder
    inputs: list[relax.Var]
    parameters: dict[str, tuple[relax.Var, np.ndarray]] = field(default_factory=dict)
    found: dict[relax.Var, _Found] = field(default_factory=dict)
    last_site: str = ""
    _layouts: dict[tuple[relax.Var, tuple[int, ...]], relax.Var] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def emit(self, expr: relax.Expr) -> relax.Var:
        """Bind an expression to a new variable."""
        return self.block.emit(expr)

    def tensor(self, expr: relax.Expr, axes: Sequence[int]) -> Tensor:
        """Emit an expression that computes a tensor whose axes stand in this order, none missing."""
        var = self.emit(expr)
        shape = [0] * len(axes)
        for extent, axis in zip(var.ty.shape, axes, strict=True):
            shape[axis] = int(extent)
        return Tensor(var, tuple(axes), tuple(shape))

    def like(self, expr: relax.Expr, source: Tensor) -> Tensor:
        """Emit an expression that computes a tensor of the shape and layout of another."""
        return Tensor(self.emit(expr), source.axes, source.shape)

    def ordered(self, value: Tensor, order: Sequence[int]) -> relax.Var:
        """Give the tensor with its axes in this order; transposes and adds unit axes where needed."""
        order = tuple(order)
        if value.axes == order:
            return value.expr
        key = value.expr, tuple(value.axes.index(axis) if axis in value.axes else -1 for axis in order)
        if key not in self._layouts:
            self._layouts[key] = self._reorder(value, order)
        return self._layouts[key]

    def _reorder(self, value: Tensor, order: tuple[int, ...]) -> relax.Var:
        present = [axis for axis in order if axis in value.axes]
        assert len(present) == len(value.axes), f"{value} has axes outside of {order}"
        added = [i for i, axis in enumerate(order) if axis not in value.axes]
        expr, permutation = value.expr, [value.axes.index(axis) for axis in present]
        averaged = self.found.get(expr, _Found()).averaged
        if averaged is not None and added == [1, 2] and permutation == [0, 1]:
            # A mean that keeps its axes needs no second operator.
            return self.emit(relax.op.mean(averaged, axis=[1, 2], keepdims=True))
        if permutation != sorted(permutation):
            expr = self.emit(relax.op.permute_dims(expr, permutation))
        return self.emit(relax.op.expand_dims(expr, added)) if added else expr

    def note(self, var: relax.Var) -> _Found:
        """Give what is known of a variable, to read or to change."""
        return self.found.setdefault(var, _Found())

    def number(self, kind: str) -> int:
        """Count what has no name of its own."""
        self._counts[kind] = self._counts.get(kind, 0) + 1
        return self._counts[kind] - 1

    def parameter(self, array: Array, derived: str) -> relax.Var:
        """Make a parameter; `derived` names it where it has no name, or where its name is taken already.

        Importers share a parameter among its uses (all-zero biases, say). Here every use gets one of its own,
        so that pruning and training can treat them apart.
        """
        name = array.name or derived
        if name in self.parameters:
            name = derived
        base, copies = name, 2
        taken = {var.name for var in self.inputs}
        while name in self.parameters or name in taken:
            stem = site_name(base)
            name = f"{stem}_{copies}{base[len(stem) :]}"
            copies += 1
        value = np.ascontiguousarray(array.value)
        var = relax.Var(name, relax.TensorType(value.shape, str(value.dtype)))
        self.parameters[name] = (var, value)
        return var


class UnsupportedFormError(Exception):
    """Why an operator cannot be taken as it stands; Canonicalize adds the operator's name and place."""


def as_tensor(value: Any) -> Tensor:
    """Give a value that depends on the input."""
    if isinstance(value, Padded):
        raise UnsupportedFormError("it reads a tensor padded with zeros, which only a convolution does")
    if not isinstance(value, Tensor):
        raise UnsupportedFormError("it is computed from parameters alone")
    return value


def as_array(value: Any, what: str) -> Array:
    """Give a value that is known; `what` it is for stands in the message."""
    if not isinstance(value, Array):
        raise UnsupportedFormError(f"its {what} must be parameters, but are computed from the input")
    return value


def ints(values: Any) -> list[int]:
    """Give TVM's integers as Python's."""
    return [int(value) for value in values]


def without_padding(value: Value, layout: str) -> tuple[Value, list[int]]:
    """Take the zeros off a 4-D tensor; they are given as top, left, bottom, right."""
    if not isinstance(value, Padded) or len(value.around) != len(layout):
        return value, [0, 0, 0, 0]
    around = dict(zip(layout, value.around, strict=True))
    if any(around["N"]) or any(around["C"]):
        raise UnsupportedFormError("it reads a tensor padded along other axes than height and width")
    (top, bottom), (left, right) = around["H"], around["W"]
    return value.tensor, [top, left, bottom, right]


def spatial(value: Value, layout: str) -> tuple[Tensor, tuple[int, ...]]:
    """Give a 4-D tensor with the order of its axes that is NHWC."""
    value = as_tensor(value)
    if len(value.shape) != 4 or sorted(layout) != sorted("NCHW"):
        raise UnsupportedFormError(f"layout {layout}, {len(value.shape)} axes; images with 4 axes are needed")
    return value, tuple(layout.index(axis) for axis in "NHWC")
