"""Reading labelled images, splitting them, and refusing what does not fit."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from tvm_compress.data.dataset import Dataset, Normalization, stratified_indices
from tvm_compress.data.load import load_data
from tvm_compress.data.split import Source, split_source
from tvm_compress.errors import DataError
from tvm_compress.model import Model
from tvm_compress.twin import Twin

RNG = np.random.default_rng


def tiny_model(channels: int = 1, size: int = 6, classes: int = 3, **kwargs) -> Model:
    network = nn.Sequential(
        nn.Conv2d(channels, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * (size - 2) ** 2, classes)
    )
    return Model.from_torch(network, (torch.zeros(1, channels, size, size),), **kwargs)


@pytest.fixture(scope="module")
def gray() -> Model:
    return tiny_model(mean=(0.5,), std=(0.25,))


@pytest.fixture(scope="module")
def color() -> Model:
    return tiny_model(3, 32, 10)


def images(
    n: int = 60, shape: tuple[int, ...] = (1, 6, 6), classes: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Images that are all different, so that a split can be followed image by image."""
    x = RNG(0).integers(0, 256, (n, *shape), np.uint8)
    x.reshape(n, -1)[:, 0], x.reshape(n, -1)[:, 1] = np.arange(n) // 256, np.arange(n) % 256
    return x, np.arange(n) % classes


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, allow_pickle=True, **arrays)
    return path


def keys(dataset: Dataset) -> set[bytes]:
    return {image.tobytes() for image in dataset.x}


def write_idx(path: Path, values: np.ndarray) -> None:
    data = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


# Datasets and splits


@settings(deadline=None, max_examples=40)
@given(
    y=st.lists(st.integers(0, 4), min_size=1, max_size=80),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_stratified_indices_keep_every_share_to_within_one(y: list[int], share: float, seed: int) -> None:
    labels = np.asarray(y, np.int64)
    n = int(share * len(labels))
    chosen = stratified_indices(labels, n, RNG(seed))
    assert len(chosen) == len(set(chosen.tolist())) == n
    assert (np.diff(chosen) > 0).all()
    for label in np.unique(labels):
        exact = (labels == label).sum() * n / len(labels)
        assert abs((labels[chosen] == label).sum() - exact) < 1 + 1e-9


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(8, 200),
    classes=st.integers(1, 5),
    shares=st.tuples(st.floats(0.15, 0.4), st.floats(0.15, 0.4)),
    seed=st.integers(0, 2**31),
    has_test=st.booleans(),
)
def test_split_never_mixes(
    n: int, classes: int, shares: tuple[float, float], seed: int, has_test: bool
) -> None:
    x, y = images(n, classes=classes)
    parts = {"train": (x, y)}
    if has_test:
        parts["test"] = (255 - x[:5], y[:5])
    source = Source(parts, tuple(map(str, range(classes))))
    split = split_source(source, seed, Normalization(), *shares)
    train, validation, test = keys(split.train), keys(split.validation), keys(split.test)
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert len(split.train) + len(split.validation) + len(split.test) == n + 5 * has_test
    if has_test:
        assert test == keys(Dataset(255 - x[:5], y[:5], source.class_names))
        assert train | validation == keys(Dataset(x, y, source.class_names))
    again = split_source(source, seed, Normalization(), *shares)
    np.testing.assert_array_equal(split.validation.x, again.validation.x)


def test_seeds_split_differently() -> None:
    source = Source({"train": images(200)}, ("a", "b", "c"))
    first, second = (split_source(source, seed, Normalization()) for seed in (0, 1))
    assert keys(first.test) != keys(second.test)


