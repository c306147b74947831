"""Which of Winograd's algorithms a convolution is computed by, if any: by what was measured on the target."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from tvm_compress.schedules import kernel_tables
from tvm_compress.schedules.target_rules import TargetRules
from tvm_compress.schedules.winograd_algorithm import Algorithm

Kind = TypeVar("Kind", bound=Algorithm)


def applies(info: dict[str, Any]) -> bool:
    """Whether a convolution (kernel.kernel_attrs) is 3 x 3 at stride 1 or 2, without groups or dilation."""
    shape = [info[key] for key in ("KH", "KW", "dilation", "groups")]
    return shape == [3, 3, [1, 1], 1] and info["strides"] in ([1, 1], [2, 2])


def of_stride(algorithms: Mapping[str, Kind], info: dict[str, Any]) -> dict[str, Kind]:
    """Return those algorithms that are for the stride of a convolution to which they apply."""
    return {name: algorithm for name, algorithm in algorithms.items() if algorithm.stride == info["stride"]}


def choose_algorithm(
    info: dict[str, Any], rules: TargetRules, operator: str, algorithms: Mapping[str, Kind]
) -> Kind | None:
    """Return the algorithm that is the fastest by the target's table, None for the direct kernel.

    What `rules.choices` says of the layer goes before the table. Where nothing was measured, or weights are
    to be compact, the direct kernel is taken: it is never much slower than it has to be, and its weights take
    the least memory.

    Parameters
    ----------
    operator
        "conv2d_fp32" or "conv2d_int8".
    algorithms
        Those that may be taken.
    """
    chosen = None if rules.compact else rules.choices.find(info, "direct", *algorithms)
    if chosen is not None:
        return algorithms.get(chosen.kernel)
    costs = {} if rules.compact else costs_by_kernel(info, rules, operator, algorithms)
    return algorithms.get(min(costs, key=lambda name: costs[name])) if costs else None


def costs_by_kernel(
    info: dict[str, Any], rules: TargetRules, operator: str, algorithms: Mapping[str, Algorithm]
) -> dict[str, float]:
    """What "direct" and each algorithm cost by the target's table; nothing where it has none."""
    work: dict[str, Callable[[int, int], float]] = {"direct": lambda height, width: 9.0 * height * width}
    work |= {name: partial(_multiplications, algorithm) for name, algorithm in algorithms.items()}
    shape = {"H": info["OH"], "W": info["OW"], "IC": info["IC"], "OC": info["OC"]}
    rows = kernel_tables.load_rows(rules.isa, kernel_tables.name_of(operator, info["stride"]))
    return kernel_tables.costs_at(rows, shape, work)


def _multiplications(algorithm: Algorithm, height: int, width: int) -> float:
    """Multiplications for an output, per pair of an input and an output channel."""
    return float(algorithm.n**2 * -(-height // algorithm.m) * -(-width // algorithm.m))
