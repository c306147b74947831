import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from tvm_compress.errors import SettingError
from tvm_compress.tolerance.closed_form import PART, cost_of, logarithmic, quadratic
from tvm_compress.tolerance.solver import SAMPLE, logarithmic_derivative, quadratic_derivative, solve


def problem(seed: int, n: int, dtype: str = "float64"):
    """Gradients of very different sizes, distances, curvatures, bounds."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=n) * np.exp(2 * rng.normal(size=n))
    d = np.abs(rng.normal(size=n)) + 1e-3
    h = np.exp(rng.normal(size=n))
    upper = np.minimum(d, rng.uniform(0.2, 2.0, n))
    return [values.astype(dtype) for values in (g, d, h, upper)]


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 3000),
    share=st.floats(1e-3, 0.99),
    dtype=st.sampled_from(["float32", "float64"]),
)
@example(seed=50, n=2504, share=0.5, dtype="float32")
def test_equals_both_closed_forms(seed, n, share, dtype):
    g, d, h, upper = problem(seed, n, dtype)
    budget = share * cost_of(np.abs(g), upper)
    found = solve(logarithmic_derivative, g, budget, upper)
    assert found.dtype == g.dtype
    np.testing.assert_allclose(found, logarithmic(g, budget, upper), rtol=1e-5)
    found = solve(quadratic_derivative(d, h), g, budget, upper)
    # A quadratic's minimum is known to about the rounding of d.
    np.testing.assert_allclose(found, quadratic(g, budget, d, h, upper), rtol=1e-5, atol=1e-6 * d.max())
    assert cost_of(np.abs(g), found) <= budget * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["logarithmic", "quadratic"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_scipy_on_fifty_variables(kind, seed):
    rng = np.random.default_rng(seed)
    n = 50
    g, d, h = rng.uniform(0.1, 2.0, n), rng.uniform(0.3, 1.0, n), rng.uniform(0.3, 3.0, n)
    upper = np.minimum(d, rng.uniform(0.2, 1.0, n))
    budget = rng.uniform(0.2, 0.7) * float(g @ upper)
    objective, slope, derivative = {
        "logarithmic": (lambda t: -np.log(t).sum(), lambda t: -1 / t, logarithmic_derivative),
        "quadratic": (
            lambda t: (h * (d - t) ** 2).sum(),
            lambda t: 2 * h * (t - d),
            quadratic_derivative(d, h),
        ),
    }[kind]
    best = minimize(
        objective,
        0.9 * budget / float(g @ upper) * upper,
        jac=slope,
        bounds=[(1e-9, u) for u in upper],
        constraints={"type": "ineq", "fun": lambda t: budget - g @ t, "jac": lambda t: -g},
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-15},
    )
    found = solve(derivative, g, budget, upper)
    assert objective(found) <= best.fun + 1e-9 * abs(best.fun)
    np.testing.assert_allclose(found, best.x, rtol=2e-3, atol=2e-4)
    assert g @ found <= budget * (1 + 1e-12)


def test_a_model_without_a_closed_form():
    """φ = (d - τ)⁴ with h: the conditions of Karush, Kuhn and Tucker hold."""
    g, d, h, upper = problem(5, 400)
    budget = 0.3 * cost_of(np.abs(g), upper)

    def derivative(tolerances, part):
        return -4 * h[part] * (d[part] - tolerances) ** 3

    found = solve(derivative, g, budget, upper)
    assert cost_of(np.abs(g), found) == pytest.approx(budget, rel=1e-9)
    free = (found > 0) & (found < upper)
    multipliers = (-derivative(found, slice(None)) / np.abs(g))[free]
    assert free.sum() > 50
    np.testing.assert_allclose(multipliers, multipliers[0], rtol=1e-6)
    at_zero = found == 0
    assert (4 * h * d**3 / np.abs(g))[at_zero].max(initial=0) <= multipliers[0] * (1 + 1e-6)


def test_large_problems_are_cut_into_parts_and_sampled():
    n = SAMPLE * 2 + PART // 2 + 17
    g, d, h, upper = problem(1, n, "float32")
    budget = 0.1 * cost_of(np.abs(g), upper)
    one, two = (solve(quadratic_derivative(d, h), g, budget, upper, threads=t) for t in (1, 2))
    np.testing.assert_array_equal(one, two)
    closed = quadratic(g, budget, d, h, upper)
    np.testing.assert_allclose(one, closed, rtol=1e-5, atol=1e-6 * float(d.max()))
    np.testing.assert_allclose(
        solve(logarithmic_derivative, g, budget, upper), logarithmic(g, budget, upper), rtol=1e-5
    )


def test_corners():
    bound = np.array([0.5, 0.25])
    log = logarithmic_derivative
    np.testing.assert_array_equal(solve(log, np.zeros(2), 0.0, bound), bound)
    np.testing.assert_array_equal(solve(log, np.ones(2), 100.0, bound), bound)
    np.testing.assert_array_equal(solve(log, np.array([1.0, 0.0]), 0.0, bound), [0.0, 0.25])
    np.testing.assert_allclose(solve(log, np.ones(2), 0.5), [0.25, 0.25], rtol=1e-9)
    flat = quadratic_derivative(bound, np.array([0.0, 1.0]))
    np.testing.assert_allclose(solve(flat, np.ones(2), 0.2, bound), [0.0, 0.2], atol=1e-9)
    np.testing.assert_allclose(solve(flat, np.ones(2), 0.4, bound), [0.0, 0.25], atol=1e-9)
    assert solve(log, np.ones((2, 3)), 1.0).shape == (2, 3)


@pytest.mark.parametrize(
    ("gradients", "budget", "bound"),
    [
        (np.ones(2), -1.0, 1.0),
        (np.ones(2), np.nan, 1.0),
        (np.array([np.nan, 1]), 1.0, 1.0),
        (np.ones(2), 1, -1),
    ],
)
def test_impossible_problems(gradients, budget, bound):
    with pytest.raises(SettingError):
        solve(logarithmic_derivative, gradients, budget, bound)
