"""Winograd's algorithm for 3 x 3 convolutions: its matrices, its weights, and what it computes, in numpy.

An algorithm computes m x m outputs from a patch of inputs: `AT [(G g GT) * (BT d B)] A` for a patch d and the
3 x 3 weights g (Lavin and Gray 2016). At stride 1 it is F(m x m, 3 x 3), whose n * n = (m + 2) * (m + 2)
products replace 9 * m * m. At stride 2 each axis is the sum of two convolutions at stride 1: of its even
samples with the outer taps, by F(m, 2), and of its odd samples with the middle tap, directly. That takes
n = 2 * m + 1 products an axis; the last m of them share their weights.

The matrices are Toom and Cook's for chosen points and infinity. The rows of BT for a point and its negative
are the sum and the difference of the same two terms.

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
    """How m x m outputs of a 3 x 3 convolution are computed from a patch of its inputs.

    Attributes
    ----------
    name
        "F2" or "F4" at stride 1, "S2" or "S4" at stride 2.
    points
        The finite ones; those that come with their negatives stand before it.
    relative_error
        The largest error of any output that float32 gives on values of one magnitude, relative to the
        largest output. Tested; far less is usual.
    stride
        1 or 2, the convolution's in both directions.
    """

    name: str
    points: tuple[float, ...]
    relative_error: float
    stride: int = 1

    @property
    def taps(self) -> range:
        """The taps of an axis that are computed by the points: all three, or those of the even samples."""
        return range(0, KERNEL_SIZE, self.stride)

    @property
    def m(self) -> int:
        """Rows and columns of outputs that a tile has."""
        return len(self.points) + 2 - len(self.taps)

    @property
    def n(self) -> int:
        """Rows and columns of products that a tile takes."""
        return len(self.points) + 1 + (self.stride - 1) * self.m

    @property
    def patch(self) -> int:
        """Rows and columns of inputs that a tile reads."""
        return self.extent(1)

    def extent(self, tiles: int) -> int:
        """Rows or columns of inputs that so many tiles side by side read."""
        return (tiles * self.m - 1) * self.stride + KERNEL_SIZE

    @property
    def weight_rows(self) -> int:
        """Rows and columns of transformed weights."""
        return len(self.points) + self.stride

    @property
    def places(self) -> np.ndarray:
        """The row of transformed weights that each row of products takes, int64 [n]."""
        return np.minimum(np.arange(self.n), self.weight_rows - 1)

    @cached_property
    def weight_matrix(self) -> np.ndarray:
        """G, float64 [weight_rows, 3]."""
        return self._weights_at_points / self._divisors[:, None]

    @cached_property
    def input_matrix(self) -> np.ndarray:
        """BT, float64 [n, patch]."""
        return self._inputs_of_products()

    def _inputs_of_products(self) -> np.ndarray:
        matrix = np.zeros((self.n, self.patch))
        computed = len(self.points) + 1
        even = slice(0, computed * self.stride, self.stride)
        for row, point in enumerate(self.points):
            matrix[row, even][:-1] = _polynomial([other for other in self.points if other != point])
        matrix[computed - 1, even] = _polynomial(self.points)
        for output in range(self.n - computed):
            matrix[computed + output, 2 * output + 1] = 1
        return matrix

    @cached_property
    def output_matrix(self) -> np.ndarray:
        """AT, float64 [m, n]."""
        return self._outputs_of_products()

    def _outputs_of_products(self) -> np.ndarray:
        powers = np.vander(self.points, self.m, increasing=True).T
        unit = np.eye(self.m)
        return np.hstack([powers, unit[:, -1:], *[unit] * (self.stride - 1)])

    @cached_property
    def _weights_at_points(self) -> np.ndarray:
        """G times its divisors: the taps' polynomial at the points and infinity, then the tap by itself."""
        matrix = np.zeros((self.weight_rows, KERNEL_SIZE))
        matrix[: len(self.points), self.taps] = np.vander(self.points, len(self.taps), increasing=True)
        matrix[len(self.points), self.taps[-1]] = 1
        matrix[len(self.points) + 1 :, 1] = 1
        return matrix

    @cached_property
    def _divisors(self) -> np.ndarray:
        """What the rows of G are divided by, float64 [weight_rows]."""
        others = [[other for other in self.points if other != point] for point in self.points]
        products = (math.prod(p - q for q in rest) for p, rest in zip(self.points, others, strict=True))
        return np.array([*products, *[1.0] * self.stride])

    def _has_negative(self, index: int) -> bool:
        """Whether the point behind that of an index is its negative."""
        points = self.points[index : index + 2]
        return len(points) == 2 and points[0] == -points[1]

    def transform_input(
        self, values: Sequence[Any], constant: Callable[[Any], Any] | None = None
    ) -> list[Any]:
        """Return BT d for one column d of a patch: numbers, arrays or TVM expressions.

        `constant` makes of a factor what the values can be multiplied by; else it is of float32.
        """
        matrix = self.input_matrix
        result: list[Any] = []
        while len(result) < self.n:
            row = matrix[len(result)]
            if self._has_negative(len(result)):
                other = matrix[len(result) + 1]
                first = linear((row + other) / 2, values, constant)
                second = linear((row - other) / 2, values, constant)
                result += [first + second, first - second]
            else:
                result.append(linear(row, values, constant))
        return result

    def transform_output(
        self, values: Sequence[Any], constant: Callable[[Any], Any] | None = None
    ) -> list[Any]:
        """Return AT v for one column v of n values, as transform_input."""
        matrix = self.output_matrix
        signs = (-1) ** np.arange(self.m)
        # Integer matrices have what G was multiplied by in them, which need not be the same for both.
        pairs = [
            index
            for index in range(len(self.points))
            if self._has_negative(index) and np.array_equal(matrix[:, index], signs * matrix[:, index + 1])
        ]
        sums, differences = list(values), list(values)
        for index in pairs:
            sums[index] = values[index] + values[index + 1]
            differences[index] = values[index] - values[index + 1]
        alone = [index for index in range(self.n) if index - 1 not in pairs]
        return [
            linear(factors[alone], [(differences if row % 2 else sums)[index] for index in alone], constant)
            for row, factors in enumerate(matrix)
        ]


