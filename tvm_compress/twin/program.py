"""Reads the `main` function of a Relax module into a flat list of nodes, in order of execution."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvm_compress.errors import ModelError, UnsupportedOperatorError
from tvm_compress.passes.params import num_inputs

TUPLE = "Tuple"
TUPLE_GET_ITEM = "TupleGetItem"


@dataclass(frozen=True)
class TensorInfo:
    """Shape (the IR's, so with its batch extent) and dtype of a value."""

    shape: tuple[int, ...]
    dtype: str


@dataclass
class Node:
    """One operator of the program.

    Attributes
    ----------
    op
        Name in Relax, such as `relax.nn.conv2d`, or `Tuple`, `TupleGetItem`.
    inputs
        Slots of the tensor arguments; the items of tuple arguments stand one after the other.
    immediates
        The other arguments, in order: numbers and shapes.
    output
        Slot of the result.
    attrs
        The call's attributes, as TVM gives them; `attr` reads one.
    info, output_info
        Types of the inputs and of the result (None for a tuple).
    layer
        Where in the network it stands, for messages.
    varying
        Whether the result depends on the input (and so on the batch), not on parameters alone.
    """

    op: str
    inputs: tuple[int, ...]
    immediates: tuple[Any, ...]
    output: int
    attrs: Any
    info: tuple[TensorInfo | None, ...]
    output_info: TensorInfo | None
    layer: str
    varying: bool

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or the default where there is none."""
        if self.attrs is None:
            return default
        if isinstance(self.attrs, tvm.ir.attrs.DictAttrs):
            return self.attrs.get(name, default)
        return getattr(self.attrs, name, default)

    def ints(self, name: str) -> tuple[int, ...]:
        """Return an attribute that is a list of integers."""
        return tuple(int(value) for value in self.attr(name))


@dataclass
class Program:
    """The nodes of `main`, and what its slots hold before the first node runs; `variables` has all slots."""

    nodes: list[Node] = field(default_factory=list)
    input_slots: list[int] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    constants: dict[int, np.ndarray] = field(default_factory=dict)
    variables: dict[relax.Var, int] = field(default_factory=dict)
    output: int = 0
    size: int = 0

    def uses(self) -> dict[int, list[Node]]:
        """Return the nodes that take each slot."""
        consumers: dict[int, list[Node]] = {}
        for node in self.nodes:
            for slot in dict.fromkeys(node.inputs):
                consumers.setdefault(slot, []).append(node)
        return consumers


def read_program(module: tvm.IRModule) -> Program:
    """Read `main` of a module.

    Raises
    ------
    ModelError
        If there is no `main`, or it has not exactly one input.
    UnsupportedOperatorError
        If a binding is neither a call of an operator, a tuple, nor a constant.
    """
    names = [variable.name_hint for variable in module.get_global_vars()]
    if "main" not in names:
        raise ModelError(f"The module has no function `main`, only {names}.")
    return _Reader(module["main"]).read()


def _info(expr: Any) -> TensorInfo | None:
    ty = getattr(expr, "ty", None)
    if not isinstance(ty, relax.TensorType) or ty.shape is None:
        return None
    return TensorInfo(tuple(int(extent) for extent in ty.shape), str(ty.dtype))


class _Reader:
    def __init__(self, function: relax.Function) -> None:
        self.function = function
        self.program = Program()
        self.slots = self.program.variables
        self.varying: set[int] = set()
        self.layer = "the input"

    def read(self) -> Program:
        count = num_inputs(self.function)
        if count != 1:
            raise ModelError(f"`main` has {count} inputs; the twin runs functions of one input.")
        for position, parameter in enumerate(self.function.params):
            slot = self._new_slot(parameter)
            if position < count:
                self.program.input_slots.append(slot)
                self.varying.add(slot)
            else:
                self.program.parameters[parameter.name] = slot
        self.names = {slot: name for name, slot in self.program.parameters.items()}
        body = self.function.body
        if isinstance(body, relax.SeqExpr):
            for block in body.blocks:
                for binding in block.bindings:
                    self._read_binding(binding)
            body = body.body
        self.program.output = self._slot(body)
        return self.program

    def _new_slot(self, variable: Any = None) -> int:
        slot = self.program.size
        self.program.size += 1
        if variable is not None:
            self.slots[variable] = slot
        return slot

    def _read_binding(self, binding: Any) -> None:
        value = binding.value
        if not isinstance(binding, relax.VarBinding):
            raise UnsupportedOperatorError(
                f"The twin cannot compute the {type(binding).__name__} of `{binding.var.name}`.",
                "Give the module with static shapes.",
            )
        if isinstance(value, relax.Var | tvm.ir.GenericConst):
            self.slots[binding.var] = self._slot(value)
        else:
            self.slots[binding.var] = self._read_expr(value)

    def _slot(self, expr: Any) -> int:
        if isinstance(expr, relax.Var):
            return self.slots[expr]
        if isinstance(expr, tvm.ir.GenericConst):
            slot = self._new_slot()
            self.program.constants[slot] = expr.value.numpy()
            return slot
        return self._read_expr(expr)

    def _read_expr(self, expr: Any) -> int:
        if isinstance(expr, relax.Tuple):
            return self._add(TUPLE, list(expr.fields), [], None, expr)
        if isinstance(expr, relax.TupleGetItem):
            return self._add(TUPLE_GET_ITEM, [expr.tuple_value], [int(expr.index)], None, expr)
        if isinstance(expr, relax.Call) and isinstance(expr.op, tvm.ir.Op):
            tensors: list[Any] = []
            immediates: list[Any] = []
            for argument in expr.args:
                _sort_argument(argument, tensors, immediates)
            return self._add(expr.op.name, tensors, immediates, expr.attrs, expr)
        what = f"a call of {expr.op}" if isinstance(expr, relax.Call) else type(expr).__name__
        raise UnsupportedOperatorError(
            f"The twin cannot compute {what} (after {self.layer}).",
            "It runs modules of Relax operators, before they are lowered to kernels.",
        )

    def _add(self, op: str, tensors: list[Any], immediates: list[Any], attrs: Any, expr: Any) -> int:
        inputs = tuple(self._slot(tensor) for tensor in tensors)
        own = next((self.names[slot] for slot in inputs if slot in self.names), None)
        layer = own.rpartition(".")[0] or own if own else f"after {self.layer}"
        if own:
            self.layer = layer
        varying = any(slot in self.varying for slot in inputs)
        output = self._new_slot()
        if varying:
            self.varying.add(output)
        info = tuple(_info(tensor) for tensor in tensors)
        self.program.nodes.append(
            Node(op, inputs, tuple(immediates), output, attrs, info, _info(expr), layer, varying)
        )
        return output


def _sort_argument(argument: Any, tensors: list[Any], immediates: list[Any]) -> None:
    if isinstance(argument, relax.Tuple):
        tensors.extend(argument.fields)
    elif isinstance(argument, relax.ShapeExpr):
        immediates.append(tuple(int(extent) for extent in argument.values))
    elif isinstance(argument, tvm.tirx.IntImm | tvm.tirx.FloatImm):
        immediates.append(argument.value)
    else:
        tensors.append(argument)
