"""Reads images from folders that are named after their classes, or from one folder, without labels."""

from pathlib import Path

import numpy as np

from tvm_compress.data.split import Source
from tvm_compress.errors import DataError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
_PARTS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_MODES = {1: "L", 3: "RGB"}


def read_imagefolder(root: Path, shape: tuple[int, ...], class_names: tuple[str, ...] = ()) -> Source:
    """Read root/CLASS/*.png (or other formats), root/{train,val,test}/CLASS/*.png, or root/*.png unlabelled.

    Parameters
    ----------
    shape
        (C, H, W) that the network takes: images are converted to C channels and must have that size.
    class_names
        The network's; where they hold every folder's name, these decide the labels, else the order of the
        alphabet.

    Returns
    -------
    Source
        uint8 images [N, C, H, W].

    Raises
    ------
    DataError
        If Pillow is missing, a file is no image or has another size, or there are no images.
    """
    if shape[0] not in _MODES:
        raise DataError(f"Image files have 1 or 3 channels, the network takes {shape[0]}.", "Give an .npz.")
    folders = _subfolders(root)
    if (root / "train").is_dir():
        roots = {_PARTS[folder.name]: folder for folder in folders if folder.name in _PARTS}
    else:
        roots = {"train": root}
    found = sorted({folder.name for part in roots.values() for folder in _subfolders(part)})
    if not found and holds_images(root):
        return Source({"train": (_read_images(_image_files(root), shape), None)}, class_names)
    if not found:
        raise DataError(
            f"{root} holds no folders of images.", "Put each class's images in a folder of its name."
        )
    names = class_names if set(found) <= set(class_names) else tuple(found)
    parts = {part: _read_part(folder, shape, names) for part, folder in roots.items()}
    return Source(parts, names)


def holds_images(folder: Path) -> bool:
    """Whether image files stand in a folder itself."""
    return bool(_image_files(folder))


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)


def _read_images(files: list[Path], shape: tuple[int, ...]) -> np.ndarray:
    x = np.empty((len(files), *shape), np.uint8)
    for row, path in enumerate(files):
        x[row] = read_image(path, shape)
    return x


def _read_part(folder: Path, shape: tuple[int, ...], names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    classes = [(one, _image_files(one)) for one in _subfolders(folder)]
    files = [path for _, paths in classes for path in paths]
    if not files:
        raise DataError(f"{folder} holds no images.")
    labels = [names.index(one.name) for one, paths in classes for _ in paths]
    return _read_images(files, shape), np.asarray(labels, np.int64)


def read_image(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read one image file as uint8 [C, H, W]; DataError if it is no image or not of that height and width."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise DataError(
            "Reading image files needs the package Pillow.", "pip install 'tvm_compress[images]'"
        ) from error
    channels, height, width = shape
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert(_MODES[channels]))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} is not a readable image: {error}.") from error
    if pixels.shape[:2] != (height, width):
        raise DataError(
            f"{path} has {pixels.shape[0]} x {pixels.shape[1]} pixels, the network takes {height} x {width}.",
            "Resize the images first.",
        )
    return pixels.reshape(height, width, channels).transpose(2, 0, 1)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
