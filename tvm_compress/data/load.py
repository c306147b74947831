"""`load_data`: images from whatever stands at a path, labelled and split into train, validation and test."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tvm_compress.data.cifar import read_cifar
from tvm_compress.data.dataset import Normalization, Split
from tvm_compress.data.idx import find_idx, read_idx_part
from tvm_compress.data.imagefolder import holds_images, read_imagefolder
from tvm_compress.data.npz import read_npz
from tvm_compress.data.split import PARTS, Source, split_source
from tvm_compress.errors import DataError
from tvm_compress.model import Model
from tvm_compress.twin import Twin

_LAYOUTS = ("NCHW", "NHWC")


def load_data(
    path: str | Path,
    model: Model,
    seed: int = 0,
    *,
    layout: str | None = None,
    normalization: Normalization | None = None,
    validation: float = 0.1,
    test: float = 0.1,
) -> Split:
    """Load images that fit a model and split them; search and fine-tuning must not touch `.test`.

    Where the source has no labels, the model's own predictions take their place, and `Split.labels` says so.

    Parameters
    ----------
    path
        An .npz (x, y; or x_train, y_train, x_test, y_test; without y it has no labels), a folder of IDX files
        (MNIST, Fashion-MNIST; gzipped or not), of CIFAR-10 binary batches, or of images (CLASS/*.png, or
        {train,val,test}/CLASS/*.png; *.png have no labels), or "sample:NAME".
    model
        Decides which shapes and labels fit, and the normalisation unless one is declared.
    seed
        Decides which images go to which part, where the source does not.
    layout
        "NCHW" or "NHWC" of an .npz; needed only where both would fit the model.
    normalization
        Another one than the model's, such as `Normalization()` for images that are normalised already.
    validation, test
        Shares of the training images, for parts that the source lacks.

    Returns
    -------
    Split
        x is uint8 where the source is.

    Raises
    ------
    DataError
        If the data are missing or damaged, do not fit the model, or only some parts have labels.
    """
    if layout is not None and layout not in _LAYOUTS:
        raise DataError(f"The layout must be NCHW or NHWC, not {layout!r}.")
    source = _read(path, model)
    spec = model.input_spec
    norm = normalization or Normalization(spec.mean, spec.std)
    identity = not any(norm.mean) and all(v == 1 for v in norm.std)
    labelled = _labelled(source, path)
    twin = None if labelled else Twin(model.module)
    parts: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    for name, (x, y) in source.parts.items():
        where = f"{path} ({name})"
        if not len(x):
            raise DataError(f"{where} holds no images.")
        pixels = _pixels(_to_nchw(x, spec.shape[1:], layout, where), where)
        if normalization is None and not identity:
            _check_range(pixels, where)
        if twin is not None:
            y = twin.predict(norm.apply(pixels)).argmax(axis=1)
        assert y is not None
        _check_labels(y, len(x), model, where)
        parts[name] = (pixels, y)
    complete = Source(parts, _class_names(source, model))
    return split_source(complete, seed, norm, validation, test, "data" if labelled else "model")


def _labelled(source: Source, path: str | Path) -> bool:
    found = {name: y is not None for name, (_, y) in source.parts.items()}
    if len(set(found.values())) > 1:
        without = ", ".join(name for name, has in found.items() if not has)
        raise DataError(f"{path} has labels, but not for: {without}.", "Label all of its parts, or none.")
    return all(found.values())


def _read(path: str | Path, model: Model) -> Source:
    text = str(path)
    if text.startswith("sample:"):
        from tvm_compress.samples.load import load_sample_data

        split = load_sample_data(text.removeprefix("sample:"))
        parts = {name: (getattr(split, name).x, getattr(split, name).y) for name in PARTS}
        return Source(parts, split.train.class_names)
    path = Path(path)
    if path.is_file() and path.suffix == ".npz":
        return read_npz(path)
    if not path.is_dir():
        reason = "is not an .npz file or a folder" if path.exists() else "does not exist"
        raise DataError(f"{text} {reason}.", "Give an .npz, a folder of data, or sample:resnet8-fashion.")
    if any(find_idx(path, part) for part in ("train", "t10k")):
        found = {name: read_idx_part(path, part) for name, part in (("train", "train"), ("test", "t10k"))}
        return Source({name: part for name, part in found.items() if part is not None})
    if any(path.glob("data_batch_*.bin")):
        return read_cifar(path)
    if any(child.is_dir() for child in path.iterdir()) or holds_images(path):
        return read_imagefolder(path, model.input_spec.shape[1:], model.class_names)
    raise DataError(
        f"{text} holds no data that are known here.",
        "IDX files, data_batch_*.bin, or a folder for each class.",
    )


def _to_nchw(x: np.ndarray, shape: tuple[int, ...], layout: str | None, where: str) -> np.ndarray:
    """Bring images to NCHW, by the layout that was declared or the only one that fits the model."""
    if x.ndim == 3:
        x = x[:, None] if layout != "NHWC" else x[..., None]
    if x.ndim != 4:
        raise DataError(
            f"{where} holds images of shape {x.shape}, not [N, C, H, W], [N, H, W, C] or [N, H, W]."
        )
    channels, height, width = shape
    fits = {
        "NCHW": x.shape[1:] == (channels, height, width),
        "NHWC": x.shape[1:] == (height, width, channels),
    }
    wanted = [layout] if layout else list(_LAYOUTS)
    fitting = [name for name in wanted if fits[name]]
    if not fitting:
        raise DataError(
            f"{where} holds images of shape {x.shape[1:]}"
            f"{f' in {layout}' if layout else ''}; the model takes {channels} channels of {height} x {width}."
        )
    if len(fitting) > 1 and channels > 1:
        raise DataError(
            f"{where}: images of shape {x.shape[1:]} fit as NCHW and as NHWC.", "Declare the layout."
        )
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if fitting[0] == "NHWC" else x


def _pixels(x: np.ndarray, where: str) -> np.ndarray:
    """Return uint8 or finite float32; other integers become uint8 where they fit."""
    if x.dtype == np.uint8:
        return x
    if x.dtype.kind in "iu":
        if x.min() < 0 or x.max() > 255:
            raise DataError(
                f"{where} holds integers from {x.min()} to {x.max()}; pixels must be within [0, 255]."
            )
        return x.astype(np.uint8)
    if x.dtype.kind != "f":
        raise DataError(f"{where} holds {x.dtype}; images must be integers or floats.")
    if not np.isfinite(x).all():
        raise DataError(f"{where} holds images with NaN or infinite values.")
    return x.astype(np.float32)


def _check_range(x: np.ndarray, where: str) -> None:
    if x.dtype == np.float32 and (x.min() < 0 or x.max() > 1):
        raise DataError(
            f"{where} holds floats from {x.min():g} to {x.max():g}, the model's normalisation is for [0, 1].",
            "Scale the images, store them as uint8, or declare their normalisation.",
        )


def _check_labels(y: np.ndarray, images: int, model: Model, where: str) -> None:
    if images != len(y):
        raise DataError(f"{where} holds {images} images and {len(y)} labels.")
    if y.min() < 0 or y.max() >= model.num_classes:
        raise DataError(
            f"{where} holds labels from {y.min()} to {y.max()}; the model has {model.num_classes} classes.",
            f"Labels must be within [0, {model.num_classes - 1}].",
        )


def _class_names(source: Source, model: Model) -> tuple[str, ...]:
    """Return the model's names, unless these are bare numbers and the source knows better."""
    bare = tuple(str(index) for index in range(model.num_classes))
    if model.class_names == bare and len(source.class_names) == model.num_classes:
        return source.class_names
    return model.class_names
