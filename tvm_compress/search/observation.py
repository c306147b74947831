"""What the agent sees of a site, as named numbers.

The three agents see the same fields. One that says nothing to an agent (such as the previous bit widths to
the pruning agent) never varies, and the standardisation turns it to 0.
"""

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields

import numpy as np
import tvm

from tvm_compress.fastlc.curvature import Curvature
from tvm_compress.passes.params import get_params
from tvm_compress.passes.sites import Site, find_sites
from tvm_compress.search.problem import PolicyDraft, SearchProblem

# A divergence below this counts as none.
_LEAST_OMEGA = 1e-7


@dataclass(frozen=True)
class SiteObservation:
    """State of one step. Counts stand as logarithms to base 2, shares in [0, 1], divergences as log10."""

    # The site in the dense network.
    position: float  # share of the sites that come before
    is_convolution: float
    kernel_height: float
    kernel_width: float
    stride: float
    grouped: float
    in_channels: float
    out_channels: float
    out_height: float
    out_width: float
    macs: float
    parameters: float
    macs_share: float  # of the whole network
    # Its channels: who decides them, and what is left of them.
    decides_pruning: float
    coupled_sites: float  # sites that share its output channels
    coupled_channels: float
    input_kept: float  # share of its input channels that is left
    output_kept: float  # the same for outputs that were decided before
    bitserial_possible: float  # as pruned so far
    # What was decided before.
    previous_pruning: float
    previous_activation: float
    previous_weight: float
    previous_activation_bits: float
    previous_weight_bits: float
    macs_decided: float  # share of the dense MACs that belongs to sites already decided
    macs_saved: float  # share of the dense MACs that was saved so far
    bops_saved: float
    # Sensitivity (Omega, search paper, equation 5) with this site alone compressed.
    omega_weight_2: float
    omega_weight_4: float
    omega_weight_8: float
    omega_activation_2: float
    omega_activation_4: float
    omega_activation_8: float
    omega_pruning_25: float
    omega_pruning_50: float
    omega_pruning_75: float
    # Scores of its output channels (TOCO tolerances).
    tolerance_mean: float
    tolerance_spread: float
    tolerance_low: float
    # Fast LC's model of the loss, where it is given: log10 of its change if the site's weights went to zero.
    curvature_loss: float  # ½ Σ h w²
    gradient_loss: float  # Σ |g w|

    @classmethod
    def size(cls) -> int:
        """Length of the vector."""
        return len(fields(cls))

    def vector(self) -> np.ndarray:
        """Return the fields in order, float32 [S]."""
        return np.asarray(astuple(self), np.float32)


@dataclass(frozen=True)
class Previous:
    """Actions and bits of the step before; zeros at the first."""

    pruning: float = 0.0
    activation: float = 0.0
    weight: float = 0.0
    activation_bits: float = 0.0
    weight_bits: float = 0.0


def observe(problem: SearchProblem, draft: PolicyDraft, site: Site, previous: Previous) -> SiteObservation:
    """State of the step that decides `site`."""
    index = [s.name for s in problem.sites].index(site.name)
    group = problem.output_set(site)
    total = sum(s.macs for s in problem.sites)
    height, width = site.out_shape[1:3] if site.kind == "conv2d" else (1, 1)
    before = problem.sites[:index]
    tolerance = problem.tolerance.get(group.name, {}) if group is not None else {}
    curvature = problem.curvature.get(site.name, {})
    return SiteObservation(
        position=index / len(problem.sites),
        is_convolution=float(site.kind == "conv2d"),
        kernel_height=float(site.kernel[0]),
        kernel_width=float(site.kernel[1]),
        stride=float(max(site.strides, default=1)),
        grouped=float(site.groups > 1),
        in_channels=math.log2(site.in_channels),
        out_channels=math.log2(site.out_channels),
        out_height=math.log2(height),
        out_width=math.log2(width),
        macs=math.log2(max(site.macs, 1)),
        parameters=math.log2(math.prod(site.weight_shape)),
        macs_share=site.macs / total,
        decides_pruning=float(problem.decides_pruning(site)),
        coupled_sites=float(len(group.producers)) if group is not None else 1.0,
        coupled_channels=math.log2(group.channels if group is not None else site.out_channels),
        input_kept=draft.in_channels(site) / site.in_channels,
        output_kept=draft.out_channels(site) / site.out_channels,
        bitserial_possible=float(draft.broken_rule(site) is None),
        previous_pruning=previous.pruning,
        previous_activation=previous.activation,
        previous_weight=previous.weight,
        previous_activation_bits=previous.activation_bits,
        previous_weight_bits=previous.weight_bits,
        macs_decided=sum(s.macs for s in before) / total,
        macs_saved=sum(s.macs - draft.macs(s) for s in before) / total,
        bops_saved=sum(s.macs - draft.bops(s) / 1024.0 for s in before) / total,
        **_omegas(problem.sensitivity.get(site.name, {})),
        tolerance_mean=tolerance.get("mean", 0.0),
        tolerance_spread=tolerance.get("spread", 0.0),
        tolerance_low=tolerance.get("low", 0.0),
        curvature_loss=curvature.get("curvature", 0.0),
        gradient_loss=curvature.get("gradient", 0.0),
    )


def _omegas(sensitivity: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    found = {}
    for method in ("weight", "activation"):
        for bits in (2, 4, 8):
            found[f"omega_{method}_{bits}"] = _at(sensitivity.get(method, {}), bits)
    for share in (25, 50, 75):
        found[f"omega_pruning_{share}"] = _at(sensitivity.get("pruning", {}), share / 100)
    return found


def _at(table: Mapping[float, float], key: float) -> float:
    """Log10 of the divergence at the entry nearest to `key`; as if there were none in an empty table."""
    if not table:
        return math.log10(_LEAST_OMEGA)
    nearest = min(table, key=lambda other: (abs(float(other) - key), other))
    return math.log10(max(table[nearest], 0.0) + _LEAST_OMEGA)


def curvature_statistics(module: tvm.IRModule, curvature: Curvature) -> dict[str, dict[str, float]]:
    """Log10 of the change of loss without a site's weights, by site: by the curvature, and by the gradient.

    Raises
    ------
    ModelError
        If the curvature is another model's.
    """
    curvature.check(module)
    params = get_params(module)
    found = {}
    for site in find_sites(module):
        weight = params[site.weight].astype(np.float64)
        changes = {
            "curvature": 0.5 * float((curvature.diagonal[site.name] * np.square(weight)).sum()),
            "gradient": float(np.abs(curvature.gradient[site.name] * weight).sum()),
        }
        found[site.name] = {name: math.log10(max(value, 1e-12)) for name, value in changes.items()}
    return found


def tolerance_statistics(scores: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Statistics of log10 channel scores by coupled set: mean, lower decile, spread between deciles."""
    found = {}
    for name, values in scores.items():
        logs = np.log10(np.maximum(np.asarray(values, np.float64), 1e-12))
        low, high = np.quantile(logs, [0.1, 0.9])
        found[name] = {"mean": float(logs.mean()), "spread": float(high - low), "low": float(low)}
    return found
