"""Gradient and Gauss-Newton diagonal against brute force: Jacobians of every logit of every image."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.passes.torch_networks import Example, example
from tvm_compress.errors import DataError, ModelError, SettingError
from tvm_compress.fastlc import square_sums
from tvm_compress.fastlc.curvature import Curvature, estimate_curvature, model_fingerprint
from tvm_compress.passes.params import get_params, set_params
from tvm_compress.twin import Twin
from tvm_compress.twin.program import Node, TensorInfo


class Mixed(nn.Module):
    """Every kind of site: strides, uneven padding, groups, depthwise, dilation, residual, dense."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.grouped = nn.Conv2d(4, 6, (1, 3), padding=(0, 1), groups=2)
        self.dilated = nn.Conv2d(6, 4, 2, dilation=2)
        self.fc1 = nn.Linear(16, 5)
        self.fc2 = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.depthwise(x))
        x = torch.relu(self.dilated(self.grouped(x)))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


@pytest.fixture(scope="module")
def mixed() -> Example:
    return example(Mixed())


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(7, 3, 8, 8)).astype(np.float32)


def brute_force(made: Example, x: np.ndarray) -> dict[str, np.ndarray]:
    """Diagonal of the mean of Jᵀ (diag(p) - p pᵀ) J, by site, from whole Jacobians."""
    twin = Twin(made.module)
    result: dict[str, np.ndarray] = {}
    for name in twin.sites:
        weight = twin.tensors[f"{name}.weight"]
        total = torch.zeros(weight.shape)
        for image in torch.from_numpy(x):
            logits = twin(image[None])[0]
            p = logits.detach().softmax(0)
            rows = torch.stack([torch.autograd.grad(z, weight, retain_graph=True)[0] for z in logits])
            flat = rows.reshape(len(p), -1)
            matrix = torch.diag(p) - torch.outer(p, p)
            total += torch.einsum("ck,cd,dk->k", flat, matrix, flat).reshape(weight.shape)
        result[name] = (total / len(x)).numpy()
    return result


def test_exact_diagonal_is_that_of_whole_jacobians(mixed: Example, images: np.ndarray) -> None:
    expected = brute_force(mixed, images)
    found = estimate_curvature(mixed.module, images, np.zeros(7, np.int64), chunk=3)
    assert list(found.diagonal) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found.diagonal[name], value, rtol=1e-3, atol=1e-5 * value.max())
        assert found.diagonal[name].max() > 0


@pytest.mark.parametrize("way", ["_by_pairs_of_places", "_by_images"])
def test_both_ways_give_the_same(
    mixed: Example, images: np.ndarray, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = estimate_curvature(mixed.module, images)
    for name in ("_by_pairs_of_places", "_by_images"):
        monkeypatch.setattr(square_sums, name, getattr(square_sums, way))
    found = estimate_curvature(mixed.module, images)
    for name, value in expected.diagonal.items():
        np.testing.assert_allclose(found.diagonal[name], value, rtol=1e-3, atol=1e-6 * value.max())


def test_gradient_and_its_labels(mixed: Example, images: np.ndarray) -> None:
    twin = Twin(mixed.module)
    y = np.arange(7) % 3
    found = estimate_curvature(mixed.module, images, y)
    for name, value in found.gradient.items():
        np.testing.assert_allclose(value, twin.gradients(images, y)[f"{name}.weight"], rtol=1e-5)
    own = estimate_curvature(mixed.module, images)
    assert (found.labels, own.labels) == ("data", "model")
    predicted = twin.gradients(images, twin.predict(images).argmax(1))
    np.testing.assert_allclose(own.gradient["fc2"], predicted["fc2.weight"], rtol=1e-5)


def test_chunks_change_nothing(mixed: Example, images: np.ndarray) -> None:
    one = estimate_curvature(mixed.module, images, chunk=1)
    all_at_once = estimate_curvature(mixed.module, images, chunk=100)
    for name, value in one.diagonal.items():
        np.testing.assert_allclose(value, all_at_once.diagonal[name], rtol=1e-4, atol=1e-6 * value.max())


def test_drawn_labels_estimate_the_exact_diagonal(mixed: Example, images: np.ndarray) -> None:
    exact = estimate_curvature(mixed.module, images)
    few = estimate_curvature(mixed.module, images, draws=2, seed=3)
    many = estimate_curvature(mixed.module, images, draws=2000, seed=3)
    assert many.draws == 2000

    def error(found: Curvature) -> float:
        return sum(float(np.abs(found.diagonal[n] - v).sum()) for n, v in exact.diagonal.items())

    total = sum(float(value.sum()) for value in exact.diagonal.values())
    assert error(many) < 0.06 * total < error(few)
    again = estimate_curvature(mixed.module, images, draws=2, seed=3)
    np.testing.assert_array_equal(again.diagonal["fc1"], few.diagonal["fc1"])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(0, 10**6))
