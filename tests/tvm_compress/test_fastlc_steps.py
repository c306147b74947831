"""C steps: each is the nearest point of its set, checked by brute force or by moving away from it."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tvm_compress.fastlc import kmeans
from tvm_compress.fastlc.c_steps import (
    Binary,
    FixedPoint,
    KMeans,
    LowRank,
    Prune,
    PruneGroups,
    Sum,
    Ternary,
)
from tvm_compress.fastlc.kmeans import kmeans_codebook, nearest

FLOATS = st.floats(-3, 3, width=32).map(lambda v: round(v, 3))


def lines(low: int, high: int):
    return arrays(np.float64, st.integers(low, high), elements=FLOATS)


def importances(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.05, 4.0, shape)


def error(w: np.ndarray, v: np.ndarray, h: np.ndarray | float = 1.0) -> float:
    return float(np.sum(h * (w - v) ** 2))


@settings(max_examples=30, deadline=None)
@given(lines(1, 6), st.integers(1, 3), st.integers(0, 99))
def test_few_values_get_the_best_codebook(values: np.ndarray, k: int, seed: int) -> None:
    h = importances(values.shape, seed)
    codebook = kmeans_codebook(values, k, h)
    assert len(codebook) <= k
    assert (np.diff(codebook) > 0).all() or len(codebook) == 1
    found = error(values, codebook[nearest(values, codebook)], h)
    best = np.inf
    for labels in itertools.product(range(min(k, len(values))), repeat=len(values)):
        means = [np.average(values[m], weights=h[m]) for j in range(k) if (m := np.array(labels) == j).any()]
        best = min(best, error(values, np.array(means)[np.unique(labels, return_inverse=True)[1]], h))
    assert found <= best + 1e-9


@pytest.mark.parametrize("k", [2, 4, 16, 256])
def test_many_values_get_a_codebook_near_the_best(k: int) -> None:
    values = np.random.default_rng(k).normal(size=20_000)
    codebook = kmeans_codebook(values, k)
    found = error(values, codebook[nearest(values, codebook)]) / len(values)
    # Mean squared error of Lloyd and Max's optimal quantizers of a normal variable (Max 1960).
    best = {2: 0.3634, 4: 0.1175, 16: 0.009497, 256: 4.2e-5}[k]
    assert found < 1.06 * best
    # Every entry is the mean of what is nearest to it.
    labels = nearest(values, codebook)
    means = np.bincount(labels, values) / np.bincount(labels)
    np.testing.assert_allclose(codebook, means, atol=1e-3 if k == 256 else 1e-6)


def test_values_put_together_lose_nothing_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values, h = rng.normal(size=30_000), rng.gamma(0.3, 1.0, 30_000)
    exact = kmeans_codebook(values, 16, h)
    step = np.abs(FixedPoint(4)(values[None], h[None])).max()
    monkeypatch.setattr(kmeans, "_MOST_VALUES", 4096)
    bins, mass = kmeans.gather(values, h)
    assert len(bins) <= 4096
    assert (np.diff(bins) > 0).all()
    np.testing.assert_allclose([mass.sum(), mass @ bins], [h.sum(), h @ values])
    found = kmeans_codebook(values, 16, h)
    before, after = (error(values, book[nearest(values, book)], h) for book in (exact, found))
    assert after < 1.01 * before
    assert np.abs(FixedPoint(4)(values[None], h[None])).max() == pytest.approx(step, rel=0.03)


def test_codebook_far_from_zero_keeps_its_digits() -> None:
    values = 1e4 + np.random.default_rng(0).normal(size=5000) * 1e-3
    codebook = kmeans_codebook(values, 2)
    assert np.diff(codebook)[0] == pytest.approx(2 * 0.798e-3, rel=0.05)


def test_unimportant_values_have_no_say() -> None:
    values = np.array([0.0, 1.0, 1.1, 50.0])
    np.testing.assert_allclose(kmeans_codebook(values, 2, np.array([1.0, 1.0, 1.0, 0.0])), [0.0, 1.05])
    assert len(kmeans_codebook(values, 2, np.zeros(4))) == 2


def on_every_row(per_channel: bool, value: np.ndarray) -> list[np.ndarray]:
    return list(value.reshape(len(value), -1)) if per_channel else [value.ravel()]


@pytest.mark.parametrize("per_channel", [False, True])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999))
def test_what_each_step_can_express(per_channel: bool, seed: int) -> None:
    w = np.random.default_rng(seed).normal(size=(4, 3, 3, 3))
    h = importances(w.shape, seed) if seed % 2 else None
    for step, most in (
        (KMeans(2, per_channel), 4),
        (FixedPoint(3, per_channel), 7),
        (Binary(True, per_channel), 2),
        (Ternary(per_channel), 3),
    ):
        value = step(w, h)
        assert value.shape == w.shape
        for row in on_every_row(per_channel, value):
            assert len(np.unique(row)) <= most
        # What can be expressed already stays (k-means may find nothing nearer either).
        np.testing.assert_allclose(step(value, h), value, atol=1e-9)
    row = on_every_row(per_channel, FixedPoint(3, per_channel)(w, h))[0]
    whole = row / np.abs(row[row != 0]).min()
    np.testing.assert_allclose(whole * 6, np.rint(whole * 6), atol=1e-6)
    assert set(np.unique(Binary(False)(w))) <= {-1.0, 1.0}


@settings(max_examples=50, deadline=None)
@given(lines(1, 7), st.integers(0, 99))
def test_binary_and_ternary_are_the_best(w: np.ndarray, seed: int) -> None:
    h = importances(w.shape, seed)

    def best(values: tuple[float, ...]) -> float:
        least = error(w, np.zeros_like(w), h) if 0.0 in values else np.inf
        for signs in itertools.product(values, repeat=len(w)):
            s = np.array(signs)
            if s.any():
                a = np.sum(h * w * s) / np.sum(h * s**2)
                least = min(least, error(w, a * s, h))
        return least

    assert error(w, Binary()(w[None], h[None])[0], h) <= best((-1.0, 1.0)) + 1e-9
    assert error(w, Ternary()(w[None], h[None])[0], h) <= best((-1.0, 0.0, 1.0)) + 1e-9


@settings(max_examples=30, deadline=None)
@given(lines(2, 40).filter(lambda w: w.any()), st.integers(2, 5), st.integers(0, 99))
def test_fixed_point_is_never_worse_than_the_plain_grid(w: np.ndarray, bits: int, seed: int) -> None:
    h = importances(w.shape, seed)
    limit = 2 ** (bits - 1) - 1
    step = np.abs(w).max() / limit
    plain = step * np.clip(np.rint(w / step), -limit, limit)
    assert error(w, FixedPoint(bits)(w[None], h[None])[0], h) <= error(w, plain, h) + 1e-9


@settings(max_examples=50, deadline=None)
@given(lines(1, 8), st.data())
def test_pruning_keeps_the_best_of_all_sets(w: np.ndarray, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, len(w)))
    h = importances(w.shape, kept)
    value = Prune(kept)(w, h)
    assert np.count_nonzero(value) <= kept
    sets = itertools.combinations(range(len(w)), len(w) - kept)
    best = min(sum(h[i] * w[i] ** 2 for i in gone) for gone in sets)
    assert error(w, value, h) == pytest.approx(best)


def test_groups_go_together() -> None:
    w = np.array([[5.0, 0.1], [1.0, 1.0], [3.0, 0.0]])
    groups = np.array([[0, 0], [1, 1], [2, 2]])
    np.testing.assert_array_equal(PruneGroups(4, groups)(w), [[5, 0.1], [0, 0], [3, 0]])
    np.testing.assert_array_equal(PruneGroups(3, groups)(w), [[5, 0.1], [0, 0], [0, 0]])
    h = np.array([[0.0, 0.0], [1.0, 1.0], [0.1, 1.0]])
    np.testing.assert_array_equal(PruneGroups(2, groups)(w, h), [[0, 0], [1, 1], [0, 0]])


@pytest.mark.parametrize("factorization", ["channel", "spatial"])
def test_low_rank(factorization: str) -> None:
    w = np.random.default_rng(0).normal(size=(6, 5, 3, 3))
    step = LowRank(3, factorization)
    value = step(w)
    np.testing.assert_allclose(step(value), value, atol=1e-9)
    matrix = w.reshape(6, -1) if factorization == "channel" else w.transpose(1, 2, 0, 3).reshape(15, 18)
    assert error(w, value) == pytest.approx(np.sum(np.linalg.svd(matrix, compute_uv=False)[3:] ** 2))
    # Importance that is one factor per row and column is met exactly: better there than the plain step.
    h = np.broadcast_to(np.random.default_rng(1).uniform(0.01, 9, (6, 1, 1, 1)), w.shape)
    if factorization == "channel":
        assert error(w, step(w, h), h) < 0.99 * error(w, value, h)


def test_sum_of_low_rank_and_sparse() -> None:
    rng = np.random.default_rng(0)
    low = rng.normal(size=(12, 2)) @ rng.normal(size=(2, 20))
    sparse = np.zeros((12, 20))
    sparse.flat[rng.choice(240, 8, replace=False)] = 10.0
    parts = Sum((Prune(8), LowRank(2))).split(low + sparse)
    assert np.count_nonzero(parts[0]) == 8
    assert np.linalg.matrix_rank(parts[1], tol=1e-6) == 2
    alone = min(error(low + sparse, LowRank(2)(low + sparse)), error(low + sparse, Prune(8)(low + sparse)))
    errors = [error(low + sparse, Sum((Prune(8), LowRank(2)), rounds)(low + sparse)) for rounds in (1, 2, 8)]
    assert errors[2] < 1e-3 * alone
    assert errors[0] >= errors[1] >= errors[2]
