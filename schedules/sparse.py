"""float32 dense layers whose weights are zero by whole vectors: only the others are stored and multiplied.

A vector is as many neighbouring output features as the target's registers hold (8 with AVX2, 4 on the
Cortex-A72) at one input feature: the weight group "simd-8" or "simd-4". Each row of vectors has a list of the
inputs that it reads, as long as the longest list: what the shorter ones lack is filled with zeros.
"""

from dataclasses import dataclass

import numpy as np
from tvm import relax, te

from tvm_compress.schedules.target_rules import TargetRules

# Share of a layer's inputs in its longest list up to which the sparse kernel is taken: both take as long
# between 0.65 and 0.8, on AVX2 and on the emulated Cortex-A72 (scripts/bench/sparse.py).
PAYS_BELOW = 0.65
# Rows of vectors that one tile computes side by side: each sum depends on the one before, and a multiply-add
# takes four cycles or more.
_SIDE_BY_SIDE = 4


@dataclass(frozen=True)
class SparseRows:
    """Weights [O, I] as lists of vectors.

    Attributes
    ----------
    values
        float32 [O / (V lanes), K, V lanes], V rows of vectors side by side, K the longest list.
    inputs
        int32 [O / (V lanes), K, V]: which input each vector is multiplied with.
    """

    values: np.ndarray
    inputs: np.ndarray

    @property
    def block(self) -> int:
        """Output features of a tile, V lanes."""
        return self.values.shape[2]

    @property
    def side_by_side(self) -> int:
        """Rows of vectors in a tile, V."""
        return self.inputs.shape[2]


def find_rows(weight: np.ndarray, rules: TargetRules) -> SparseRows | None:
    """Give the lists of a weight [O, I], or None where the dense kernel is at least as fast."""
    out, inputs = weight.shape
    lanes = rules.fp32_lanes
    rows = -(-out // lanes)
    side_by_side = min(_SIDE_BY_SIDE, rows)
    tiles = -(-rows // side_by_side)
    padded = np.zeros((tiles * side_by_side * lanes, inputs), np.float32)
    padded[:out] = weight
    vectors = padded.reshape(tiles, side_by_side, lanes, inputs).transpose(0, 3, 1, 2)  # [tile, I, V, lanes]
    used = vectors.any(axis=3)
    longest = int(used.sum(axis=1).max(initial=0))
    if longest > PAYS_BELOW * inputs:
        return None
    # A stable sort brings the used inputs of each list to its front, in ascending order.
    order = np.argsort(~used, axis=1, kind="stable")[:, : max(longest, 1)]
    values = np.take_along_axis(vectors, order[..., None], axis=1)
    return SparseRows(
        np.ascontiguousarray(values.reshape(tiles, order.shape[1], side_by_side * lanes)),
        np.ascontiguousarray(order.astype(np.int32)),
    )


def multiply(x: te.Tensor, values: te.Tensor, inputs: te.Tensor, attrs: dict[str, str]) -> te.Tensor:
    """Multiply x [N, I] with `SparseRows`: [N, O], O filled up to whole tiles."""
    tiles, longest, block = (int(extent) for extent in values.shape)
    lanes = block // int(inputs.shape[2])
    k = te.reduce_axis((0, longest), "k")
    return te.compute(
        (x.shape[0], tiles * block),
        lambda i, c: te.sum(
            x[i, inputs[c // block, k, c % block // lanes]] * values[c // block, k, c % block], axis=[k]
        ),
        name="dense",
        attrs=attrs,
    )


def constants(rows: SparseRows) -> tuple[relax.Expr, relax.Expr]:
    """Give values and inputs as constants of the library."""
    return relax.const(rows.values), relax.const(rows.inputs)
