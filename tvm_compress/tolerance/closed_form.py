"""Tolerances in closed form: how far each weight may move within a budget of loss.

Source: TOCO, section 3 and its supplement. Both functions minimise `Σ φ_i(τ_i)` over `0 <= τ_i <= bound_i`
subject to `Σ |g_i| τ_i <= ΔL`, exactly, clipping and redistribution included. The paper clips once and leaves
the budget that clipping frees unused; here it is given to the weights that are still free, so that the
results are those of a general solver.

Nothing is sorted: the one unknown (the share of each free weight, or the multiplier λ) is found by Newton
steps on a piecewise linear sum, which end at the exact solution after a few passes over the weights. Weights
keep their dtype and are read in parts that fit the cache; sums are float64.
"""

import math
from collections.abc import Iterator

import numpy as np

from tvm_compress.errors import SettingError

# Weights in one part: arrays of it stay in the cache, and are small enough that malloc reuses them.
PART = 1 << 15
MAX_ROUNDS = 200
# Weights that first say about where λ lies.
SAMPLE = 1 << 15


def bounds(
    weights: np.ndarray,
    targets: np.ndarray | float = 0.0,
    trust_radius: float = np.inf,
    largest: float = np.inf,
) -> np.ndarray:
    """Return the tolerances' box, `min(δ, |w* - w|, ω̄)`: trust radius, distance to the target, limit."""
    weights = floating(weights)
    distance = np.abs(np.asarray(targets, weights.dtype) - weights)
    return np.minimum(distance, weights.dtype.type(min(trust_radius, largest)))


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
    The shape and dtype of g.
    """
    slopes, upper = prepare(gradients, budget, bound)
    share = _share(slopes, upper, budget)
    tolerances = np.empty_like(slopes)
    for part in parts(slopes.size):
        with np.errstate(divide="ignore", invalid="ignore"):
            free = share / slopes[part].astype(np.float64)
        tolerances[part] = np.where(slopes[part] > 0, np.minimum(upper[part], free), upper[part])
    return tolerances.reshape(np.shape(gradients))


def _share(slopes: np.ndarray, upper: np.ndarray, budget: float) -> float:
    """Return the share s at which `Σ min(|g_i| bound_i, s)` is the budget; infinity where all may be clipped.

    The sum is concave in s, so Newton steps from the even share rise to the solution and never pass it: each
    is a redistribution of what the weights clipped so far leave over.
    """
    spent, costs = 0.0, np.empty_like(slopes)
    # g = 0 costs nothing, whatever its bound.
    with np.errstate(invalid="ignore", over="ignore"):
        np.multiply(slopes, upper, out=costs)
    np.copyto(costs, 0, where=slopes == 0)
    costs = costs[costs > 0]
    share = 0.0
    while costs.size:
        # The share of the weights left, each of which costs more than the share before.
        share = max((budget - spent) / costs.size, share)
        clipped = costs <= share
        if not clipped.any():
            return share
        spent += float(costs[clipped].sum(dtype=np.float64))
        costs = costs[~clipped]
    return math.inf


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
    not clipped, λ >= 0. Which those are changes with λ: Newton steps, kept within a bracket, find both.

    Parameters
    ----------
    gradients
        g, any shape; weights with g = 0 get their bound.
    budget
        ΔL >= 0.
    distance
        d = |C - w| >= 0; for pruning |w|.
    curvature
        h >= 0, broadcast to g; where it is 0 and g is not, τ has no use and is 0, unless the budget has room
        for all.
    bound
        Further upper bounds of τ (trust radius), broadcast to g.

    Returns
    -------
    The shape and dtype of g.
    """
    slopes, upper = prepare(gradients, budget, bound)
    shape = np.shape(gradients)
    distance = np.asarray(distance, slopes.dtype).ravel()
    curvature = np.broadcast_to(np.asarray(curvature, slopes.dtype), shape).ravel()
    if distance.size != slopes.size or (distance < 0).any() or (curvature < 0).any():
        raise SettingError("Distances and curvatures must not be negative, and one for each gradient.")
    upper = np.minimum(upper, distance)
    if cost_of(slopes, upper) <= budget:
        return upper.reshape(shape)
    every = -(-slopes.size // SAMPLE)
    sample = _Line(*(values[::every] for values in (slopes, upper, distance, curvature)))
    multiplier = _Line(slopes, upper, distance, curvature).solve(budget, sample.solve(budget / every))
    tolerances = np.empty_like(slopes)
    for part in parts(slopes.size):
        # h = 0 has no pull towards the target: any λ > 0, and the limit at 0, brings τ to 0.
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            fall = slopes[part] / (2 * curvature[part])
            pushed = np.where(curvature[part] > 0, slopes.dtype.type(multiplier) * fall, np.inf)
        pushed[slopes[part] == 0] = 0
        tolerances[part] = np.clip(distance[part] - pushed, 0, upper[part])
    return tolerances.reshape(shape)


class _Line:
    """`Σ |g| clip(d - λ |g| / 2h, 0, upper)` as a falling, piecewise linear function of λ."""

    def __init__(
        self, slopes: np.ndarray, upper: np.ndarray, distance: np.ndarray, curvature: np.ndarray
    ) -> None:
        # Each weight's term is clip(whole - λ fall, 0, most).
        self._whole, self._fall, self._most = (np.empty_like(slopes) for _ in range(3))
        for part in parts(slopes.size):
            g, h = slopes[part], curvature[part]
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                fall = g * (g / (2 * h))
            fall[~np.isfinite(fall)] = 0
            self._fall[part] = fall
            # Without a fall, g or h is 0 and the term is 0 at any λ > 0.
            self._whole[part] = np.where(fall > 0, g * distance[part], 0)
            self._most[part] = np.where(fall > 0, g * upper[part], 0)

    def _evaluate(self, multiplier: float) -> tuple[float, float]:
        """Return the sum at λ, and how fast it falls there with the weights that are not clipped."""
        total = falling = 0.0
        factor = self._fall.dtype.type(multiplier)
        for part in parts(self._fall.size):
            fall, most = self._fall[part], self._most[part]
            terms = self._whole[part] - factor * fall
            free = (terms > 0) & (terms < most)
            total += float(np.clip(terms, 0, most).sum(dtype=np.float64))
            falling += float((fall * free).sum(dtype=np.float64))
        return total, falling

    def solve(self, budget: float, start: float = 0.0) -> float:
        """Return the λ >= 0 at which the sum falls to the budget, or 0 where it is below it from there on."""
        if float(self._most.sum(dtype=np.float64)) <= budget:
            return 0.0
        rounding = 4 * float(np.finfo(self._fall.dtype).eps)
        multiplier, low, high = start or self._unclipped(budget), 0.0, math.inf
        for _ in range(MAX_ROUNDS):
            total, falling = self._evaluate(multiplier)
            excess = total - budget
            step = multiplier + excess / falling if falling > 0 else math.nan
            if abs(excess) <= 1e-13 * budget or abs(step - multiplier) <= rounding * multiplier:
                return multiplier
            if excess > 0:
                low = multiplier
            else:
                high = multiplier
            if not low < step < high:
                step = _between(low, high)
            if not low < step < high:
                break
            multiplier = step
        return high if math.isfinite(high) else low

    def _unclipped(self, budget: float) -> float:
        """Return λ as the closed form gives it where nothing clips: where to begin."""
        return float(self._whole.sum(dtype=np.float64) - budget) / float(self._fall.sum(dtype=np.float64))


def _between(low: float, high: float) -> float:
    """Return a λ inside a bracket, by powers where it is open or wide."""
    if math.isinf(high):
        return 4 * low
    if low == 0:
        return high / 4
    return math.sqrt(low * high) if high > 4 * low else (low + high) / 2


def parts(size: int) -> Iterator[slice]:
    """Cut `size` weights into parts that fit the cache."""
    for start in range(0, size, PART):
        yield slice(start, min(start + PART, size))


def cost_of(slopes: np.ndarray, tolerances: np.ndarray) -> float:
    """Return `Σ |g| τ`, where g = 0 costs nothing even at an infinite τ."""
    total = 0.0
    for part in parts(slopes.size):
        g = slopes[part].astype(np.float64)
        with np.errstate(invalid="ignore"):
            products = g * tolerances[part]
        total += float(np.where(g > 0, products, 0.0).sum())
    return total


def floating(values: np.ndarray) -> np.ndarray:
    """Return values as an array of float32, where they are that already, or float64."""
    values = np.asarray(values)
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)


def prepare(gradients: np.ndarray, budget: float, bound: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Check a problem and return |g| and the upper bounds of τ, flat, in the dtype of g.

    Raises
    ------
    SettingError
        On a negative budget or bound, and where a value is NaN or a gradient infinite.
    """
    if not budget >= 0 or not np.isfinite(budget):
        raise SettingError(f"A loss budget must be finite and at least 0, not {budget}.")
    slopes = np.abs(floating(gradients)).ravel()
    if not np.isfinite(slopes).all():
        raise SettingError("The gradients hold NaN or infinity.")
    upper = np.broadcast_to(np.asarray(bound, slopes.dtype), np.shape(gradients)).ravel()
    if np.isnan(upper).any() or (upper < 0).any():
        raise SettingError("The bounds of tolerances must not be negative or NaN.")
    # Without the sign of -0.
    return slopes, np.abs(upper) if np.signbit(upper).any() else upper