def test_normalized_scales_and_normalizes() -> None:
    x, y = images(4, (3, 2, 2))
    data = Dataset(x, y, ("a", "b", "c"), Normalization((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    expected = (x / 255 - np.reshape([0.1, 0.2, 0.3], (1, 3, 1, 1))) / np.reshape(
        [0.5, 0.6, 0.7], (1, 3, 1, 1)
    )
    np.testing.assert_allclose(data.normalized(), expected, atol=1e-6)
    np.testing.assert_array_equal(data.normalized([2, 0]), data.normalized()[[2, 0]])
    assert data.normalized(slice(0, 0)).shape == (0, 3, 2, 2)
    assert data.normalized().dtype == np.float32
    assert data.x.dtype == np.uint8


def test_subset_is_stratified_and_repeats() -> None:
    data = Dataset(*images(90), ("a", "b", "c"))
    part = data.subset(30, RNG(3))
    assert np.bincount(part.y).tolist() == [10, 10, 10]
    np.testing.assert_array_equal(part.x, data.subset(30, RNG(3)).x)
    assert data.subset(1000, RNG(0)) is data


def test_joined_has_both_in_order() -> None:
    x, y = images()
    data = Dataset(x, y, ("a", "b", "c"))
    both = data.take(slice(0, 20)).joined(data.take(slice(30, 60)))
    np.testing.assert_array_equal(both.x, np.concatenate([x[:20], x[30:]]))
    np.testing.assert_array_equal(both.y, np.concatenate([y[:20], y[30:]]))


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.0,), (0.0,)), ((0.0,), (-1.0,)), ((0.0, 0.1), (1.0,)), ((np.nan,), (1.0,)), ((), ())],
)
def test_normalization_refuses(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(DataError):
        Normalization(mean, std)


def test_normalization_of_other_channels() -> None:
    with pytest.raises(DataError, match="2 channels, the images have 1"):
        Normalization((0.0, 0.0), (1.0, 1.0)).apply(np.zeros((1, 1, 2, 2), np.uint8))


# npz


def test_npz_with_one_part_is_split(tmp_path: Path, gray: Model) -> None:
    x, y = images(100)
    split = load_data(save(tmp_path / "d.npz", x=x, y=y), gray, seed=1)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [80, 10, 10]
    assert split.train.x.dtype == np.uint8
    assert split.train.normalization == Normalization((0.5,), (0.25,))
    assert split.train.class_names == gray.class_names


def test_npz_keeps_its_own_test_part(tmp_path: Path, gray: Model) -> None:
    x, y = images(60)
    path = save(tmp_path / "d.npz", x_train=x[:50], y_train=y[:50], x_test=x[50:], y_test=y[50:])
    split = load_data(path, gray)
    np.testing.assert_array_equal(split.test.x, x[50:])
    assert keys(split.train) | keys(split.validation) == keys(Dataset(x[:50], y[:50], ("a", "b", "c")))


@pytest.mark.parametrize("declared", [None, "NHWC"])
def test_nhwc_is_brought_to_nchw(tmp_path: Path, color: Model, declared: str | None) -> None:
    x, y = images(30, (3, 32, 32), 10)
    path = save(tmp_path / "d.npz", x=x.transpose(0, 2, 3, 1), y=y)
    split = load_data(path, color, layout=declared)
    assert keys(split.train) <= {image.tobytes() for image in x}


def test_ambiguous_layout_must_be_declared(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(18, 3))
    model = Model.from_torch(network, (torch.zeros(1, 3, 3, 3),))
    path = save(tmp_path / "d.npz", **dict(zip("xy", images(30, (3, 3, 3)), strict=True)))
    with pytest.raises(DataError, match="Declare the layout"):
        load_data(path, model)
    assert load_data(path, model, layout="NCHW").train.x.shape == (24, 3, 3, 3)


def test_images_without_channels_axis(tmp_path: Path, gray: Model) -> None:
    x, y = images(30)
    assert load_data(save(tmp_path / "d.npz", x=x[:, 0], y=y), gray).train.x.shape == (24, 1, 6, 6)


def test_declared_normalization_wins(tmp_path: Path, gray: Model) -> None:
    x, y = images(30)
    floats = (x.astype(np.float64) / 255 - 0.5) / 0.25
    path = save(tmp_path / "d.npz", x=floats, y=y)
    with pytest.raises(DataError, match=r"normalisation is for \[0, 1\]"):
        load_data(path, gray)
    split = load_data(path, gray, normalization=Normalization())
    np.testing.assert_array_equal(split.train.normalized(), split.train.x)
    assert split.train.x.dtype == np.float32


def test_without_labels_the_model_gives_them(tmp_path: Path, gray: Model) -> None:
    x, y = images(40)
    labelled = load_data(save(tmp_path / "l.npz", x=x, y=y), gray)
    assert labelled.labels == "data"
    for path in (save(tmp_path / "u.npz", x=x), tmp_path / "folder"):
        if path.suffix != ".npz":
            path.mkdir()
            for index, image in enumerate(x):
                Image.fromarray(image[0]).save(path / f"{index:02d}.png")
        split = load_data(path, gray)
        assert split.labels == "model"
        assert len(split.train) == len(labelled.train)
        for part in (split.train, split.validation, split.test):
            own = Twin(gray.module).predict(part.normalized()).argmax(axis=1)
            np.testing.assert_array_equal(part.y, own)


def test_labels_for_all_parts_or_none(tmp_path: Path, gray: Model) -> None:
    x, y = images(40)
    path = save(tmp_path / "d.npz", x_train=x, y_train=y, x_test=x)
    with pytest.raises(DataError, match="has labels, but not for: test"):
        load_data(path, gray)


def bad_npz() -> dict[str, tuple[dict[str, np.ndarray], str]]:
    x, y = images(30)
    floats = x.astype(np.float32) / 255
    with_nan = floats.copy()
    with_nan[3, 0, 2, 2] = np.nan
    return {
        "more labels than classes": ({"x": x, "y": y + 1}, "labels from 1 to 3; the model has 3 classes"),
        "negative labels": ({"x": x, "y": y - 1}, "labels from -1"),
        "counts": ({"x": x, "y": y[:-1]}, "30 images and 29 labels"),
        "empty": ({"x": x[:0], "y": y[:0]}, "no images"),
        "size": ({"x": x[:, :, :5], "y": y}, "takes 1 channels of 6 x 6"),
        "NaN": ({"x": with_nan, "y": y}, "NaN"),
        "keys": ({"data": x, "y": y}, "'y' without its images"),
        "nothing known": ({"data": x}, "It needs x and y"),
        "one-hot": ({"x": x, "y": np.eye(3)[y]}, "one class number for each image"),
        "broken labels": ({"x": x, "y": y + 0.5}, "not whole numbers"),
        "text": ({"x": x, "y": y.astype(str)}, "must be integers"),
        "range": ({"x": x.astype(np.int32) - 1, "y": y}, r"within \[0, 255\]"),
        "complex": ({"x": x.astype(np.complex64), "y": y}, "integers or floats"),
        "rank": ({"x": x.reshape(30, -1), "y": y}, "not .N, C, H, W"),
        "too few": ({"x": x[:2], "y": y[:2]}, "none is left"),
    }


@pytest.mark.parametrize("case", bad_npz())
def test_bad_npz(tmp_path: Path, gray: Model, case: str) -> None:
    arrays, message = bad_npz()[case]
    with pytest.raises(DataError, match=message):
        load_data(save(tmp_path / "d.npz", **arrays), gray)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "bit"])