def test_dense_is_the_product_of_squares(count: int, kinds: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator)
    slopes = torch.randn(kinds, count, 3, generator=generator)
    node = Node(
        "relax.matmul",
        (0, 1),
        (),
        2,
        None,
        (None, TensorInfo((width, 3), "float32")),
        None,
        "fc",
        True,
    )
    expected = torch.einsum("sno,ni->oi", slopes**2, x**2)
    torch.testing.assert_close(square_sums.sum_of_squares(node, x, slopes), expected)


def test_saved_and_loaded(mixed: Example, images: np.ndarray, tmp_path: Path) -> None:
    found = estimate_curvature(mixed.module, images, draws=1)
    path = tmp_path / "c.safetensors"
    found.save(path)
    loaded = Curvature.load(path)
    assert (loaded.model, loaded.images, loaded.draws, loaded.labels) == (found.model, 7, 1, "model")
    for name, value in found.diagonal.items():
        np.testing.assert_array_equal(loaded.diagonal[name], value)
        np.testing.assert_array_equal(loaded.gradient[name], found.gradient[name])
    loaded.check(mixed.module)
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_curvature_of_another_model(mixed: Example, images: np.ndarray, sequential_module) -> None:
    found = estimate_curvature(mixed.module, images, draws=1)
    with pytest.raises(ModelError, match="another model"):
        found.check(sequential_module)
    # The same network with one weight changed is another model too.
    value = get_params(mixed.module)["fc1.weight"]
    value[0, 0] += 1e-3
    other = set_params(mixed.module, {"fc1.weight": value})
    assert model_fingerprint(other) != model_fingerprint(mixed.module)
    with pytest.raises(ModelError, match="another model"):
        found.check(other)


@pytest.fixture(scope="module")
def sequential_module():
    from tests.passes.torch_networks import Sequential

    return example(Sequential()).module


def test_bad_input(mixed: Example, images: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        estimate_curvature(mixed.module, images[:0])
    with pytest.raises(SettingError, match="draws"):
        estimate_curvature(mixed.module, images, draws=-1)
    with pytest.raises(DataError, match="nothing"):
        Curvature.load(tmp_path / "nothing")
    (tmp_path / "bad").write_bytes(b"no tensors here")
    with pytest.raises(DataError, match="cannot be read"):
        Curvature.load(tmp_path / "bad")
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, tmp_path / "foreign")
    with pytest.raises(DataError, match="not a curvature file"):
        Curvature.load(tmp_path / "foreign")


def test_zero_gradients_are_an_error(mixed: Example, images: np.ndarray) -> None:
    dead = set_params(mixed.module, {"fc2.weight": np.zeros((3, 5), np.float32)})
    saturated = set_params(dead, {"fc2.bias": np.array([1e4, 0, 0], np.float32)})
    with pytest.raises(DataError, match="zero everywhere"):
        estimate_curvature(saturated, images, np.zeros(7, np.int64))
