"""What TOCO compresses to: pruning and uniform quantization, as Algorithm 1 sees them.

Both minimise a logarithmic φ (bit counts): pruning is the quantization whose symbols have no bits, as in the
paper's experiments ("we use the tolerances derived in the quantization to determine importance").
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from tvm_compress.tolerance.bits import MAX_BITS, bits_from_tolerances, quantize_uniform
from tvm_compress.tolerance.closed_form import bounds
from tvm_compress.tolerance.grouping import Grouping, needed_moves

Values = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Compressed:
    """Weights, and the bits of each where they are quantized, by parameter's name."""

    weights: dict[str, np.ndarray]
    bits: dict[str, np.ndarray] = field(default_factory=dict)


class CompressionModel(Protocol):
    """φ, its box, and the step from tolerances to compressed weights.

    Attributes
    ----------
    worth
        By parameter, how much a weight's compression counts; 1 where nothing is said.
    """

    parameters: tuple[str, ...]
    worth: Mapping[str, float]

    def start(self, weights: Values) -> Compressed:
        """Return the uncompressed state."""

    def bound(self, state: Compressed, name: str, trust_radius: float) -> np.ndarray:
        """Return the tolerances' upper bounds of a parameter."""

    def apply(self, state: Compressed, tolerances: Values) -> Compressed:
        """Compress further, within tolerances around the state."""

    def costs(self, state: Compressed) -> dict[str, np.ndarray]:
        """Return φ of every weight, 0 where nothing is left of it."""

    def size(self, state: Compressed) -> float:
        """Return the state's size, as a share of the uncompressed one or in mean bits per weight."""


class Pruning:
    """Weights go to zero, group by group; `by_operations`: each counts as much as it is multiplied."""

    def __init__(self, grouping: Grouping, by_operations: bool = False) -> None:
        self._grouping = grouping
        self.parameters = grouping.parameters
        self.worth: Mapping[str, float] = grouping.operations() if by_operations else {}

    def start(self, weights: Values) -> Compressed:
        """Return the uncompressed state."""
        return Compressed({name: weights[name] for name in self.parameters})

    def bound(self, state: Compressed, name: str, trust_radius: float) -> np.ndarray:
        """Return min(δ, |w|): a weight need not move further than to zero."""
        return bounds(state.weights[name], 0.0, trust_radius)

    def apply(self, state: Compressed, tolerances: Values) -> Compressed:
        """Set the groups to zero all of whose members tolerate it."""
        need = {name: needed_moves(state.weights[name], tolerances[name]) for name in self.parameters}
        masks = self._grouping.decide(need)
        return Compressed({name: np.where(masks[name], state.weights[name], 0) for name in self.parameters})

    def costs(self, state: Compressed) -> dict[str, np.ndarray]:
        """Return 1 for each weight that is left."""
        return {name: (weight != 0).astype(np.int8) for name, weight in state.weights.items()}

    def size(self, state: Compressed) -> float:
        """Return the share of the weights that is left."""
        left = sum(int(np.count_nonzero(weight)) for weight in state.weights.values())
        return left / sum(weight.size for weight in state.weights.values())


class Quantization:
    """Weights take even levels over their site's span; how many, follows from the tolerances.

    A weight's bits never rise. Weights are rounded from their uncompressed values, so that roundings do not
    add up over the iterations; whether the loss bears it is evaluated in any case.

    Parameters
    ----------
    weights
        Uncompressed, by parameter's name.
    group, percentile
        See `bits_from_tolerances`.
    """

    def __init__(self, weights: Values, group: str, percentile: float) -> None:
        self.parameters = tuple(weights)
        self.worth: Mapping[str, float] = {}
        self._original = dict(weights)
        self._group, self._percentile = group, percentile
        self._span = {name: float(np.ptp(weight)) for name, weight in weights.items()}

    def start(self, weights: Values) -> Compressed:
        """Return the uncompressed state."""
        bits = {name: np.full(weights[name].shape, MAX_BITS, np.int64) for name in self.parameters}
        return Compressed({name: weights[name] for name in self.parameters}, bits)

    def bound(self, state: Compressed, name: str, trust_radius: float) -> np.ndarray:
        """Return min(δ, half the span): with one bit no weight moves further."""
        weight = state.weights[name]
        return np.full(weight.shape, min(trust_radius, self._span[name] / 2), weight.dtype)

    def apply(self, state: Compressed, tolerances: Values) -> Compressed:
        """Round to as few levels as the tolerances allow."""
        bits = {
            name: np.minimum(
                state.bits[name],
                bits_from_tolerances(tolerances[name], self._span[name], self._group, self._percentile),
            )
            for name in self.parameters
        }
        weights = {name: quantize_uniform(self._original[name], bits[name]) for name in self.parameters}
        return Compressed(weights, bits)

    def costs(self, state: Compressed) -> dict[str, np.ndarray]:
        """Return the bits of each weight."""
        return state.bits

    def size(self, state: Compressed) -> float:
        """Return the mean bits per weight."""
        bits = state.bits.values()
        return float(sum(int(one.sum()) for one in bits)) / sum(one.size for one in bits)
