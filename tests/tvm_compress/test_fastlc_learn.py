"""Exact solutions against enumeration; the learning-compression loop against both."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_compress.errors import SettingError
from tvm_compress.fastlc.c_steps import Binary, CStep, KMeans, LowRank, Prune, Sum, Ternary
from tvm_compress.fastlc.exact import choose_exactly, prune_exactly, pruning_gains
from tvm_compress.fastlc.learn import MuSchedule, learn
from tvm_compress.fastlc.quadratic import QuadraticModel


def random_model(seed: int, shape: tuple[int, ...] = (12,), gradient: float = 0.3) -> QuadraticModel:
    rng = np.random.default_rng(seed)
    h = rng.gamma(0.5, 2.0, shape)
    return QuadraticModel(rng.normal(size=shape), gradient * rng.normal(size=shape) * np.sqrt(h), h)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kept", [0, 1, 5, 11, 12])
def test_exact_pruning_is_the_best_of_all_subsets(seed: int, kept: int) -> None:
    model = random_model(seed)
    exact = prune_exactly(model, kept)
    assert np.count_nonzero(exact) == kept
    best = np.inf
    for chosen in itertools.combinations(range(12), kept):
        value = np.zeros(12)
        value[list(chosen)] = model.target[list(chosen)]
        best = min(best, model.loss(value))
    assert model.loss(exact) == pytest.approx(best, abs=1e-12)


def test_the_printed_ranking_is_worse() -> None:
    """Largest `g w - h w²/2 - g²/2h`, as printed on the poster, keeps the weights that matter least."""
    model = random_model(0)
    w, g, h = model.weights, model.gradient, model.curvature
    printed = g * w - 0.5 * h * w**2 - g**2 / (2 * h)
    np.testing.assert_allclose(printed, -pruning_gains(model), atol=1e-12)
    keep = np.argsort(-printed)[:6]
    assert model.loss(np.where(np.isin(np.arange(12), keep), model.target, 0.0)) > model.loss(
        prune_exactly(model, 6)
    )


def test_without_gradient_it_is_optimal_brain_damage() -> None:
    model = random_model(3, gradient=0.0)
    order = np.argsort(-model.curvature * model.weights**2)
    np.testing.assert_array_equal(np.sort(np.flatnonzero(prune_exactly(model, 4))), np.sort(order[:4]))
    np.testing.assert_array_equal(prune_exactly(model, 12), model.weights)


def test_dead_weights_stay_and_rank_by_their_slope() -> None:
    model = QuadraticModel(
        np.array([2.0, 3.0, 0.5, 1.0]), np.array([0.0, -1.0, 0.5, 0.1]), np.array([0, 0, 0, 2.0])
    )
    np.testing.assert_allclose(pruning_gains(model), [0.0, 3.0, 0.25, 0.95**2])
    np.testing.assert_allclose(prune_exactly(model, 2), [0, 3.0, 0, 0.95])
    for metric in ("curvature", "l2"):
        assert np.isfinite(learn(model, Prune(2), metric=metric).value).all()


@pytest.mark.parametrize("values", [(-1.0, 1.0), (-0.5, 0.0, 2.0)])
def test_exact_choice_is_the_best_of_all(values: tuple[float, ...]) -> None:
    model = random_model(1, (7,))
    best = min(model.loss(np.array(v)) for v in itertools.product(values, repeat=7))
    assert model.loss(choose_exactly(model, values)) == pytest.approx(best)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 12))
def test_the_loop_reaches_the_exact_pruning(seed: int, kept: int) -> None:
    model = random_model(seed)
    exact = model.loss(prune_exactly(model, kept))
    found = learn(model, Prune(kept))
    # What pruning adds, over the model's minimum.
    floor = model.loss(model.target)
    assert found.loss - floor <= (exact - floor) * (1 + 1e-3) + 1e-6


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["curvature", "l2"]))
def test_the_loop_reaches_the_exact_binarization(seed: int, metric: str) -> None:
    model = random_model(seed)
    found = learn(model, Binary(scaled=False), metric=metric)
    assert found.loss == pytest.approx(model.loss(choose_exactly(model)), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["curvature", "l2"]))
def test_never_worse_than_direct_compression(seed: int, metric: str) -> None:
    model = random_model(seed, (6, 8), gradient=1.0)
    for step in (Prune(10), KMeans(2), Ternary(per_channel=True), LowRank(2), Sum((Prune(6), LowRank(1)))):
        direct = model.loss(step(model.weights))
        found = learn(model, step, metric=metric)
        assert found.direct_loss == pytest.approx(direct)
        assert found.loss <= direct
        assert model.loss(found.value) == pytest.approx(found.loss)


def test_the_loop_gains_much_over_direct_compression() -> None:
    """Averaged over models: a loop that did nothing would pass the tests above."""
    cases: list[tuple[CStep, str, float]] = [
        (Prune(12), "curvature", 0.5),
        (KMeans(2), "curvature", 0.5),
        (LowRank(2), "l2", 0.85),
    ]
    for step, metric, most in cases:
        ratios = []
        for seed in range(10):
            model = random_model(seed, (6, 8))
            floor = model.loss(model.target)
            found = learn(model, step, metric=metric)
            ratios.append((found.loss - floor) / (found.direct_loss - floor))
        assert np.mean(ratios) < most


def test_plain_norm_does_not_reach_the_exact_pruning() -> None:
    """Why the penalty is in the curvature's norm by default: see `learn`."""
    model = random_model(5)
    slow = MuSchedule(start=1e-6, growth=1.1, steps=300)
    found = learn(model, Prune(4), slow, metric="l2")
    largest = np.argsort(-np.abs(model.target))[:4]
    chosen = np.where(np.isin(np.arange(12), largest), model.target, 0.0)
    assert found.loss == pytest.approx(min(model.loss(chosen), found.direct_loss), rel=1e-3)
    assert found.loss > model.loss(prune_exactly(model, 4)) + 0.1


def test_learning_step_minimises_its_objective() -> None:
    model = random_model(2)
    compressed, penalty = np.zeros(12), model.penalty("l2")
    value = model.learn(compressed, 0.7, penalty)

    def objective(v: np.ndarray) -> float:
        return model.loss(v) + 0.35 * float(np.sum(penalty * (v - compressed) ** 2))

    for i in range(12):
        for change in (-1e-3, 1e-3):
            assert objective(value) < objective(value + change * np.eye(12)[i])


def test_damping() -> None:
    model = random_model(2)
    damped = QuadraticModel.damped(model.weights, model.gradient, model.curvature, 0.5)
    np.testing.assert_allclose(damped.curvature, model.curvature + 0.5 * model.curvature.mean())


def test_bad_settings() -> None:
    with pytest.raises(SettingError, match="metric"):
        learn(random_model(0), Prune(3), metric="l1")
    with pytest.raises(SettingError, match="grow"):
        MuSchedule(growth=1.0)
    with pytest.raises(SettingError, match="13 of 12"):
        prune_exactly(random_model(0), 13)
