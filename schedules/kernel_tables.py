"""Which kernel is the fastest for a shape: looked up among shapes that were measured on the target.

The tables are `tables/ISA.json`, written by `scripts/bench/kernel_table.py` with the machine, the versions
and the date they were taken on.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "tables"

# Whose fp32 kernels are the same as another target's, by which their table is.
_SAME_FP32 = {"avx512": "avx512vnni"}

# A measured shape: its extents, and what each kernel costs, all in one unit.
Row = Mapping[str, Any]


def name_of(operator: str, stride: int) -> str:
    """Name of the table of an operator, "conv2d_fp32" or "conv2d_int8", at stride 1 or 2."""
    return operator if stride == 1 else f"{operator}_stride{stride}"


@cache
def load_rows(isa: str, operator: str) -> Sequence[Row]:
    """Read what was measured of an operator on a target; nothing where there is no table.

    Parameters
    ----------
    isa
        TargetRules.isa.
    operator
        "conv2d_fp32", "conv2d_int8": convolutions of 3 x 3 at stride 1; behind "_stride2" those at stride 2.

    Returns
    -------
    Rows of the extents "H", "W" (of the output), "IC", "OC", and "costs" by kernel.
    """
    if operator.startswith("conv2d_fp32"):
        isa = _SAME_FP32.get(isa, isa)
    path = _FOLDER / f"{isa}.json"
    if not path.is_file():
        return ()
    rows: Sequence[Row] = json.loads(path.read_text(encoding="utf-8"))["tables"].get(operator, ())
    return tuple(rows)


def costs_at(
    rows: Sequence[Row], shape: Mapping[str, int], work: Mapping[str, Callable[[int, int], float]]
) -> dict[str, float]:
    """Estimate what kernels cost by the measured shape that is nearest.

    Parameters
    ----------
    rows
        From `load_rows`.
    shape
        "H", "W" (of the output), "IC" and "OC".
    work
        The kernels in question: work of each for an output of H x W, so that what a measured cost was spent
        on tiles that overhang is judged anew for the shape.

    Returns
    -------
    Costs by kernel, to be compared with each other only; of those that were measured.
    """
    if not rows:
        return {}
    row = min(rows, key=lambda row: _distance(row, shape))
    size, measured = (shape["H"], shape["W"]), (row["H"], row["W"])
    return {
        name: row["costs"][name] * count(*size) / count(*measured)
        for name, count in work.items()
        if name in row["costs"]
    }


def _distance(row: Row, shape: Mapping[str, int]) -> float:
    """Sum of the logarithms of how much pixels and channels differ."""
    pixels = math.log2(row["H"] * row["W"]) - math.log2(shape["H"] * shape["W"])
    channels = (abs(math.log2(row[name]) - math.log2(shape[name])) for name in ("IC", "OC"))
    return abs(pixels) + sum(channels)
