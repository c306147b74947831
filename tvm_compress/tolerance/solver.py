"""The general solver: tolerances for any compression model φ whose derivative can be computed.

Source: TOCO, supplement A.1, Algorithms 2 and 3, for `min Σ φ_i(τ_i)` over `0 <= τ_i <= bound_i` subject to
`Σ |g_i| τ_i <= ΔL`. What differs from the paper:

- The box bounds mean that Lemma 1's λ̄ need not hold: λ's bracket is grown until it holds the solution.
- The signs: where `gᵀτ` exceeds the budget, λ is too *small* (Algorithm 2 lowers its upper bound there).
- Algorithm 3 halves the interval of τ. Here the interval's *floating-point numbers* are halved: 32 steps give
  the last bit of a float32, and τ is as exact, relative to its size, near 0 as near its bound.
- τ falls as λ grows. So the tolerances at both ends of λ's bracket are brackets of all others, and steps
  become fewer as λ's bracket narrows. That bracket comes first from a sample of the weights, and is narrowed
  by the rule of Illinois, which takes fewer steps than halving it.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tvm_compress.tolerance.closed_form import cost_of, parts, prepare

Part = slice | np.ndarray
# φ'(τ) of some weights at these τ: a slice of the flattened problem, or indices.
Derivative = Callable[[np.ndarray, Part], np.ndarray]

# Weights whose tolerances first say where λ lies.
SAMPLE = 1 << 17
MAX_ROUNDS = 100
# Parts that a thread takes at a time.
PARTS_AT_ONCE = 8
# The first step from the sample's λ towards the other end of the bracket.
FIRST_STEP = 1.02
LARGEST_STEP = 1e6
# How exactly the budget is met, relative to it; what is left over is below it, never above.
EXACTNESS = {np.dtype(np.float32): 2e-7, np.dtype(np.float64): 1e-10}


def logarithmic_derivative(tolerances: np.ndarray, part: Part) -> np.ndarray:
    """Return φ' for φ = -log τ (bit counts)."""
    del part
    with np.errstate(divide="ignore", over="ignore"):
        return np.divide(tolerances.dtype.type(-1), tolerances)


def quadratic_derivative(distance: np.ndarray, curvature: np.ndarray) -> Derivative:
    """Return φ' for φ = h (d - τ)², given d and h of every weight."""
    distance, twice = distance.ravel(), 2 * curvature.ravel()

    def derivative(tolerances: np.ndarray, part: Part) -> np.ndarray:
        result = tolerances - distance[part]
        result *= twice[part]
        return result

    return derivative


def solve(
    derivative: Derivative,
    gradients: np.ndarray,
    budget: float,
    bound: np.ndarray | float = np.inf,
    threads: int = 1,
) -> np.ndarray:
    """Return the tolerances that minimise Σ φ within a budget of loss.

    Parameters
    ----------
    derivative
        φ' of every weight, which must not fall as τ grows (φ is convex). It is called from several threads
        where there are several.
    gradients
        g, any shape, float32 or float64: the dtype that everything is computed in.
    budget
        ΔL >= 0.
    bound
        Upper bounds of τ, broadcast to g. Weights with g = 0 get the minimum of φ within their bound.

    Returns
    -------
    The shape and dtype of g.

    Raises
    ------
    SettingError
        On a negative budget or bound, and where a value is NaN or a gradient infinite.
    """
    slopes, upper = prepare(gradients, budget, bound)
    shape = np.shape(gradients)
    with ThreadPoolExecutor(threads) as pool:
        problem = _Problem(derivative, slopes, upper, pool)
        free = problem.at(0.0, np.broadcast_to(slopes.dtype.type(0), upper.shape), upper)
        if np.array_equal(free.tolerances, upper):
            free = _Point(0.0, upper, free.cost)
        if free.cost <= budget:
            return free.tolerances.reshape(shape).copy()
        if budget == 0:
            return np.where(slopes > 0, 0, free.tolerances).reshape(shape)
        start = _sampled_multiplier(derivative, slopes, upper, budget)
        return _narrow(problem, budget, free, start, FIRST_STEP, EXACTNESS[slopes.dtype]).tolerances.reshape(
            shape
        )


class _Point:
    """The tolerances at one λ, and what they cost."""

    def __init__(self, multiplier: float, tolerances: np.ndarray, cost: float) -> None:
        self.multiplier, self.tolerances, self.cost = multiplier, tolerances, cost


