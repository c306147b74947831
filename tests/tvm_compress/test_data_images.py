from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tvm_compress.data.images import read_images
from tvm_compress.errors import DataError

GREY = (1, 1, 4, 6)
MEAN, STD = (0.5,), (0.25,)


def test_arrays_and_pictures_agree(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    np.save(tmp_path / "p.npy", pixels)
    np.savez(tmp_path / "p.npz", x=pixels[None], y=[1])
    expected = ((pixels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.25))[
        None, None
    ]
    for name in ("p.png", "p.npy", "p.npz"):
        np.testing.assert_allclose(read_images(tmp_path / name, GREY, MEAN, STD), expected, rtol=1e-6)


def test_floats_are_taken_as_they_are(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3, 1, 4, 6))
    np.save(tmp_path / "x.npy", x)
    np.testing.assert_array_equal(read_images(tmp_path / "x.npy", GREY, MEAN, STD), x.astype(np.float32))


def test_colour_pictures_are_scaled(tmp_path: Path) -> None:
    Image.new("RGB", (13, 9), (255, 0, 0)).save(tmp_path / "red.png")
    image = read_images(tmp_path / "red.png", (1, 3, 4, 6), (0.0,), (1.0,))
    assert image.shape == (1, 3, 4, 6)
    np.testing.assert_array_equal(image[0, :, 0, 0], [1, 0, 0])


@pytest.mark.parametrize("content", [b"", b"nonsense"])
@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.png"])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        read_images(tmp_path / name, GREY, MEAN, STD)


def test_what_does_not_fit(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 5, 5), np.uint8))
    with pytest.raises(DataError, match="5, 5"):
        read_images(tmp_path / "x.npy", GREY, MEAN, STD)
    np.save(tmp_path / "n.npy", np.full((1, 1, 4, 6), np.nan))
    with pytest.raises(DataError, match="finite"):
        read_images(tmp_path / "n.npy", GREY, MEAN, STD)
    np.savez(tmp_path / "two.npz", a=np.zeros(1), b=np.zeros(1))
    with pytest.raises(DataError, match="a, b"):
        read_images(tmp_path / "two.npz", GREY, MEAN, STD)
    with pytest.raises(DataError, match="missing"):
        read_images(tmp_path / "missing.npy", GREY, MEAN, STD)
