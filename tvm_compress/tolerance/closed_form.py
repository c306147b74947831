"""Tolerances in closed form: how far each weight may move within a budget of loss.

Source: TOCO, section 3 and its supplement. Both functions minimise `Σ φ_i(τ_i)` over `0 <= τ_i <= bound_i`
subject to `Σ |g_i| τ_i <= ΔL`, exactly, clipping and redistribution included. The paper clips once and leaves
the budget that clipping frees unused; here it is given to the weights that are still free, so that the
results are those of a general solver. Everything is vectorised, O(n log n).
"""

import numpy as np

from tvm_compress.errors import SettingError


def bounds(
    weights: np.ndarray,
    targets: np.ndarray | float = 0.0,
    trust_radius: float = np.inf,
    largest: float = np.inf,
) -> np.ndarray:
    """Return the tolerances' box, `min(δ, |w* - w|, ω̄)`: trust radius, distance to the target, limit."""
    distance = np.abs(np.asarray(targets, np.float64) - np.asarray(weights, np.float64))
    return np.minimum(distance, min(trust_radius, largest))


def logarithmic(gradients: np.ndarray, budget: float, bound: np.ndarray | float = np.inf) -> np.ndarray:
    """Tolerances for φ = -log τ (bit counts): `τ_i = ΔL / (n |g_i|)`, clipped at the bound and redistributed.

    A clipped weight uses |g_i| bound_i of the budget; what is left is shared equally by the others.

    Parameters
    ----------
    gradients
        g, any shape.
    budget
        ΔL >= 0, the loss that may be added.
    bound
        Upper bounds of τ, broadcast to g. Weights with g = 0 get their bound.

    Returns
    -------
    float64, the shape of g.
    """
    slopes, upper, shape = _prepare(gradients, budget, bound)
    tolerances = upper.copy()
    active = slopes > 0
    # What each weight would cost at its bound, ascending: the cheapest are clipped first.
    costs = np.where(np.isfinite(upper[active]), slopes[active] * upper[active], np.inf)
    order = np.sort(costs)
    n = len(order)
    if n == 0:
        return tolerances.reshape(shape)
    spent = np.concatenate([[0.0], np.cumsum(order[:-1])])
    # With the k cheapest clipped, the others share the rest: right for the first k whose next would not clip.
    with np.errstate(invalid="ignore"):
        shares = (budget - spent) / (n - np.arange(n))
    fits = np.flatnonzero(shares < order)
    if len(fits):
        share = max(float(shares[fits[0]]), 0.0)
        tolerances[active] = np.minimum(upper[active], share / slopes[active])
    return tolerances.reshape(shape)


def quadratic(
    gradients: np.ndarray,
    budget: float,
    distance: np.ndarray,
    curvature: np.ndarray | float = 1.0,
    bound: np.ndarray | float = np.inf,
) -> np.ndarray:
    """Tolerances for φ = h (d - τ)², d the distance from a weight to its codebook value.

    Erratum: the paper's equations 27 and 28 reverse the sign of λ and divide by g where the derivation
    multiplies. The conditions of Karush, Kuhn and Tucker give `τ_i = d_i - λ |g_i| / (2 h_i)`, here clipped
    to `[0, min(d_i, bound_i)]`, and `λ = (Σ |g_i| d_i - ΔL) / Σ (g_i² / (2 h_i))` over the weights that are
    not clipped, λ >= 0. Which those are follows from where λ lies among the values at which a weight gets
    clipped or free, found by sorting them.

    Parameters
    ----------
    gradients
        g, any shape; weights with g = 0 get their bound.
    budget
        ΔL >= 0.
    distance
        d = |C - w| >= 0; for pruning |w|.
    curvature
        h >= 0, broadcast to g; where it is 0 and g is not, τ has no use and is 0.
    bound
        Further upper bounds of τ (trust radius), broadcast to g.

    Returns
    -------
    float64, the shape of g.
    """
    slopes, upper, shape = _prepare(gradients, budget, bound)
    distance = np.asarray(distance, np.float64).ravel()
    curvature = np.broadcast_to(np.asarray(curvature, np.float64), shape).ravel()
    if (distance < 0).any() or (curvature < 0).any():
        raise SettingError("Distances and curvatures must not be negative.")
    upper = np.minimum(upper, distance)
    if float(slopes @ upper) <= budget:
        return upper.reshape(shape)
    multiplier = _multiplier(slopes, upper, distance, curvature, budget)
    # h = 0 has no pull towards the target: any λ > 0 brings τ to 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        pushed = np.where(slopes > 0, multiplier * slopes / (2 * curvature), 0.0)
    return np.clip(distance - np.nan_to_num(pushed, nan=np.inf), 0.0, upper).reshape(shape)


def _multiplier(
    slopes: np.ndarray, upper: np.ndarray, distance: np.ndarray, curvature: np.ndarray, budget: float
) -> float:
    """Return λ >= 0 at which `Σ |g| clip(d - λ |g| / 2h, 0, upper)` falls to the budget."""
    active = (slopes > 0) & (curvature > 0) & (upper > 0)
    slopes, upper, distance, h = slopes[active], upper[active], distance[active], curvature[active]
    if len(slopes) == 0 or float(slopes @ upper) <= budget:
        return 0.0
    leaves_bound = 2 * h * (distance - upper) / slopes
    reaches_zero = 2 * h * distance / slopes
    # The sum is piecewise linear in λ: each weight adds -g²/2h to its slope between its two breakpoints.
    fall = slopes**2 / (2 * h)
    points = np.concatenate([leaves_bound, reaches_zero])
    changes = np.concatenate([-fall, fall])
    order = np.argsort(points, kind="stable")
    points, slope = points[order], np.cumsum(changes[order])
    sums = float(slopes @ upper) + np.concatenate([[0.0], np.cumsum(slope[:-1] * np.diff(points))])
    # The last breakpoint at which the sum is still above the budget; beyond it the sum falls with its slope.
    position = int(np.searchsorted(-sums, -budget, side="left")) - 1
    position = max(position, 0)
    if slope[position] >= 0:
        return float(points[position])
    return float(points[position] + (budget - sums[position]) / slope[position])


def _prepare(
    gradients: np.ndarray, budget: float, bound: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    if not budget >= 0 or not np.isfinite(budget):
        raise SettingError(f"A loss budget must be finite and at least 0, not {budget}.")
    slopes = np.abs(np.asarray(gradients, np.float64))
    if not np.isfinite(slopes).all():
        raise SettingError("The gradients hold NaN or infinity.")
    upper = np.broadcast_to(np.asarray(bound, np.float64), slopes.shape).astype(np.float64)
    if np.isnan(upper).any() or (upper < 0).any():
        raise SettingError("The bounds of tolerances must not be negative or NaN.")
    return slopes.ravel(), upper.ravel(), slopes.shape