class _Problem:
    """Solves `φ'_i(τ) + λ |g_i| = 0` for all weights at once."""

    def __init__(
        self, derivative: Derivative, slopes: np.ndarray, upper: np.ndarray, pool: ThreadPoolExecutor
    ) -> None:
        self.slopes, self.upper = slopes, upper
        self._derivative, self._pool = derivative, pool
        cut = list(parts(slopes.size))
        self._shares = [cut[start : start + PARTS_AT_ONCE] for start in range(0, len(cut), PARTS_AT_ONCE)]

    def at(self, multiplier: float, lowest: np.ndarray, highest: np.ndarray) -> _Point:
        """Return the point at λ, whose tolerances are known to lie between two others."""
        result = np.empty_like(self.slopes)

        def some(share: list[slice]) -> float:
            with np.errstate(over="ignore", invalid="ignore"):
                for part in share:
                    result[part] = self._bisect(multiplier, part, lowest[part], highest[part])
            return sum(cost_of(self.slopes[part], result[part]) for part in share)

        # Added in order, whichever thread comes first.
        costs = list(self._pool.map(some, self._shares))
        return _Point(multiplier, result, math.fsum(costs))

    def _bisect(self, multiplier: float, part: slice, lowest: np.ndarray, highest: np.ndarray) -> np.ndarray:
        """Return the largest τ in a bracket at which `φ' + λ |g|` is not above 0, or its lower end."""
        dtype = lowest.dtype
        wanted = self.slopes[part] * dtype.type(-multiplier)
        if (self._derivative(highest, part) <= wanted).all():
            return highest
        # Floats from 0 on are in the order of their bits. The answer is in [low, low + size).
        bits = np.dtype(f"int{8 * dtype.itemsize}")
        low = lowest.view(bits).copy()
        size = highest.view(bits) - low + 1
        middle, rising = np.empty_like(low), np.empty_like(low)
        for _ in range(int(size.max(initial=1) - 1).bit_length()):
            half = size >> 1
            np.add(low, half, out=middle)
            # The sign bit, spread over the number: all ones where φ' + λ |g| > 0.
            np.subtract(wanted, self._derivative(middle.view(dtype), part), out=rising.view(dtype))
            np.right_shift(rising, 8 * dtype.itemsize - 1, out=rising)
            np.bitwise_and(rising, half, out=rising)
            np.subtract(middle, rising, out=low)
            size -= half
        return low.view(dtype)


def _narrow(
    problem: _Problem, budget: float, free: _Point, start: float, step: float, exactness: float
) -> _Point:
    """Return the point that costs as near as possible to the budget, and no more.

    `free` is the point at λ = 0, which costs more than the budget. λ is first sought around `start`, with
    steps by a factor that begins at `step`.
    """
    dtype = problem.slopes.dtype
    # A zero for every weight, without the memory.
    nothing = _Point(math.inf, np.broadcast_to(dtype.type(0), problem.upper.shape), 0.0)
    low, high, before = free, nothing, 0
    above = below = math.nan  # by how much the ends of the bracket cost more than the budget
    multiplier = start
    for _ in range(MAX_ROUNDS):
        point = problem.at(multiplier, high.tolerances, low.tolerances)
        excess = point.cost - budget
        if -exactness * budget <= excess <= 0:
            return point
        side = 1 if excess > 0 else -1
        # The rule of Illinois: an end that stays twice running counts half.
        if side > 0:
            low, above, below = point, excess, below / 2 if before == side else below
        else:
            high, below, above = point, excess, above / 2 if before == side else above
        before = side
        if high is nothing or low is free:
            multiplier, step = multiplier * step**side, min(step**2, LARGEST_STEP)
            if not float(np.finfo(dtype).tiny) < multiplier < float(np.finfo(dtype).max):
                break
        else:
            multiplier = _inside(low.multiplier, high.multiplier, above, below)
            # Below this, tolerances of this dtype are the same at both ends.
            if high.multiplier - low.multiplier <= float(np.finfo(dtype).eps) / 4 * high.multiplier:
                break
    return high


def _inside(low: float, high: float, above: float, below: float) -> float:
    """Return where a straight line crosses 0 that is `above` > 0 at `low` and `below` < 0 at `high`."""
    crossing = (low * below - high * above) / (below - above)
    return crossing if low < crossing < high else (low + high) / 2


def _sampled_multiplier(
    derivative: Derivative, slopes: np.ndarray, upper: np.ndarray, budget: float
) -> float:
    """Return about what λ is, from an even sample of the weights and their share of the budget."""
    every = -(-slopes.size // SAMPLE)
    chosen = np.arange(0, slopes.size, every)
    slopes, upper = slopes[chosen], upper[chosen]

    def sampled(tolerances: np.ndarray, part: Part) -> np.ndarray:
        return derivative(tolerances, chosen[part])

    with ThreadPoolExecutor(1) as pool:
        problem = _Problem(sampled, slopes, upper, pool)
        free = _Point(0.0, upper, math.inf)
        found = _narrow(problem, budget / every, free, 1.0, 16.0, 1e-4).multiplier
    return found if math.isfinite(found) else 1.0
