"""Find the tensors beside the sites' inputs that must be integers, so that sites pass on nothing else.

A function of one tensor, such as hard-swish, becomes a table of 8-bit integers, and the product of two
tensors, as in squeeze-and-excite, is taken of their integers. Both need operands that are quantized, though
no site reads them.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from itertools import chain, count

import tvm
from tvm import relax

from tvm_compress.passes.graph import bindings, operator, tensors, weight_parameter
from tvm_compress.passes.params import parameter_vars
from tvm_compress.passes.sites import site_name

# Functions of one tensor, and operators that are one where their other operand is a number or made of the
# same tensor.
FUNCTIONS = frozenset(("relax.sigmoid", "relax.tanh", "relax.nn.silu"))
ARITHMETIC = frozenset(
    "relax." + name for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum")
)
CLAMPS = frozenset(("relax.nn.relu", "relax.clip"))

# What passes integers on.
_TRANSPARENT = frozenset(
    (
        "relax.nn.batch_norm",
        "relax.mean",
        "relax.permute_dims",
        "relax.reshape",
        "relax.expand_dims",
        "relax.nn.max_pool2d",
        "relax.nn.batch_flatten",
        "relax.concat",
        "relax.add",
    )
)
_SITES = frozenset(("relax.nn.conv2d", "relax.matmul"))


@dataclass(frozen=True)
class IntegerPoint:
    """A tensor that a function or a product reads.

    Attributes
    ----------
    name
        "SITE.output" after the last site before it; "SITE.output_2" and so on where there are several.
    tensor
        Where it stands.
    needed_with
        For each function and product that reads it: what it gives, and what it reads.
    """

    name: str
    tensor: relax.Var
    needed_with: tuple[tuple[relax.Var, tuple[relax.Var, ...]], ...]


def sums_whole_windows(call: relax.Call) -> bool:
    """Whether an average pooling divides by one number everywhere, so that its sums can be integers."""
    attrs = call.attrs
    keys = ("pool_size", "strides", "padding", "dilation")
    window, strides, padding, dilation = ([int(v) for v in attrs[key]] for key in keys)
    size, out = ([int(v) for v in t.ty.shape][1:3] for t in (call.args[0], call))
    # What ceil_mode adds at the end are windows that are cut off.
    whole = [
        (size[i] + padding[i] + padding[i + 2] - window[i]) // strides[i] + 1 == out[i] for i in range(2)
    ]
    counted = not any(padding) or bool(attrs["count_include_pad"])
    return str(attrs["layout"]) == "NHWC" and set(dilation) == {1} and all(whole) and counted


def find_integer_points(function: relax.Function) -> list[IntegerPoint]:
    """Find the points of a float or annotated function in order, whatever will be quantized of it."""
    return _Finder(function).points()


def needed_points(function: relax.Function, quantized: Set[str]) -> list[IntegerPoint]:
    """Find the points to quantize where these sites are: from sites in integers to sites in integers."""
    finder = _Finder(function)
    made = finder.made_of_integers(quantized)
    wanted = finder.wanted_as_integers(quantized)
    return [
        point
        for point in finder.points()
        if any(result in wanted and made.issuperset(read) for result, read in point.needed_with)
    ]


class _Finder:
    """Reads a function once: what is a function of what."""

    def __init__(self, function: relax.Function) -> None:
        self.function = function
        self.bindings = list(bindings(function))
        self.defined = dict(self.bindings)
        self.parameters = set(parameter_vars(function))
        # Tensors without weights, which are computed from parameters alone.
        self.fixed = set(self.parameters)
        # A tensor -> the nearest one that it is a function of, number by number.
        self.parents: dict[relax.Var, relax.Var] = {}
        self.products: dict[relax.Var, tuple[relax.Var, ...]] = {}
        self.sites: dict[relax.Var, str] = {}
        # The functions that are more than adding a number, which folds into biases.
        self.proper: set[relax.Var] = set()
        for var, value in self.bindings:
            self._read(var, value)

    def _read(self, var: relax.Var, value: relax.Expr) -> None:
        name, operands = operator(value), self._operands(value)
        if not operands:
            self.fixed.add(var)
        elif name in _SITES:
            self.sites[var] = self._site(value)
        elif name in CLAMPS:
            # What is clamped first is its own tensor: clamping is part of its quantization.
            if operands[0] in self.parents:
                self.parents[var] = operands[0]
        elif name in FUNCTIONS:
            self.parents[var] = operands[0]
            self.proper.add(var)
        elif name in ARITHMETIC:
            self._read_arithmetic(var, value, name, operands)

    def _read_arithmetic(
        self, var: relax.Var, value: relax.Call, name: str, operands: list[relax.Var]
    ) -> None:
        if len(operands) == 1:
            if any(self._is_number(arg, operands[0]) for arg in value.args):
                self.parents[var] = operands[0]
                if name != "relax.add":
                    self.proper.add(var)
            return
        left, right = operands
        others = set(self._lineage(right))
        common = next((each for each in self._lineage(left) if each in others), None)
        if common is not None:
            self.parents[var] = common
            self.proper.add(var)
        elif name == "relax.multiply":
            self.products[var] = (left, right)

    def _operands(self, value: relax.Expr) -> list[relax.Var]:
        """Return the tensors that an expression reads and that depend on the input."""
        read = [expr for expr in tensors(value) if isinstance(expr, relax.Var)]
        return [var for var in read if var not in self.fixed]

    def _is_number(self, expr: relax.Expr, tensor: relax.Var) -> bool:
        """Whether an operand is one number for all of the tensor; not its only channel's bias."""
        if isinstance(expr, tvm.ir.GenericConst):
            return expr.value.numpy().size == 1
        shape = [int(extent) for extent in expr.ty.shape] if expr in self.parameters else [0]
        return all(extent == 1 for extent in shape) and int(tensor.ty.shape[-1]) > 1

    def _site(self, value: relax.Call) -> str:
        weight = weight_parameter(value.args[1], self.defined, self.function)
        return "" if weight is None else site_name(weight.name)

    def _lineage(self, var: relax.Var) -> Iterator[relax.Var]:
        yield var
        while var in self.parents:
            var = self.parents[var]
            yield var

    def points(self) -> list[IntegerPoint]:
        """Return the points, in order."""
        readers: dict[relax.Var, list[tuple[relax.Var, tuple[relax.Var, ...]]]] = {}
        roots = {var: list(self._lineage(var))[-1] for var in self.parents}
        proper = {roots[var] for var in self.proper}
        for var, root in roots.items():
            if root in proper:
                readers.setdefault(root, []).append((var, (root,)))
        for var, operands in self.products.items():
            for operand in operands:
                readers.setdefault(operand, []).append((var, operands))
        sites = self._sites_before()
        taken = set(self.sites.values())
        found = []
        for var, _ in self.bindings:
            if var in readers and sites[var]:
                base = f"{sites[var]}.output"
                name = next(n for n in chain([base], (f"{base}_{i}" for i in count(2))) if n not in taken)
                taken.add(name)
                found.append(IntegerPoint(name, var, tuple(readers[var])))
        return found

    def _sites_before(self) -> dict[relax.Var, str]:
        """Return the last site before each tensor, along first operands; "" before the first site."""
        sites: dict[relax.Var, str] = {}
        for var, value in self.bindings:
            operands = self._operands(value)
            sites[var] = self.sites.get(var) or (sites.get(operands[0], "") if operands else "")
        return sites

    def made_of_integers(self, quantized: Set[str]) -> set[relax.Var]:
        """Return the tensors that quantized sites and what follows them can give as integers."""
        made: set[relax.Var] = set()
        for var, value in self.bindings:
            if var in self.sites:
                own = self.sites[var] in quantized
            else:
                operands = self._operands(value)
                own = self._passes(var, value) and bool(operands) and made.issuperset(operands)
            if own:
                made.add(var)
        return made

    def wanted_as_integers(self, quantized: Set[str]) -> set[relax.Var]:
        """Return the tensors that quantized sites read, or what leads to them."""
        wanted: set[relax.Var] = set()
        for var, value in reversed(self.bindings):
            site = self.sites.get(var)
            if site in quantized or (site is None and var in wanted and self._passes(var, value)):
                wanted.update(self._operands(value))
        return wanted

    def _passes(self, var: relax.Var, value: relax.Expr) -> bool:
        if isinstance(value, relax.TupleGetItem) or var in self.parents or var in self.products:
            return True
        if operator(value) == "relax.nn.avg_pool2d":
            return sums_whole_windows(value)
        return operator(value) in _TRANSPARENT | CLAMPS
