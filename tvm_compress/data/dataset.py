"""Labelled images in memory: `Dataset`, its `Normalization`, and the `Split` that search and test see."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tvm_compress.errors import DataError


@dataclass(frozen=True)
class Normalization:
    """What is done to pixels before the network sees them: `(x - mean) / std`, x being in [0, 1].

    Attributes
    ----------
    mean, std
        One value for each channel, or one for all. The defaults leave x as it is.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise DataError(f"A normalisation has {len(self.mean)} means and {len(self.std)} deviations.")
        if not np.all(np.isfinite(self.mean)) or not np.all(np.isfinite(self.std)) or min(self.std) <= 0:
            raise DataError(f"A normalisation's values are not usable: mean {self.mean}, std {self.std}.")

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Return float32 NCHW of uint8 (divided by 255 first) or float32 NCHW images.

        Raises
        ------
        DataError
            If the number of channels is not that of the normalisation.
        """
        if len(self.mean) not in (1, x.shape[1]):
            raise DataError(
                f"The normalisation is of {len(self.mean)} channels, the images have {x.shape[1]}."
            )
        mean, std = (np.asarray(v, np.float32).reshape(1, -1, 1, 1) for v in (self.mean, self.std))
        unit = x.astype(np.float32)
        if x.dtype == np.uint8:
            unit /= np.float32(255.0)
        unit -= mean
        unit /= std
        return unit


@dataclass(frozen=True)
class Dataset:
    """Images with their labels.

    Attributes
    ----------
    x
        [N, C, H, W], uint8 in [0, 255] or float32 (in [0, 1] unless the normalisation says otherwise).
    y
        int64 [N], each within [0, len(class_names)).
    class_names
        One name for each label.
    normalization
        What `normalized` does.
    """

    x: np.ndarray
    y: np.ndarray
    class_names: tuple[str, ...]
    normalization: Normalization = field(default_factory=Normalization)

    def __post_init__(self) -> None:
        if self.x.ndim != 4 or self.x.dtype not in (np.dtype(np.uint8), np.dtype(np.float32)):
            raise DataError(
                f"Images must be uint8 or float32 [N, C, H, W], not {self.x.dtype} {self.x.shape}."
            )
        if self.y.ndim != 1 or self.y.dtype != np.int64:
            raise DataError(f"Labels must be int64 [N], not {self.y.dtype} {self.y.shape}.")
        if len(self.x) != len(self.y):
            raise DataError(f"There are {len(self.x)} images and {len(self.y)} labels.")
        if len(self.y) and not (self.y.min() >= 0 and self.y.max() < len(self.class_names)):
            raise DataError(
                f"Labels reach from {self.y.min()} to {self.y.max()}, "
                f"but there are {len(self.class_names)} classes."
            )
        if self.x.dtype == np.float32 and not np.isfinite(self.x).all():
            raise DataError("The images hold NaN or infinite values.")

    def __len__(self) -> int:
        return len(self.y)

    def normalized(self, indices: Sequence[int] | np.ndarray | slice | None = None) -> np.ndarray:
        """Return the images (or those at `indices`) as the network takes them: float32 [n, C, H, W]."""
        return self.normalization.apply(self.x if indices is None else self.x[indices])

    def take(self, indices: Sequence[int] | np.ndarray | slice) -> "Dataset":
        """Return the images at `indices`, in that order."""
        return replace(self, x=self.x[indices], y=self.y[indices])

    def joined(self, other: "Dataset") -> "Dataset":
        """Return these images and then the other's, which are of the same source."""
        return replace(self, x=np.concatenate([self.x, other.x]), y=np.concatenate([self.y, other.y]))

    def subset(self, n: int, rng: np.random.Generator) -> "Dataset":
        """Return n images, stratified: each class keeps its share to within one image.

        All the images, in order, if there are no more than n.
        """
        if n >= len(self):
            return self
        return self.take(stratified_indices(self.y, n, rng))


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of one source; search and fine-tuning see `train` and `validation` only.

    Attributes
    ----------
    labels
        "data", or "model" where the source had none: then they are the dense model's own predictions, and an
        accuracy says how far a network agrees with it.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    labels: str = "data"


def stratified_indices(y: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Choose n of the indices of y, ascending, so that each class keeps its share to within one image.

    Shares are rounded by the largest remainder, ties going to the lower label.
    """
    if not 0 <= n <= len(y):
        raise DataError(f"{n} images were asked for out of {len(y)}.")
    labels, counts = np.unique(y, return_counts=True)
    exact = counts * (n / max(len(y), 1))
    quota = np.floor(exact).astype(int)
    for position in np.argsort(-(exact - quota), kind="stable")[: n - quota.sum()]:
        quota[position] += 1
    chosen = [
        rng.permutation(np.flatnonzero(y == label))[:count]
        for label, count in zip(labels, quota, strict=True)
    ]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)
