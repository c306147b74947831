"""Reads images, labelled or not, from a NumPy archive."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from tvm_compress.data.split import Source
from tvm_compress.errors import DataError

_PARTS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


def read_npz(path: Path) -> Source:
    """Read `x` and `y`, or `x_train` and `y_train` and, if there, `validation` (or `val`) and `test`.

    An `x` without its `y` has no labels.

    Raises
    ------
    DataError
        If the file is missing or damaged, or has other keys.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        # numpy leaves a file that is no archive open if it opened it itself.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            for key in archive.files:
                if key in ("x", "y") or key.removeprefix("x_").removeprefix("y_") in _PARTS:
                    arrays[key] = archive[key]
            found = list(archive.files)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is not a readable .npz: {error}.") from error
    parts: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    for name, part in {"": "train", **_PARTS}.items():
        keys = [f"{axis}_{name}" if name else axis for axis in "xy"]
        images, labels = (arrays.get(key) for key in keys)
        if images is None:
            if labels is not None:
                raise DataError(f"{path} holds {keys[1]!r} without its images.")
            continue
        if part in parts:
            raise DataError(f"{path} holds the part {part!r} twice: its keys are {', '.join(found)}.")
        y = None if labels is None else read_labels(labels, f"{path.name}:{keys[1]}")
        parts[part] = (images, y)
    if "train" not in parts:
        raise DataError(
            f"{path} holds {', '.join(found) or 'nothing'}.",
            "It needs x and y, or x_train, y_train, x_test, y_test.",
        )
    return Source(parts)


def read_labels(y: np.ndarray, where: str) -> np.ndarray:
    """Return labels as int64 [N] of integers (or floats that are whole) [N] or [N, 1]."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise DataError(
            f"{where} has the shape {y.shape}; labels must be [N], one class number for each image."
        )
    if y.dtype.kind not in "iuf":
        raise DataError(f"{where} is {y.dtype}; labels must be integers.")
    if y.dtype.kind == "f" and not (np.isfinite(y).all() and (y == np.round(y)).all()):
        raise DataError(f"{where} holds labels that are not whole numbers.")
    return y.astype(np.int64)
