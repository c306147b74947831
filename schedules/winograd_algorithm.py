"""Winograd's algorithm for 3 x 3 convolutions: its matrices, its weights, and what it computes, in numpy.

F(m x m, 3 x 3) computes m x m outputs from a patch of n x n = (m + 2) x (m + 2) inputs with n * n instead of
9 * m * m multiplications: `AT [(G g GT) * (BT d B)] A` for a patch d and the 3 x 3 weights g (Lavin and Gray
2016). The matrices are Toom and Cook's for the points 0, +-p_1, +-p_2, ... and infinity. As the points come
in pairs, each pair's rows of BT are the sum and the difference of the same two terms.

`IntegerAlgorithm` is the same with matrices of integers, so that integers stay exact.
"""

import math
from collections.abc import Callable, Sequence
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
        return _weight_matrix(self.points)

    @cached_property
    def input_matrix(self) -> np.ndarray:
        """BT, float64 [n, n]."""
        return _input_matrix(self.points)

    @cached_property
    def output_matrix(self) -> np.ndarray:
        """AT, float64 [m, n]."""
        return _output_matrix(self.points)

    def transform_input(
        self, values: Sequence[Any], constant: Callable[[Any], Any] | None = None
    ) -> list[Any]:
        """Return BT d for one column d of n values: numbers, arrays or TVM expressions.

        `constant` makes of a factor what the values can be multiplied by; else it is of float32.
        """
        matrix = self.input_matrix
        result = [linear(matrix[0], values, constant)]
        for row in range(1, self.n - 1, 2):
            even, odd = matrix[row].copy(), matrix[row].copy()
            even[1::2], odd[0::2] = 0, 0
            first, second = linear(even, values, constant), linear(odd, values, constant)
            result += [first + second, first - second]
        return [*result, linear(matrix[-1], values, constant)]

    def transform_output(
        self, values: Sequence[Any], constant: Callable[[Any], Any] | None = None
    ) -> list[Any]:
        """Return AT v for one column v of n values, as transform_input."""
        pairs = range(1, self.n - 1, 2)
        sums = [values[index] + values[index + 1] for index in pairs]
        differences = [values[index] - values[index + 1] for index in pairs]
        result = []
        for row, factors in enumerate(self.output_matrix):
            terms = differences if row % 2 else sums
            needed = factors[[0, *pairs, self.n - 1]]
            result.append(linear(needed, [values[0], *terms, values[-1]], constant))
        return result


