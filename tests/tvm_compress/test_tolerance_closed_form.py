import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from tvm_compress.errors import SettingError
from tvm_compress.tolerance.closed_form import bounds, logarithmic, quadratic


def solve(objective, gradient_of, slopes, budget, upper):
    """The general solver that the closed forms are compared with."""
    n = len(slopes)
    result = minimize(
        objective,
        np.minimum(upper, budget / (n * slopes)) * 0.9,
        jac=gradient_of,
        bounds=[(1e-9, u) for u in upper],
        constraints={"type": "ineq", "fun": lambda t: budget - slopes @ t, "jac": lambda t: -slopes},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    return result.x


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 12), share=st.floats(0.02, 0.95))
def test_logarithmic_equals_the_general_solver(seed, n, share):
    rng = np.random.default_rng(seed)
    g, upper = rng.uniform(0.1, 2.0, n), rng.uniform(0.1, 1.0, n)
    budget = share * float(g @ upper)
    t = logarithmic(g * rng.choice([-1, 1], n), budget, upper)
    best = solve(lambda t: -np.log(t).sum(), lambda t: -1 / t, g, budget, upper)
    assert g @ t <= budget * (1 + 1e-9)
    assert (t <= upper).all()
    assert -np.log(t).sum() <= -np.log(best).sum() + 1e-6
    np.testing.assert_allclose(t, best, rtol=2e-3, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 12), share=st.floats(0.02, 0.95), boxed=st.booleans())
def test_quadratic_equals_the_general_solver(seed, n, share, boxed):
    rng = np.random.default_rng(seed)
    g, h, d = rng.uniform(0.1, 2.0, n), rng.uniform(0.2, 3.0, n), rng.uniform(0.1, 1.0, n)
    bound = rng.uniform(0.05, 1.0, n) if boxed else np.full(n, np.inf)
    upper = np.minimum(bound, d)
    budget = share * float(g @ upper)
    t = quadratic(g * rng.choice([-1, 1], n), budget, d, h, bound)
    best = solve(lambda t: (h * (d - t) ** 2).sum(), lambda t: -2 * h * (d - t), g, budget, upper)
    assert g @ t <= budget * (1 + 1e-9)
    assert ((t >= 0) & (t <= upper)).all()
    assert (h * (d - t) ** 2).sum() <= (h * (d - best) ** 2).sum() + 1e-6
    np.testing.assert_allclose(t, best, rtol=5e-3, atol=1e-3)


def test_the_papers_plain_form_where_nothing_clips():
    g = np.array([1.0, -2.0, 4.0])
    np.testing.assert_allclose(logarithmic(g, 0.3), 0.3 / (3 * np.abs(g)))
    d, h = np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0, 8.0])
    budget = 6.9
    multiplier = (np.abs(g) @ d - budget) / (g**2 / (2 * h)).sum()
    np.testing.assert_allclose(quadratic(g, budget, d, h), d - multiplier * np.abs(g) / (2 * h))


def test_what_clipping_frees_is_redistributed():
    # The first weight is clipped at 0.1 and uses 0.1 of the budget 1.0: the other two share 0.9.
    np.testing.assert_allclose(logarithmic(np.ones(3), 1.0, np.array([0.1, 5.0, 5.0])), [0.1, 0.45, 0.45])


def test_corners():
    bound = np.array([0.5, 0.25])
    np.testing.assert_array_equal(logarithmic(np.zeros(2), 0.0, bound), bound)
    np.testing.assert_array_equal(logarithmic(np.ones(2), 100.0, bound), bound)
    np.testing.assert_array_equal(logarithmic(np.ones(2), 0.0, bound), [0, 0])
    np.testing.assert_array_equal(quadratic(np.ones(2), 0.0, bound), [0, 0])
    np.testing.assert_array_equal(quadratic(np.ones(2), 100.0, bound), bound)
    np.testing.assert_array_equal(quadratic(np.zeros(2), 0.0, bound), bound)
    # Without curvature there is nothing to gain by moving.
    np.testing.assert_allclose(quadratic(np.ones(2), 0.2, bound, np.array([0.0, 1.0])), [0.0, 0.2])
    assert logarithmic(np.ones((2, 3)), 1.0).shape == (2, 3)


def test_box():
    np.testing.assert_array_equal(bounds(np.array([-0.5, 2.0]), 0.0, trust_radius=1.0), [0.5, 1.0])


@pytest.mark.parametrize("budget", [-1.0, np.nan, np.inf])
def test_impossible_budgets(budget):
    with pytest.raises(SettingError, match="budget"):
        logarithmic(np.ones(2), budget)
