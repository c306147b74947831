"""Reads the binary version of CIFAR-10 (the folder `cifar-10-batches-bin`)."""

from pathlib import Path

import numpy as np

from tvm_compress.data.split import Source
from tvm_compress.errors import DataError

_RECORD = 1 + 3 * 32 * 32


def read_cifar(folder: Path) -> Source:
    """Read data_batch_*.bin, test_batch.bin and batches.meta.txt: uint8 images [N, 3, 32, 32].

    Raises
    ------
    DataError
        If a file is missing, or not a whole number of records of 3,073 bytes.
    """
    batches = sorted(folder.glob("data_batch_*.bin"))
    if not batches:
        raise DataError(f"{folder} holds no data_batch_*.bin.")
    read = [_read_batch(path) for path in batches]
    parts = {"train": (np.concatenate([x for x, _ in read]), np.concatenate([y for _, y in read]))}
    if (folder / "test_batch.bin").is_file():
        parts["test"] = _read_batch(folder / "test_batch.bin")
    return Source(parts, _read_names(folder / "batches.meta.txt"))


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if len(data) == 0 or len(data) % _RECORD:
        raise DataError(f"{path} has {len(data)} bytes, not a multiple of {_RECORD}: it is damaged.")
    records = data.reshape(-1, _RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


def _read_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        return ()
    return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
