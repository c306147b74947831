"""Reads the IDX files of MNIST and Fashion-MNIST, gzipped or not."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from tvm_compress.errors import DataError

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path) -> np.ndarray:
    """Read one IDX file of unsigned bytes (magic 00 00 08 rank, big-endian extents, then the data).

    Raises
    ------
    DataError
        If the file is missing, not IDX, of another type, or shorter or longer than it says.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UNSIGNED_BYTE:
        raise DataError(f"{path} is not an IDX file of unsigned bytes.")
    start = 4 + 4 * data[3]
    if len(data) < start:
        raise DataError(f"{path} ends within its header.")
    shape = struct.unpack(f">{data[3]}I", data[4:start])
    if len(data) - start != int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{path} announces {shape} values but holds {len(data) - start}.")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def find_idx(folder: Path, part: str) -> tuple[Path, Path] | None:
    """Find the images and labels of `part` ("train" or "t10k"), or None if the folder has neither.

    Raises
    ------
    DataError
        If only one of the two stands there.
    """
    found = []
    for what in ("images-idx3", "labels-idx1"):
        names = [f"{part}-{what}-ubyte", f"{part}-{what.replace('-idx', '.idx')}-ubyte"]
        paths = [folder / (name + suffix) for name in names for suffix in ("", ".gz")]
        found.append(next((path for path in paths if path.is_file()), None))
    images, labels = found
    if images is None and labels is None:
        return None
    if images is None or labels is None:
        raise DataError(f"{folder} holds {images or labels}, but not the {'labels' if images else 'images'}.")
    return images, labels


def read_idx_part(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Read uint8 images [N, 1, H, W] and int64 labels [N] of one part, or None where the folder lacks it."""
    paths = find_idx(folder, part)
    if paths is None:
        return None
    images, labels = read_idx(paths[0]), read_idx(paths[1])
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(f"{paths[0].name} holds {images.shape} values and {paths[1].name} {labels.shape}.")
    return images[:, None], labels.astype(np.int64)
