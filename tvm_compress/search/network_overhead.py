"""What a network takes beyond its kernels, each timed alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tvm_compress.schedules.apply import KernelInfo

# Bytes that are read to learn what reading takes: from less than any first cache to more than the networks
# of small machines; in steps of 2.
LEAST_READ, MOST_READ = 1 << 14, 1 << 24


@dataclass(frozen=True)
class Check:
    """A whole network beside its kernels.

    Attributes
    ----------
    total
        Sum of its kernels, as they are in the network.
    calls
        Of kernels.
    whole
        Latency of the network, in the same unit.
    """

    total: float
    calls: int
    whole: float

    @property
    def per_call(self) -> float:
        """What the network takes besides, for each call."""
        return (self.whole - self.total) / self.calls


def overhead_per_call(checks: Sequence[Check]) -> float:
    """Median of what a call takes besides its kernel: finding it, its memory, code that left the cache."""
    return float(np.median([check.per_call for check in checks])) if checks else 0.0


def calls_of(kernels: Sequence[KernelInfo]) -> int:
    """Calls of kernels in a network."""
    return sum(kernel.count for kernel in kernels)


def weight_bytes_of(kernels: Sequence[KernelInfo]) -> float:
    """Bytes of weights that one run of a network reads."""
    return sum(kernel.features["weight_bytes"] * kernel.count for kernel in kernels)


def touched_bytes_of(kernels: Sequence[KernelInfo]) -> float:
    """Bytes that pass through the caches in one run of a network: weights, and what kernels write.

    Some of what they write shares memory; as much is taken by their code and their workspace.
    """
    return weight_bytes_of(kernels) + sum(k.features["output_bytes"] * k.count for k in kernels)


def sizes_to_read(largest: float) -> list[int]:
    """Bytes to time the reading of, for networks with so many bytes of weights."""
    sizes = [LEAST_READ]
    while sizes[-1] < min(largest, MOST_READ):
        sizes.append(2 * sizes[-1])
    return sizes


def time_of_byte(size: float, reading: Mapping[int, float]) -> float:
    """What reading a byte takes where `size` bytes are read again and again.

    Parameters
    ----------
    reading
        The time of reading so many bytes once, for some sizes; at least one.
    """
    sizes = sorted(reading)
    each = [reading[one] / one for one in sizes]
    return float(np.interp(math.log2(max(size, 1)), np.log2(sizes), each))


def read_from_afar(kernels: Sequence[KernelInfo], reading: Mapping[int, float]) -> dict[str, float]:
    """What a call of each kernel, by key, takes longer in its network than alone, to read its weights.

    Alone, they are read again after what the kernel itself touches, in the network after what all do: they
    come from a cache, or from memory, that is so much farther away.
    """
    there = time_of_byte(touched_bytes_of(kernels), reading)
    longer = {}
    for kernel in kernels:
        weights = kernel.features["weight_bytes"]
        own = weights + kernel.features["input_bytes"] + kernel.features["output_bytes"]
        longer[kernel.key] = weights * max(0.0, there - time_of_byte(own, reading))
    return longer
