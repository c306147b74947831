"""Winograd's algorithm for 3 x 3 convolutions: its matrices, its weights, and what it computes, in numpy.

F(m x m, 3 x 3) computes m x m outputs from a patch of n x n = (m + 2) x (m + 2) inputs with n * n instead of
9 * m * m multiplications: `AT [(G g GT) * (BT d B)] A` for a patch d and the 3 x 3 weights g (Lavin and Gray
2016). The matrices are Toom and Cook's for the points 0, +-p_1, +-p_2, ... and infinity. As the points come
in pairs, each pair's rows of BT are the sum and the difference of the same two terms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

KERNEL_SIZE = 3


@dataclass(frozen=True)
class Algorithm:
    """F(m x m, 3 x 3) for symmetric points.

    Attributes
    ----------
    name
        "F2" or "F4".
    points
        The positive ones of the points besides 0 and infinity, m / 2 of them.
    relative_error
        The largest error of any output that float32 gives on values of one magnitude, relative to the
        largest output. Tested; far less is usual.
    """

    name: str
    points: tuple[float, ...]
    relative_error: float

    @property
    def m(self) -> int:
        """Rows and columns of outputs that a tile has."""
        return 2 * len(self.points)

    @property
    def n(self) -> int:
        """Rows and columns of inputs that a tile reads."""
        return self.m + KERNEL_SIZE - 1

    @cached_property
    def weight_matrix(self) -> np.ndarray:
        """G, float64 [n, 3]."""
        squares = [point**2 for point in self.points]
        rows = [[1 / math.prod(-square for square in squares), 0, 0]]
        for point in self.points:
            slope = 2 * point**2 * math.prod(point**2 - other for other in squares if other != point**2)
            rows += [[1 / slope, sign * point / slope, point**2 / slope] for sign in (1, -1)]
        return np.array([*rows, [0, 0, 1]], np.float64)

    @cached_property
    def input_matrix(self) -> np.ndarray:
        """BT, float64 [n, n]."""
        squares = np.array([point**2 for point in self.points])
        rows = [_spread(np.poly(squares), 0, self.n)]
        for index, point in enumerate(self.points):
            others = np.poly(np.delete(squares, index))
            even, odd = _spread(others, 2, self.n), point * _spread(others, 1, self.n)
            rows += [even + odd, even - odd]
        return np.stack([*rows, _spread(np.poly(squares), 1, self.n)])

    @cached_property
    def output_matrix(self) -> np.ndarray:
        """AT, float64 [m, n]."""
        points = [0.0, *(sign * point for point in self.points for sign in (1, -1))]
        powers = np.array([[point**row for point in points] for row in range(self.m)])
        infinity = np.zeros((self.m, 1))
        infinity[-1] = 1
        return np.concatenate([powers, infinity], axis=1)

    def transform_input(self, values: Sequence[Any]) -> list[Any]:
        """Return BT d for one column d of n values: numbers, arrays or TVM expressions."""
        matrix = self.input_matrix
        result = [linear(matrix[0], values)]
        for row in range(1, self.n - 1, 2):
            even, odd = matrix[row].copy(), matrix[row].copy()
            even[1::2], odd[0::2] = 0, 0
            first, second = linear(even, values), linear(odd, values)
            result += [first + second, first - second]
        return [*result, linear(matrix[-1], values)]

    def transform_output(self, values: Sequence[Any]) -> list[Any]:
        """Return AT v for one column v of n values: numbers, arrays or TVM expressions."""
        pairs = range(1, self.n - 1, 2)
        sums = [values[index] + values[index + 1] for index in pairs]
        differences = [values[index] - values[index + 1] for index in pairs]
        result = []
        for row, factors in enumerate(self.output_matrix):
            terms = differences if row % 2 else sums
            result.append(linear(factors[[0, *pairs, self.n - 1]], [values[0], *terms, values[-1]]))
        return result


def _spread(coefficients: np.ndarray, first: int, size: int) -> np.ndarray:
    """Return a polynomial in x squared, highest power first, as `size` coefficients of x, times x^first."""
    result = np.zeros(size)
    terms = np.atleast_1d(coefficients)[::-1]
    result[first : first + 2 * len(terms) : 2] = terms
    return result


def linear(factors: Sequence[float], values: Sequence[Any]) -> Any:
    """Return the sum of factors times values, without products by 0, 1 and -1."""
    total = None
    # What needs no product comes first, and begins the sum.
    for factor, value in sorted(zip(map(float, factors), values, strict=True), key=lambda pair: pair[0] != 1):
        if factor == 0:
            continue
        if total is None:
            total = value if factor == 1 else value * np.float32(factor).item()
        elif abs(factor) == 1:
            total = total + value if factor > 0 else total - value
        else:
            total = total + value * np.float32(factor).item()
    return total


# The points of F4 keep its matrices' entries near 1: a quarter of the error that 0, +-1, +-2 give.
F2 = Algorithm("F2", (1.0,), 1e-5)
F4 = Algorithm("F4", (math.sqrt(2), math.sqrt(0.5)), 1e-4)
ALGORITHMS = {algorithm.name: algorithm for algorithm in (F2, F4)}


def transform_weights(weight: np.ndarray, algorithm: Algorithm) -> np.ndarray:
    """Return G g GT of OIHW weights, float32 [n, n, O, I], computed in float64."""
    g = algorithm.weight_matrix
    return np.einsum("ik,ockl,jl->ijoc", g, weight.astype(np.float64), g, optimize=True).astype(np.float32)


def pack_weights(weight: np.ndarray, algorithm: Algorithm, block: int, in_channels: int) -> np.ndarray:
    """Transform OIHW weights and pack them as [n][n][O / block][in_channels][block], zeros filling up."""
    transformed = transform_weights(weight, algorithm)
    n, _, outs, ins = transformed.shape
    blocks = -(-outs // block)
    full = np.zeros((n, n, blocks * block, in_channels), np.float32)
    full[:, :, :outs, :ins] = transformed
    return np.ascontiguousarray(full.reshape(n, n, blocks, block, in_channels).swapaxes(3, 4))


def convolution(
    x: np.ndarray, weight: np.ndarray, algorithm: Algorithm, padding: Sequence[int] = (0, 0, 0, 0)
) -> np.ndarray:
    """Convolve NHWC data with OIHW weights of 3 x 3 at stride 1 by the algorithm, in the data's type.

    Parameters
    ----------
    padding
        (top, left, bottom, right), filled with zeros.
    """
    m, n = algorithm.m, algorithm.n
    top, left, bottom, right = padding
    count, height, width = x.shape[0], x.shape[1] + top + bottom - 2, x.shape[2] + left + right - 2
    rows, columns = -(-height // m), -(-width // m)
    below, beyond = rows * m + 2 - x.shape[1] - top, columns * m + 2 - x.shape[2] - left
    padded = np.pad(x, ((0, 0), (top, below), (left, beyond), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (n, n), (1, 2))[:, ::m, ::m]
    patches = windows.transpose(4, 5, 0, 1, 2, 3)  # [n, n, N, rows, columns, C]
    stage = algorithm.transform_input(list(patches))
    data = np.stack([np.stack(algorithm.transform_input(list(row))) for row in stage])
    products = np.einsum(
        "ijnyxc,ijoc->ijnyxo", data, transform_weights(weight, algorithm).astype(x.dtype), optimize=True
    )
    stage = algorithm.transform_output(list(products))
    outputs = np.stack([np.stack(algorithm.transform_output(list(row))) for row in stage])
    whole = outputs.transpose(2, 3, 0, 4, 1, 5).reshape(count, rows * m, columns * m, -1)
    return whole[:, :height, :width]
