"""The latency model's Gaussian process: smooth functions of features, and what it says of rows left out."""

import numpy as np
import pytest

from tvm_compress.cost import gaussian_process
from tvm_compress.cost.features import FEATURE_NAMES
from tvm_compress.cost.gaussian_process import GaussianProcess, fit

COLUMN = {name: index for index, name in enumerate(FEATURE_NAMES)}


def rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors whose target is a smooth function of a size and of a count."""
    rng = np.random.default_rng(seed)
    vectors = np.zeros((count, len(FEATURE_NAMES)), np.float32)
    vectors[:, COLUMN["OC"]] = rng.integers(1, 128, count)
    vectors[:, COLUMN["log2_macs"]] = rng.uniform(10, 25, count)
    # Says nothing: the same up to rounding.
    vectors[:, COLUMN["KH"]] = 3
    return vectors, np.sin(np.log2(vectors[:, COLUMN["OC"]])) + 0.1 * vectors[:, COLUMN["log2_macs"]]


def test_it_predicts_between_the_rows():
    vectors, target = rows(200, 0)
    unseen, expected = rows(100, 1)
    process, _ = fit(vectors, target)
    np.testing.assert_allclose(process.predict(vectors), target, atol=0.05)
    assert np.median(np.abs(process.predict(unseen) - expected)) < 0.03


def test_left_out_rows_are_predicted_as_by_a_fit_without_them():
    vectors, target = rows(60, 2)
    process, left_out = fit(vectors, target)
    for row in (3, 17):
        others = np.arange(60) != row
        points = process.points[others]
        near = gaussian_process._covariance(points, points, process.length)
        near += gaussian_process.NOISE * np.eye(59)
        weights = np.linalg.solve(near, target[others] - process.mean)
        to_row = gaussian_process._covariance(process.points[[row]], points, process.length)
        assert left_out[row] == pytest.approx(process.mean + (to_row @ weights)[0], abs=1e-6)


def test_plain_values_give_the_same_predictions():
    vectors, target = rows(50, 3)
    process, _ = fit(vectors, target)
    again = GaussianProcess.from_dict(process.to_dict())
    np.testing.assert_array_equal(again.predict(vectors), process.predict(vectors))


def test_far_from_all_rows_the_middle_is_expected():
    vectors, target = rows(50, 4)
    process, _ = fit(vectors, target)
    far = vectors[:1].copy()
    far[:, COLUMN["log2_macs"]] = 1e4
    assert process.predict(far)[0] == pytest.approx(np.median(target), abs=1e-6)


def test_rows_beyond_the_most_are_predicted_not_learned(monkeypatch):
    vectors, target = rows(80, 5)
    monkeypatch.setattr(gaussian_process, "MOST_ROWS", 60)
    process, left_out = fit(vectors, target)
    assert len(process.points) == 60
    np.testing.assert_array_equal(left_out[60:], process.predict(vectors[60:]))