def test_damaged_npz(tmp_path: Path, gray: Model, damage: str) -> None:
    path = save(tmp_path / "d.npz", **dict(zip("xy", images(200), strict=True)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(
        {"truncated": bytes(data[: len(data) // 2]), "garbage": b"no archive", "bit": bytes(data)}[damage]
    )
    with pytest.raises(DataError, match="not a readable"):
        load_data(path, gray)


def test_pickled_npz_is_refused(tmp_path: Path, gray: Model) -> None:
    path = save(tmp_path / "d.npz", x=np.array([{"a": 1}], object), y=np.zeros(1, int))
    with pytest.raises(DataError, match="not a readable"):
        load_data(path, gray)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_share_outside_its_range(tmp_path: Path, gray: Model, share: float) -> None:
    path = save(tmp_path / "d.npz", **dict(zip("xy", images(), strict=True)))
    with pytest.raises(DataError, match="share of test"):
        load_data(path, gray, test=share)


# IDX


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder(tmp_path: Path, gray: Model, suffix: str) -> None:
    x, y = images(60)
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", x[:50, 0])
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", y[:50].astype(np.uint8))
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", x[50:, 0])
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", y[50:].astype(np.uint8))
    split = load_data(tmp_path, gray)
    np.testing.assert_array_equal(split.test.x, x[50:])
    np.testing.assert_array_equal(split.test.y, y[50:])
    assert len(split.train) + len(split.validation) == 50


def test_damaged_idx(tmp_path: Path, gray: Model) -> None:
    x, y = images(20)
    write_idx(tmp_path / "train-labels-idx1-ubyte", y.astype(np.uint8))
    with pytest.raises(DataError, match="but not the images"):
        load_data(tmp_path, gray)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(path, x[:, 0])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        load_data(tmp_path, gray)
    path.unlink()
    path = tmp_path / "train-images-idx3-ubyte"
    write_idx(path, x[:, 0])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="announces"):
        load_data(tmp_path, gray)
    path.write_bytes(b"\0\0\x0d\3" + bytes(20))
    with pytest.raises(DataError, match="not an IDX file"):
        load_data(tmp_path, gray)
    path.write_bytes(b"\0\0\x08\3\0")
    with pytest.raises(DataError, match="header"):
        load_data(tmp_path, gray)
    write_idx(path, x[:-1, 0])
    with pytest.raises(DataError, match=r"19, 6, 6.*20"):
        load_data(tmp_path, gray)


# CIFAR-10


def write_cifar(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    path.write_bytes(np.concatenate([y[:, None].astype(np.uint8), x.reshape(len(x), -1)], axis=1).tobytes())


def test_cifar_folder(tmp_path: Path, color: Model) -> None:
    x, y = images(50, (3, 32, 32), 10)
    write_cifar(tmp_path / "data_batch_1.bin", x[:20], y[:20])
    write_cifar(tmp_path / "data_batch_2.bin", x[20:40], y[20:40])
    write_cifar(tmp_path / "test_batch.bin", x[40:], y[40:])
    names = [f"class {index}" for index in range(10)]
    (tmp_path / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    split = load_data(tmp_path, color)
    np.testing.assert_array_equal(split.test.x, x[40:])
    np.testing.assert_array_equal(split.test.y, y[40:])
    assert split.train.class_names == tuple(names)
    (tmp_path / "data_batch_2.bin").write_bytes(b"\1" * 3000)
    with pytest.raises(DataError, match=r"data_batch_2\.bin has 3000 bytes"):
        load_data(tmp_path, color)


# ImageFolder


def write_folder(root: Path, names: tuple[str, ...], count: int, shape: tuple[int, ...] = (6, 6)) -> None:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.full(shape, 10 * label, np.uint8)
            pixels[0, 0] = index
            Image.fromarray(pixels).save(root / name / f"{index}.png")


def test_image_folder(tmp_path: Path, gray: Model) -> None:
    write_folder(tmp_path, ("ant", "bee", "cow"), 10)
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    split = load_data(tmp_path, gray)
    assert split.train.class_names == ("ant", "bee", "cow")
    np.testing.assert_array_equal(split.train.x[:, 0, 1, 1], 10 * split.train.y)
    assert len(split.train) == 24


def test_image_folder_with_parts_and_color(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", ("ant", "bee", "cow"), 5, (6, 6, 3))
    write_folder(tmp_path / "val", ("ant", "bee", "cow"), 2, (6, 6, 3))
    write_folder(tmp_path / "test", ("bee",), 3, (6, 6, 3))
    # The network's names decide the labels.
    split = load_data(tmp_path, tiny_model(3, class_names=("cow", "ant", "bee")))
    assert (len(split.train), len(split.validation), len(split.test)) == (15, 6, 3)
    assert split.test.y.tolist() == [2, 2, 2]
    assert split.train.x.shape == (15, 3, 6, 6)


def test_bad_image_folders(tmp_path: Path, gray: Model) -> None:
    write_folder(tmp_path / "classes", ("a", "b", "c", "d"), 3)
    with pytest.raises(DataError, match="labels from 0 to 3; the model has 3 classes"):
        load_data(tmp_path / "classes", gray)
    write_folder(tmp_path / "size", ("a", "b"), 3, (6, 5))
    with pytest.raises(DataError, match=r"0\.png has 6 x 5 pixels"):
        load_data(tmp_path / "size", gray)
    (tmp_path / "none" / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no images"):
        load_data(tmp_path / "none", gray)
    (tmp_path / "none" / "a" / "x.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"x\.png is not a readable image"):
        load_data(tmp_path / "none", gray)


# Anything else


def test_nothing_known(tmp_path: Path, gray: Model) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_data(tmp_path / "none", gray)
    with pytest.raises(DataError, match="no data that are known"):
        load_data(tmp_path, gray)
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"not an \.npz file or a folder"):
        load_data(tmp_path / "x.csv", gray)
    with pytest.raises(DataError, match="layout must be"):
        load_data(tmp_path, gray, layout="CHW")