@dataclass(frozen=True)
class IntegerAlgorithm(Algorithm):
    """F(m x m, 3 x 3) in integers, for points that are integers: exact modulo any power of 2.

    The rows of G are multiplied by what makes them integers, and AT undoes that but for a factor of each of
    its rows: row a of AT gives `row_factors[a]` times the output. Modulo 2**32 the odd part of such a factor
    is undone by a multiplication (by its inverse), its power of 2 by a shift at the end, which is exact while
    the output is less than 2**`bits` in magnitude. So the sums in between may wrap around as they like.

    Attributes
    ----------
    data
        What holds transformed inputs and weights: "int16" those of any bytes, "int8" of few bits (`fits`).
    """

    data: str = "int16"

    @cached_property
    def weight_matrix(self) -> np.ndarray:
        """G with rows of integers, int64 [weight_rows, 3]."""
        return np.rint(self._weights_at_points).astype(np.int64)

    @cached_property
    def input_matrix(self) -> np.ndarray:
        """BT, int64 [n, patch]."""
        return np.rint(self._inputs_of_products()).astype(np.int64)

    @cached_property
    def _multiplied(self) -> tuple[np.ndarray, np.ndarray]:
        """AT in integers, and what its rows multiply each output by."""
        divisors = np.rint(self._divisors).astype(np.int64)
        whole = math.lcm(*map(int, divisors))
        matrix = np.rint(self._outputs_of_products()).astype(np.int64) * (whole // divisors)[self.places]
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

    def input_range(self, low: int, high: int) -> tuple[int, int]:
        """Return the least and the largest transformed input, for inputs within low and high."""
        positive = np.maximum(self.input_matrix, 0).sum(axis=1)
        negative = np.maximum(-self.input_matrix, 0).sum(axis=1)
        for _ in range(2):
            lows, highs = low * positive - high * negative, high * positive - low * negative
            low, high = int(lows.min()), int(highs.max())
        return low, high

    def offset(self, data_range: tuple[int, int]) -> int:
        """What is added to the inputs, so that their transforms fit: 0, or what centres them."""
        low, high = self.input_range(*data_range)
        limits = np.iinfo(self.data)
        return 0 if limits.min <= low and high <= limits.max else -(sum(data_range) + 1) // 2


def _polynomial(roots: Sequence[float]) -> np.ndarray:
    """Coefficients, lowest power first, of the product of (x - root)."""
    # Roots that come with their negatives first: what cancels then does so to the last bit.
    ordered = sorted(roots, key=lambda root: -root not in roots)
    return np.atleast_1d(np.poly(ordered))[::-1]


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
F2 = Algorithm("F2", (0.0, 1.0, -1.0), 1e-5)
F4 = Algorithm("F4", (0.0, math.sqrt(2), -math.sqrt(2), math.sqrt(0.5), -math.sqrt(0.5)), 1e-4)
S2 = Algorithm("S2", (0.0, 1.0), 1e-5, stride=2)
S4 = Algorithm("S4", (0.0, 1.0, -1.0, 2.0), 1e-4, stride=2)
ALGORITHMS = {algorithm.name: algorithm for algorithm in (F2, F4, S2, S4)}
INTEGER_ALGORITHMS = {
    algorithm.name: algorithm
    for algorithm in (
        IntegerAlgorithm("F2", F2.points, 0.0),
        IntegerAlgorithm("F4", (0.0, 1.0, -1.0, 2.0, -2.0), 0.0),
        IntegerAlgorithm("S2", S2.points, 0.0, stride=2),
        IntegerAlgorithm("S4", S4.points, 0.0, stride=2),
        IntegerAlgorithm("F2 bytes", F2.points, 0.0, data="int8"),
        IntegerAlgorithm("S2 bytes", S2.points, 0.0, stride=2, data="int8"),
    )
}


def fits(algorithm: IntegerAlgorithm, weight: np.ndarray, data_range: tuple[int, int]) -> bool:
    """Whether these weights, OIHW, times inputs within a range are exact by an algorithm."""
    size = np.abs(weight.astype(np.int16))
    largest = max(map(abs, data_range)) * int(size.sum(axis=(1, 2, 3), dtype=np.int64).max())
    if largest >= 1 << algorithm.bits:
        return False
    if algorithm.data == "int16":
        # Of bytes, all do.
        return True
    limits = np.iinfo(algorithm.data)
    offset = algorithm.offset(data_range)
    low, high = algorithm.input_range(*(value + offset for value in data_range))
    # Twice -128 * -128 is more than the 16 bits of two products hold: weights stay within 127.
    if low < limits.min or high > limits.max:
        return False
    # What no weights of this size exceed settles most layers of few bits.
    bound = int(size.max()) * int(np.abs(algorithm.weight_matrix).sum(axis=1).max()) ** 2
    return bound <= limits.max or int(np.abs(transform_weights(weight, algorithm)).max()) <= limits.max


def transform_weights(weight: np.ndarray, algorithm: Algorithm) -> np.ndarray:
    """Return G g GT of OIHW weights, [weight_rows, weight_rows, O, I]: float32 by float64, or int64."""
    g = algorithm.weight_matrix
    # Sums of products of small integers are exact in float64, and BLAS has no integers.
    real = g.astype(np.float64)
    transformed = np.einsum("ik,ockl,jl->ijoc", real, weight.astype(np.float64), real, optimize=True)
    return transformed.astype(np.int64 if g.dtype == np.int64 else np.float32)


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
        [rows][rows][O / block][in_channels / depth][block][depth], without the last axis where depth is 1;
        float32, or the integers that the algorithm computes with. `rows` is its weight_rows.
    """
    transformed = transform_weights(weight, algorithm)
    rows, _, outs, ins = transformed.shape
    blocks = -(-outs // block)
    full = np.zeros((rows, rows, blocks * block, in_channels), transformed.dtype)
    full[:, :, :outs, :ins] = transformed
    split = full.reshape(rows, rows, blocks, block, in_channels // depth, depth).swapaxes(3, 4)
    packed = np.ascontiguousarray(split if depth > 1 else split[..., 0])
    if isinstance(algorithm, IntegerAlgorithm):
        assert np.abs(packed).max(initial=0) <= np.iinfo(algorithm.data).max
        return packed.astype(algorithm.data)
    return packed


def convolution(
    x: np.ndarray, weight: np.ndarray, algorithm: Algorithm, padding: Sequence[int] = (0, 0, 0, 0)
) -> np.ndarray:
    """Convolve NHWC data with OIHW weights of 3 x 3 by the algorithm, in the data's type, at its stride.

    Parameters
    ----------
    padding
        (top, left, bottom, right), filled with zeros.
    """
    m, patch, step = algorithm.m, algorithm.patch, algorithm.m * algorithm.stride
    top, left, bottom, right = padding
    count, height, width = (
        x.shape[0],
        *(
            (size - KERNEL_SIZE) // algorithm.stride + 1
            for size in (x.shape[1] + top + bottom, x.shape[2] + left + right)
        ),
    )
    rows, columns = -(-height // m), -(-width // m)
    below, beyond = algorithm.extent(rows) - x.shape[1] - top, algorithm.extent(columns) - x.shape[2] - left
    padded = np.pad(x, ((0, 0), (top, max(below, 0)), (left, max(beyond, 0)), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (patch, patch), (1, 2))[:, ::step, ::step]
    patches = windows.transpose(4, 5, 0, 1, 2, 3)  # [patch, patch, N, rows, columns, C]
    stage = algorithm.transform_input(list(patches))
    data = np.stack([np.stack(algorithm.transform_input(list(row))) for row in stage])
    transformed = transform_weights(weight, algorithm).astype(x.dtype)
    at_products = transformed[np.ix_(algorithm.places, algorithm.places)]
    products = np.einsum("ijnyxc,ijoc->ijnyxo", data, at_products, optimize=True)
    stage = algorithm.transform_output(list(products))
    outputs = np.stack([np.stack(algorithm.transform_output(list(row))) for row in stage])
    whole = outputs.transpose(2, 3, 0, 4, 1, 5).reshape(count, rows * m, columns * m, -1)
    return whole[:, :height, :width]