@dataclass(frozen=True)
class IntegerAlgorithm(Algorithm):
    """F(m x m, 3 x 3) in integers, for points that are integers: exact modulo any power of 2.

    The rows of G are multiplied by what makes them integers, and AT undoes that but for a factor of each of
    its rows: row a of AT gives `row_factors[a]` times the output. Modulo 2**32 the odd part of such a factor
    is undone by a multiplication (by its inverse), its power of 2 by a shift at the end, which is exact while
    the output is less than 2**`bits` in magnitude. So the sums in between may wrap around as they like.
    """

    @cached_property
    def _slopes(self) -> np.ndarray:
        """What each row of G was multiplied by to be one of integers, int64 [n]."""
        return np.rint(1 / np.array([*_weight_matrix(self.points)[:-1, 0], 1])).astype(np.int64)

    @cached_property
    def weight_matrix(self) -> np.ndarray:
        """G with rows of integers, int64 [n, 3]."""
        return np.rint(_weight_matrix(self.points) * self._slopes[:, None]).astype(np.int64)

    @cached_property
    def input_matrix(self) -> np.ndarray:
        """BT, int64 [n, n]."""
        return np.rint(_input_matrix(self.points)).astype(np.int64)

    @cached_property
    def _multiplied(self) -> tuple[np.ndarray, np.ndarray]:
        """AT in integers, and what its rows multiply each output by."""
        whole = math.lcm(*map(int, self._slopes))
        matrix = np.rint(_output_matrix(self.points)).astype(np.int64) * (whole // self._slopes)
        common = np.gcd.reduce(matrix, axis=1)
        return matrix // common[:, None], whole // common

    @cached_property
    def output_matrix(self) -> np.ndarray:
        """AT, int64 [m, n], with each row multiplied by its row factor."""
        return self._multiplied[0]

    @property
    def row_factors(self) -> np.ndarray:
        """What the rows of AT multiply the outputs by, int64 [m]."""
        return self._multiplied[1]

    @cached_property
    def shifts(self) -> list[int]:
        """Exponents of 2 in the row factors."""
        return [int(factor & -factor).bit_length() - 1 for factor in self.row_factors]

    @cached_property
    def inverse(self) -> int:
        """The inverse, modulo 2**32, of the square of the row factors' odd part, which all of them share."""
        odd = {int(factor) >> shift for factor, shift in zip(self.row_factors, self.shifts, strict=True)}
        assert len(odd) == 1
        return pow(odd.pop() ** 2, -1, 1 << 32)

    @property
    def bits(self) -> int:
        """Outputs must be less than 2**bits in magnitude, so that 32 bits hold them times the powers of 2."""
        return 31 - 2 * max(self.shifts)

    def largest_input(self, largest: int) -> int:
        """Return what no transformed input exceeds in magnitude, for inputs up to `largest` in magnitude."""
        return largest * int(np.abs(self.input_matrix).sum(axis=1).max()) ** 2


def _weight_matrix(points: Sequence[float]) -> np.ndarray:
    squares = [point**2 for point in points]
    rows = [[1 / math.prod(-square for square in squares), 0, 0]]
    for point in points:
        slope = 2 * point**2 * math.prod(point**2 - other for other in squares if other != point**2)
        rows += [[1 / slope, sign * point / slope, point**2 / slope] for sign in (1, -1)]
    return np.array([*rows, [0, 0, 1]], np.float64)


def _input_matrix(points: Sequence[float]) -> np.ndarray:
    squares, size = np.array([point**2 for point in points]), 2 * len(points) + KERNEL_SIZE - 1
    rows = [_spread(np.poly(squares), 0, size)]
    for index, point in enumerate(points):
        others = np.poly(np.delete(squares, index))
        even, odd = _spread(others, 2, size), point * _spread(others, 1, size)
        rows += [even + odd, even - odd]
    return np.stack([*rows, _spread(np.poly(squares), 1, size)])


def _output_matrix(points: Sequence[float]) -> np.ndarray:
    signed = [0.0, *(sign * point for point in points for sign in (1, -1))]
    powers = np.array([[point**row for point in signed] for row in range(2 * len(points))])
    infinity = np.zeros((len(powers), 1))
    infinity[-1] = 1
    return np.concatenate([powers, infinity], axis=1)


def _spread(coefficients: np.ndarray, first: int, size: int) -> np.ndarray:
    """Return a polynomial in x squared, highest power first, as `size` coefficients of x, times x^first."""
    result = np.zeros(size)
    terms = np.atleast_1d(coefficients)[::-1]
    result[first : first + 2 * len(terms) : 2] = terms
    return result


def linear(
    factors: Sequence[Any], values: Sequence[Any], constant: Callable[[Any], Any] | None = None
) -> Any:
    """Return the sum of factors times values, without products by 0, 1 and -1, or by negative numbers."""
    constant = constant or (lambda factor: np.float32(factor).item())
    total = None
    # What needs no product comes first, and begins the sum; then what is not taken off.
    pairs = sorted(zip(factors, values, strict=True), key=lambda pair: (pair[0] != 1, pair[0] < 0))
    for factor, value in pairs:
        if factor == 0:
            continue
        term = value if abs(factor) == 1 else value * constant(abs(factor))
        if total is None:
            assert factor > 0
            total = term
        else:
            total = total + term if factor > 0 else total - term
    return total


# The points of F4 keep its matrices' entries near 1: a quarter of the error that 0, +-1, +-2 give.
F2 = Algorithm("F2", (1.0,), 1e-5)
F4 = Algorithm("F4", (math.sqrt(2), math.sqrt(0.5)), 1e-4)
ALGORITHMS = {algorithm.name: algorithm for algorithm in (F2, F4)}
INTEGER_ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (IntegerAlgorithm("F2", (1.0,), 0.0), IntegerAlgorithm("F4", (1.0, 2.0), 0.0))
}


def transform_weights(weight: np.ndarray, algorithm: Algorithm) -> np.ndarray:
    """Return G g GT of OIHW weights [n, n, O, I]: float32, computed in float64; int64 of integers."""
    g = algorithm.weight_matrix
    transformed = np.einsum("ik,ockl,jl->ijoc", g, weight.astype(g.dtype), g, optimize=True)
    return transformed if g.dtype == np.int64 else transformed.astype(np.float32)


def pack_weights(
    weight: np.ndarray, algorithm: Algorithm, block: int, in_channels: int, depth: int = 1
) -> np.ndarray:
    """Transform OIHW weights and pack them, zeros filling up.

    Parameters
    ----------
    block, depth
        Output and input channels that stand together.
    in_channels
        Input channels with those that fill up, a multiple of `depth`.

    Returns
    -------
    numpy.ndarray
        [n][n][O / block][in_channels / depth][block][depth], without the last axis where depth is 1; float32,
        or int16 of integers.
    """
    transformed = transform_weights(weight, algorithm)
    n, _, outs, ins = transformed.shape
    blocks = -(-outs // block)
    full = np.zeros((n, n, blocks * block, in_channels), transformed.dtype)
    full[:, :, :outs, :ins] = transformed
    split = full.reshape(n, n, blocks, block, in_channels // depth, depth).swapaxes(3, 4)
    packed = np.ascontiguousarray(split if depth > 1 else split[..., 0])
    if packed.dtype == np.int64:
        assert np.abs(packed).max(initial=0) < 2**15
        return packed.astype(np.int16)
    return packed


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
