"""AnnotateQuantization: decide how each quantized site's input is held as integers."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import tvm
from tvm import IRModule, relax

from tvm_compress.errors import ModelError, PolicyError
from tvm_compress.passes.graph import bindings, operator, tensors
from tvm_compress.passes.integer_points import needed_points
from tvm_compress.passes.module_pass import ModulePass
from tvm_compress.passes.params import parameter_vars, require_stage, with_main, with_stage
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.quantization import QuantizationParameters, activation_parameters
from tvm_compress.passes.sites import site_name

QUANTIZATION = "tvm_compress.quantization"
VERSION = 2


class ActivationRanges(Protocol):
    """The part of `tvm_compress.calibration.Calibration` that the pass needs."""

    def range(self, site: str, bits: int) -> tuple[float, float]:
        """Give the range (low, high) of a site's input (or an integer point), held with so many bits."""


@dataclass(frozen=True)
class SiteCall:
    """A site where it stands in a function: its output, the tensor it reads and its weight parameter."""

    name: str
    output: relax.Var
    tensor: relax.Var
    weight: relax.Var


@dataclass(frozen=True)
class SiteQuantization:
    """How a site is quantized.

    Attributes
    ----------
    scheme, weight_bits, activation_bits
        As in the policy.
    stored
        Set for the first quantized site that reads a tensor which is held with 8 bits for several consumers.
    input
        What the site computes with, where it quantizes its input itself: the tensor if nobody stores it, else
        the stored value a second time. None: it reads what another site's `stored` or `input` made.
    """

    scheme: str
    weight_bits: int
    activation_bits: int
    stored: QuantizationParameters | None
    input: QuantizationParameters | None


@tvm.transform.module_pass(opt_level=0, name="tvm_compress.AnnotateQuantization")
class AnnotateQuantization(ModulePass):
    """Write the function attribute `tvm_compress.quantization` (JSON): float -> annotated.

    A tensor with a quantized consumer is quantized once for all its consumers: with 8 bits, or with fewer if
    all of them are bit-serial sites of the same activation bits; a site that wants fewer bits than what is
    stored quantizes the stored value a second time. What functions (hard-swish) and products (squeeze-and-
    excite) read between quantized sites is held with 8 bits, see `find_integer_points`; where it was never
    anything but 0, they are computed in float.

    Parameters
    ----------
    policy
        Says which sites are quantized and with how many bits.
    calibration
        Anything with `range(site, bits) -> (low, high)`.

    Raises
    ------
    ModelError
        If the module is not at the stage "float".
    PolicyError
        If the policy quantizes a site that the module has not.
    DataError
        If a calibrated range is not finite, or a single value; names the site.
    """

    def __init__(self, policy: CompressionPolicy, calibration: ActivationRanges) -> None:
        self.policy = policy
        self.calibration = calibration

    def transform_module(self, module: IRModule, _: tvm.transform.PassContext) -> IRModule:
        """Return the module with the attribute on `main`."""
        require_stage(module, "float", what="AnnotateQuantization")
        function = module["main"]
        calls = site_calls(function)
        quantized = [call for call in calls if self.policy[call.name].scheme != "fp32"]
        known = {call.name for call in calls}
        for name, site in self.policy.sites.items():
            if site.scheme != "fp32" and name not in known:
                raise PolicyError(
                    f"The policy quantizes site {name!r}, which the module has not.",
                    f"Its sites are: {', '.join(sorted(known))}.",
                )
        uses = count_uses(function)
        by_tensor: dict[relax.Var, list[SiteCall]] = {}
        for call in quantized:
            by_tensor.setdefault(call.tensor, []).append(call)
        decided: dict[str, SiteQuantization] = {}
        for tensor, readers in by_tensor.items():
            decided |= self._decide(readers, uses[tensor])
        others = {
            point.name: self._parameters(point.name, 8)
            for point in needed_points(function, {call.name for call in quantized})
            if point.tensor not in by_tensor and any(self.calibration.range(point.name, 8))
        }
        text = quantization_to_json(decided, others)
        return with_stage(with_main(module, function.with_attr(QUANTIZATION, text)), "annotated")

    def _decide(self, readers: list[SiteCall], consumers: int) -> dict[str, SiteQuantization]:
        """Decide for all quantized sites that read one tensor; `consumers` counts its other readers too."""
        first = readers[0].name
        wanted = {reader.name: self.policy[reader.name] for reader in readers}
        bits = {site.activation_bits for site in wanted.values()}
        alone = consumers == 1
        if alone or (len(readers) == consumers and len(bits) == 1 and bits != {8}):
            return {
                name: self._site(
                    site, input=self._parameters(name, site.activation_bits) if name == first else None
                )
                for name, site in wanted.items()
            }
        stored = self._parameters(first, 8)
        return {
            name: self._site(
                site,
                stored=stored if name == first else None,
                input=self._parameters(name, site.activation_bits) if site.activation_bits < 8 else None,
            )
            for name, site in wanted.items()
        }

    def _parameters(self, name: str, bits: int) -> QuantizationParameters:
        low, high = self.calibration.range(name, bits)
        return activation_parameters(low, high, bits, site=name)

    @staticmethod
    def _site(
        site: SitePolicy,
        stored: QuantizationParameters | None = None,
        input: QuantizationParameters | None = None,
    ) -> SiteQuantization:
        return SiteQuantization(site.scheme, site.weight_bits, site.activation_bits, stored, input)


