"""Kernel features: a fixed vector of named numbers that the latency model learns from."""

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np


class Kernel(Protocol):
    """The part of `schedules.apply.KernelInfo` that the latency model needs."""

    name: str
    kind: str
    count: int
    key: str
    features: dict[str, float]


# Kinds of kernels that have a column each; all others share "other".
KINDS = ("conv2d_fp32", "conv2d_int8", "conv2d_bitserial", "dense_fp32", "dense_int8", "dense_bitserial", "other")

# Numbers that `KernelInfo.features` may hold; one that it does not hold counts as 0.
#   macs              multiply-accumulates of one call
#   bit_operations    macs * activation bits * weight bits
#   bytes_read, bytes_written   of all arguments
#   elements          of the output
#   batch .. groups   shape of the site
#   activation_bits, weight_bits
#   loops             innermost iterations of all loop nests
COUNTS = ("macs", "bit_operations", "bytes_read", "bytes_written", "elements", "loops")
SHAPE = (
    "in_channels",
    "out_channels",
    "in_height",
    "in_width",
    "out_height",
    "out_width",
    "kernel_height",
    "kernel_width",
    "stride",
    "groups",
    "activation_bits",
    "weight_bits",
)

FEATURE_NAMES: tuple[str, ...] = (
    *(f"kind_{kind}" for kind in KINDS),
    *(f"log2_{name}" for name in COUNTS),
    *SHAPE,
    "macs_per_byte",
    "in_channels_over_32",  # share of a group of 32 channels that is filled
    "out_channels_over_16",
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
    traffic = found.get("bytes_read", 0.0) + found.get("bytes_written", 0.0)
    values["macs_per_byte"] = found.get("macs", 0.0) / max(traffic, 1.0)
    values["in_channels_over_32"] = _filled(values["in_channels"], 32)
    values["out_channels_over_16"] = _filled(values["out_channels"], 16)
    return np.asarray([values[name] for name in FEATURE_NAMES], np.float32)


def analytic_cost(kernel: Kernel) -> float:
    """Rough work of a kernel in arbitrary units: the larger of computing and moving, never 0.

    Multiply-accumulates count as fp32 ones; INT8 is taken as 4 times, bit-serial as 85 / (bits x bits) / 4 times as dense (the
    limits of a NEON core without dot products). Only ratios between kernels matter: the model learns the scale.
    """
    found = kernel.features
    macs = found.get("macs", 0.0)
    bits = max(found.get("activation_bits", 32.0), 1.0) * max(found.get("weight_bits", 32.0), 1.0)
    kind = kernel_kind(kernel)
    if kind.endswith("int8"):
        macs /= 2.0
    elif kind.endswith("bitserial"):
        macs /= max(85.0 / bits / 4.0, 0.25)
    traffic = found.get("bytes_read", 0.0) + found.get("bytes_written", 0.0)
    return max(macs, traffic, 64.0)


def _filled(channels: float, group: int) -> float:
    return channels / (math.ceil(channels / group) * group) if channels > 0 else 0.0
