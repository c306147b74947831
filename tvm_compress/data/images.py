"""Images to classify, without labels: an array file or a picture, as the network takes them."""

from pathlib import Path

import numpy as np

from tvm_compress.data.dataset import Normalization
from tvm_compress.errors import DataError


def read_images(
    path: Path, shape: tuple[int, ...], mean: tuple[float, ...], std: tuple[float, ...]
) -> np.ndarray:
    """Read an `.npy`, an `.npz` (its `x`, or its only array) or a picture.

    Parameters
    ----------
    shape
        (N, C, H, W) of the network's input; pictures are scaled to H x W, arrays must fit.
    mean, std
        The network's normalisation, applied to uint8 pixels; float arrays are taken as normalised already.

    Returns
    -------
    float32 [N, C, H, W].

    Raises
    ------
    DataError
        If the file cannot be read or does not fit.
    """
    if not path.is_file():
        raise DataError(f"There is no file {path}.", "Give an .npy, an .npz or a picture.")
    images = _read_array(path) if path.suffix in (".npy", ".npz") else _read_picture(path, shape)
    if images.ndim == 3:
        images = images[None] if images.shape == shape[1:] else images[:, None]
    if images.ndim == 2:
        images = images[None, None]
    if images.ndim != 4 or images.shape[1:] != shape[1:] or not len(images):
        raise DataError(
            f"{path} holds an array of shape {images.shape}, the network takes [N, C, H, W] = [N, "
            + f"{', '.join(map(str, shape[1:]))}].",
            "Bring the images to that shape.",
        )
    if images.dtype == np.uint8:
        return Normalization(mean, std).apply(images)
    if not np.issubdtype(images.dtype, np.floating) or not np.isfinite(images).all():
        raise DataError(f"{path} must hold uint8 pixels or finite floats, not {images.dtype}.")
    return images.astype(np.float32)


def _read_array(path: Path) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            names = loaded.files
            if "x" not in names and len(names) != 1:
                raise DataError(f"{path} holds {', '.join(names)}, but no x.", "Name the images x.")
            return loaded["x" if "x" in names else names[0]]
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def _read_picture(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise DataError(
            f"Reading {path} needs Pillow, which is not installed.", "pip install 'tvm_compress[images]'."
        ) from error
    _, channels, height, width = shape
    if channels not in (1, 3):
        raise DataError(
            f"A picture has 1 or 3 channels, the network takes {channels}.", "Give an .npy instead."
        )
    try:
        with Image.open(path) as image:
            pixels = np.asarray(
                image.convert("L" if channels == 1 else "RGB").resize(
                    (width, height), Image.Resampling.BILINEAR
                )
            )
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path} is no picture that can be read: {error}.") from error
    return pixels[None, None] if channels == 1 else pixels.transpose(2, 0, 1)[None]