def site_calls(function: relax.Function) -> list[SiteCall]:
    """Find the sites of a float or annotated function, in order: where they stand, and what they read."""
    weights: dict[relax.Var, relax.Var] = {var: var for var in parameter_vars(function)}
    found = []
    for var, value in bindings(function):
        name = operator(value)
        if name == "relax.permute_dims" and value.args[0] in weights:
            weights[var] = weights[value.args[0]]  # a dense layer's weights stand as [out, in]
        elif name in ("relax.nn.conv2d", "relax.matmul") and value.args[1] in weights:
            weight = weights[value.args[1]]
            found.append(SiteCall(site_name(weight.name), var, value.args[0], weight))
    return found


def count_uses(function: relax.Function) -> Counter[relax.Expr]:
    """Count, for each variable, the bindings that read it, and the function's result."""
    counts: Counter[relax.Expr] = Counter()
    for value in [*(value for _, value in bindings(function)), function.body.body]:
        counts.update({expr for expr in tensors(value) if isinstance(expr, relax.Var)})
    return counts


def quantization_to_json(
    sites: Mapping[str, SiteQuantization], tensors: Mapping[str, QuantizationParameters]
) -> str:
    """Write the attribute's text: same decisions, same text. `tensors` are integer points by their names."""

    def row(site: SiteQuantization) -> dict[str, Any]:
        held = {"stored": site.stored, "input": site.input}
        return {
            "scheme": site.scheme,
            "weight_bits": site.weight_bits,
            "activation_bits": site.activation_bits,
            **{name: None if value is None else value.to_dict() for name, value in held.items()},
        }

    values = {
        "version": VERSION,
        "sites": {name: row(site) for name, site in sites.items()},
        "tensors": {name: held.to_dict() for name, held in tensors.items()},
    }
    return json.dumps(values, sort_keys=True)


def _read(module: IRModule) -> dict[str, Any]:
    attrs = module["main"].attrs
    if attrs is None or QUANTIZATION not in attrs:
        raise ModelError(f"The module has no attribute {QUANTIZATION!r}.", "Run AnnotateQuantization first.")
    values = json.loads(str(attrs[QUANTIZATION]))
    if values.get("version") != VERSION:
        raise ModelError(
            f"The attribute {QUANTIZATION!r} has version {values.get('version')!r}, "
            f"this tool reads {VERSION}."
        )
    return values


def quantization_of(module: IRModule) -> dict[str, SiteQuantization]:
    """Read how the sites of an annotated or QDQ module are quantized.

    Raises
    ------
    ModelError
        If the module has no such attribute, or one of another version.
    """

    def held(value: dict[str, Any] | None) -> QuantizationParameters | None:
        return None if value is None else QuantizationParameters(**value)

    return {
        name: SiteQuantization(**{**row, "stored": held(row["stored"]), "input": held(row["input"])})
        for name, row in _read(module)["sites"].items()
    }


def quantized_tensors(module: IRModule) -> dict[str, QuantizationParameters]:
    """Read how the integer points of an annotated or QDQ module are held, by name; raises as above."""
    return {name: QuantizationParameters(**row) for name, row in _read(module)["tensors"].items()}
