"""Groups of weights that go to zero together: shapes that a site's weight is cut into.

A weight is seen as a matrix: a row per output channel, whose columns are the rest in its layout's order
(I, KH, KW of a convolution; the input features of a dense layer). Every shape is then a tiling of the matrix:
`element` 1 x 1; `simd-N` N x 1, neighbours along the output channels, which the float kernels' vectors hold;
`filter` one whole row; `block-MxN` M rows by N columns. Tiles at the edges are smaller.
"""

from collections.abc import Sequence

import numpy as np

from tvm_compress.errors import PolicyError
from tvm_compress.passes.policy import GROUP


def tile_of(group: str, shape: Sequence[int]) -> tuple[int, int]:
    """Give rows and columns of a group in a weight of this shape.

    Raises
    ------
    PolicyError
        On an unknown shape, and on "channel", which is a coupled set's and no tile of one weight.
    """
    if group == "channel" or not GROUP.fullmatch(group):
        raise PolicyError(
            f"A weight has no groups of shape {group!r}.", "Use element, simd-N, filter or block-MxN."
        )
    columns = int(np.prod(shape[1:]))
    if group == "element":
        return 1, 1
    if group == "filter":
        return 1, columns
    numbers = [int(part) for part in group.split("-")[1].split("x")]
    rows, wide = numbers if len(numbers) == 2 else (numbers[0], 1)
    return min(rows, shape[0]), min(wide, columns)


def reduce_tiles(values: np.ndarray, group: str, by: np.ufunc = np.maximum) -> np.ndarray:
    """Reduce values of a weight's shape to one per group, [tiles down, tiles across]."""
    rows, columns = tile_of(group, values.shape)
    matrix = values.reshape(values.shape[0], -1)
    if columns > 1:
        matrix = by.reduceat(matrix, np.arange(0, matrix.shape[1], columns), axis=1)
    if rows > 1:
        matrix = by.reduceat(matrix, np.arange(0, matrix.shape[0], rows), axis=0)
    return matrix


def spread_tiles(tiles: np.ndarray, group: str, shape: Sequence[int]) -> np.ndarray:
    """Give each weight its group's value: the inverse of `reduce_tiles`."""
    rows, columns = tile_of(group, shape)
    matrix = np.repeat(np.repeat(tiles, rows, axis=0), columns, axis=1)
    return matrix[: shape[0], : int(np.prod(shape[1:]))].reshape(shape)


def tile_sizes(group: str, shape: Sequence[int]) -> np.ndarray:
    """Give the number of weights in each group, int64 [tiles down, tiles across]."""
    rows, columns = tile_of(group, shape)
    wide = int(np.prod(shape[1:]))
    down = np.minimum(rows, shape[0] - np.arange(0, shape[0], rows))
    across = np.minimum(columns, wide - np.arange(0, wide, columns))
    return np.outer(down, across)
