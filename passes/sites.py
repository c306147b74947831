"""Find the compressible sites of a module: its convolutions and dense layers, by stable names."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import IRModule, relax

from tvm_compress.passes.graph import bindings, definitions, operator, weight_parameter
from tvm_compress.schedules.ops import static_shape

_KINDS = {"relax.nn.conv2d": "conv2d", "relax.matmul": "dense"}


@dataclass(frozen=True)
class Site:
    """A convolution or dense layer.

    Parameters
    ----------
    name
        The weight parameter's name without `.weight` (or `_weight`).
    kind
        "conv2d" or "dense".
    weight
        The weight parameter's name.
    weight_shape
        OIHW (I per group), or [out, in].
    in_shape, out_shape
        NHWC, or [N, C]; the batch extent is always 1.
    strides, dilation
        Height, width.
    padding
        Top, left, bottom, right.
    """

    name: str
    kind: str
    weight: str
    weight_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def in_channels(self) -> int:
        """Channels of the input, over all groups."""
        return self.in_shape[-1]

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.out_shape[-1]

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the kernel; (1, 1) for a dense layer."""
        return (self.weight_shape[2], self.weight_shape[3]) if self.kind == "conv2d" else (1, 1)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference of one sample."""
        return prod(self.out_shape) * prod(self.weight_shape[1:])


def site_name(weight: str) -> str:
    """Give the name of the site whose weight parameter has this name."""
    for ending in (".weight", "_weight"):
        if weight.endswith(ending) and weight != ending:
            return weight[: -len(ending)]
    return weight


def find_sites(module: IRModule) -> list[Site]:
    """Give the sites of a float, annotated or QDQ module in order of execution."""
    function = module["main"]
    defined = definitions(function)
    sites = []
    for _, value in bindings(function):
        if operator(value) not in _KINDS:
            continue
        weight = weight_parameter(value.args[1], defined, function)
        if weight is not None:
            sites.append(make_site(value, weight))
    return sites


def site_outputs(function: relax.Function) -> dict[str, relax.Var]:
    """Give the variable that each site's output stands in, by name, in order of execution."""
    defined = definitions(function)
    outputs = {}
    for var, value in bindings(function):
        if operator(value) in _KINDS:
            weight = weight_parameter(value.args[1], defined, function)
            if weight is not None:
                outputs[site_name(weight.name)] = var
    return outputs


def make_site(call: relax.Call, weight: relax.Var) -> Site:
    """Describe the site that a call computes with this weight parameter."""
    kind = _KINDS[operator(call)]
    rest: dict[str, Any] = {}
    if kind == "conv2d":
        rest = {name: _ints(getattr(call.attrs, name)) for name in ("strides", "padding", "dilation")}
        rest["groups"] = int(call.attrs.groups)
    return Site(
        name=site_name(weight.name),
        kind=kind,
        weight=weight.name,
        weight_shape=static_shape(weight),
        in_shape=(1, *static_shape(call.args[0])[1:]),
        out_shape=(1, *static_shape(call)[1:]),
        **rest,
    )


def _ints(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in values)
