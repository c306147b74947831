"""Kernel features: a fixed vector of named numbers that the latency model learns from."""

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from tvm_compress.schedules import counts


class Kernel(Protocol):
    """The part of `schedules.apply.KernelInfo` that the latency model needs."""

    @property
    def kind(self) -> str:
        """Operator and scheme, such as "conv2d_int8"; "elementwise" for all that is no site."""
        ...

    @property
    def count(self) -> int:
        """Calls in the network."""
        ...

    @property
    def key(self) -> str:
        """Identifies the kernel across networks."""
        ...

    @property
    def features(self) -> dict[str, float]:
        """Numbers by name."""
        ...


# Kinds of kernels that have a column each; all others share "other".
KINDS = (
    "conv2d_fp32",
    "conv2d_int8",
    "conv2d_bitserial",
    "dense_fp32",
    "dense_int8",
    "dense_bitserial",
    "elementwise",
    "other",
)

# What `KernelInfo.features` holds of a kernel; a name that is missing counts as 0.
# Taken as log2(1 + value): multiply-accumulates, bit operations, bytes of all arguments, and what the
# scheduled loops execute, padding and remainders included.
COUNTS = ("macs", "bops", "input_bytes", "weight_bytes", "output_bytes", *counts.NAMES)
# Taken as they are: the site's shape, its bits, operators fused behind it, threads that the kernel may use.
SHAPE = (
    "H",
    "W",
    "IC",
    "OC",
    "OH",
    "OW",
    "KH",
    "KW",
    "stride",
    "groups",
    "activation_bits",
    "weight_bits",
    "epilogue_ops",
    "threads",
    "intensity",
    "backend_popcount",
    "backend_dot",
    "backend_narrow",
    "backend_depthwise",
    "backend_winograd",
    "backend_lookup",
)

# Of the analytic cost: what the work consists of.
SHARES = ("sum_ops", "sum_loads", "vector_ops", "scalar_ops", "iterations", "divisions")

FEATURE_NAMES: tuple[str, ...] = (
    *(f"kind_{kind}" for kind in KINDS),
    *(f"log2_{name}" for name in COUNTS),
    *SHAPE,
    "ic_over_32",  # share of the groups of 32 input channels that is filled
    "oc_over_16",
    "ow_over_8",
    *(f"share_{name}" for name in SHARES),
    "log2_touched_bytes",
)


def kernel_kind(kernel: Kernel) -> str:
    """Column of a kernel's kind."""
    return kernel.kind if kernel.kind in KINDS else "other"


def kernel_vector(kernel: Kernel) -> np.ndarray:
    """Feature vector of a kernel, float32 [len(FEATURE_NAMES)]; the order is FEATURE_NAMES'."""
    values: dict[str, float] = dict.fromkeys(FEATURE_NAMES, 0.0)
    values[f"kind_{kernel_kind(kernel)}"] = 1.0
    found: Mapping[str, float] = kernel.features
    for name in COUNTS:
        values[f"log2_{name}"] = math.log2(1.0 + max(0.0, found.get(name, 0.0)))
    for name in SHAPE:
        values[name] = float(found.get(name, 0.0))
    values["ic_over_32"] = _filled(values["IC"], 32)
    values["oc_over_16"] = _filled(values["OC"], 16)
    values["ow_over_8"] = _filled(values["OW"], 8)
    cost = analytic_cost(kernel)
    for name in SHARES:
        values[f"share_{name}"] = found.get(name, 0.0) / cost
    touched = ("input_bytes", "weight_bytes", "output_bytes", "workspace_bytes")
    values["log2_touched_bytes"] = math.log2(1.0 + sum(found.get(name, 0.0) for name in touched))
    return np.asarray([values[name] for name in FEATURE_NAMES], np.float32)


def analytic_cost(kernel: Kernel) -> float:
    """Rough work of a kernel in arbitrary units, never 0: operations and accesses, in vectors of the target.

    Only ratios between kernels matter, the model learns the scale, and how far each kernel is from this.
    """
    found = kernel.features
    accesses = sum(
        found.get(f"{kind}_{what}", 0.0)
        for kind in ("sum", "vector", "scalar")
        for what in ("loads", "stores")
    )
    operations = sum(found.get(f"{kind}_ops", 0.0) for kind in ("sum", "vector", "scalar"))
    loops = found.get("iterations", 0.0) + found.get("divisions", 0.0)
    return operations + 0.5 * accesses + loops + 64.0


def _filled(channels: float, group: int) -> float:
    return channels / (math.ceil(channels / group) * group) if channels > 0 else 0.0
