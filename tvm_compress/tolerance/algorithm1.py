"""TOCO's outer loop: tolerances, compression, evaluation, again, while the loss stays within its bound.

Source: TOCO, Algorithm 1. What differs from the paper:

- The loop ends as soon as one of its three conditions fails. Erratum: the paper joins them with "or", its
  text says that each of them ends the loop.
- The budget is the room below the loss bound times a gain. The sum of |g| τ bounds the loss for the worst
  signs of all moves; real moves cancel. An accepted iteration that used less than half of the room raises the
  gain (x 2, or x 4 if it changed hardly anything), a rejected one lowers it (/ 4); the trust radius is halved
  where the gain is 1, the paper's value, already. The loss is evaluated in any case.
- By `sensitivity`, each weight has the geometric mean of the |g| of its filter and of the network instead of
  its own: a weight's own says little of what happens when thousands go together.
- An iteration that prunes takes at most a `step` of the weights that are left (by a lower gain): what is
  pruned changes the gradients of the rest, which the next iteration then sees.
- The loss bound also rises after `PATIENCE` rejected iterations without progress between them: where groups
  are large, the loss may jump past it instead of coming close. It rises to its last value exactly, and no
  further.
- |g| is the root mean square over a few batches, and over those of the iterations before with fading weights:
  weights whose gradient comes out too small once would otherwise be pruned in some iteration or other. The
  paper takes one batch and forgets it (`batches=1, memory=0`).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tvm_compress.errors import DataError, ModelError
from tvm_compress.tolerance.closed_form import logarithmic
from tvm_compress.tolerance.committee import Committee
from tvm_compress.tolerance.compression_models import Compressed, CompressionModel, Values
from tvm_compress.tolerance.importance import Importance
from tvm_compress.tolerance.settings import TocoSettings
from tvm_compress.twin import Twin

# ε as a share of the step from one loss bound to the next.
CLOSE = 0.1
# The trust radius ends the loop at this share of its first value.
LEAST_RADIUS = 1e-3
# Rejected iterations without progress between them after which the loss bound rises.
PATIENCE = 4
# An accepted iteration that removes less than this share of what is left is no progress.
PROGRESS = 1e-3
LARGEST_GAIN = 2.0**40
# Gains that are tried, by bisection, until an iteration takes no more than a step.
STEP_TRIES = 12


@dataclass(frozen=True)
class Iteration:
    """What one iteration did.

    Parameters
    ----------
    number
        From 0.
    loss
        Of the weights that were tried.
    accepted
        Whether they were kept.
    loss_bound, trust_radius, gain
        What they were found with.
    size
        Of what is kept after the iteration: share of weights left, or mean bits.
    """

    number: int
    loss: float
    accepted: bool
    loss_bound: float
    trust_radius: float
    gain: float
    size: float

    def to_dict(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)


@dataclass
class State:
    """Everything that the next iteration depends on."""

    compressed: Compressed
    logits: np.ndarray
    loss: float
    loss_bound: float
    trust_radius: float
    gain: float = 1.0
    rejected: int = 0
    number: int = 0
    importance: Importance = field(default_factory=Importance)
    squares: dict[str, np.ndarray] = field(default_factory=dict)  # fading means of g²


class Algorithm1:
    """The loop over one model, its compression and the images that the loss is evaluated on.

    Parameters
    ----------
    twin
        Of the dense model; its weights are changed.
    model
        What to compress to.
    x, y
        Inputs [N, ...] as the twin takes them, labels [N].

    Attributes
    ----------
    dense_loss
        L(w0).

    Raises
    ------
    DataError
        If the dense model's loss is 0 or not finite on these images.
    """

    def __init__(
        self, twin: Twin, model: CompressionModel, x: np.ndarray, y: np.ndarray, settings: TocoSettings
    ) -> None:
        self._twin, self._model, self._x, self._y, self._settings = twin, model, x, y, settings
        self._dense = {name: twin.tensors[name].detach().numpy().copy() for name in model.parameters}
        logits = twin.predict(x)
        self.dense_loss = _cross_entropy(logits, y)
        if not (np.isfinite(self.dense_loss) and self.dense_loss > 0):
            raise DataError(
                f"The model's loss on {len(x)} images is {self.dense_loss}: no bound is a factor of it.",
                "Give images on which it is not perfectly sure, or check model and images.",
            )
        self._committee: Committee | None = None
        if settings.sampling == "active":
            last = twin.sites[-1]
            self._committee = Committee(logits, twin.site_inputs(x, [last])[last], y)
        self._first_radius = settings.trust_radius * max(float(np.abs(w).max()) for w in self._dense.values())
        self._logits = logits

    def start(self) -> State:
        """Return the state before the first iteration."""
        compressed = self._model.start(self._dense)
        return State(compressed, self._logits, self.dense_loss, self.dense_loss, self._first_radius)

    def restore(self, state: State) -> State:
        """Return a state that was saved without its logits, which are computed again."""
        self._write(state.compressed.weights)
        state.logits = self._twin.predict(self._x)
        return state

    def goes_on(self, state: State) -> bool:
        """Whether all three conditions of the loop hold."""
        return (
            state.loss_bound <= self._settings.loss_bound * self.dense_loss
            and state.trust_radius > LEAST_RADIUS * self._first_radius
            and state.number < self._settings.iterations
        )

    def run(self, state: State) -> Iterator[Iteration]:
        """Iterate on, changing the state, and give each iteration when it is done."""
        while self.goes_on(state):
            yield self._iterate(state)
        self._write(state.compressed.weights)

    def _iterate(self, state: State) -> Iteration:
        tried = self._propose(state)
        self._write(tried.weights)
        logits = self._twin.predict(self._x)
        loss = _cross_entropy(logits, self._y)
        accepted = bool(loss <= state.loss_bound)
        bound, radius, gain = state.loss_bound, state.trust_radius, state.gain
        before = state.compressed
        if accepted:
            room = state.loss_bound - state.loss
            timid = room > 0 and loss - state.loss < room / 2
            old = self._model.size(before)
            progress = old - self._model.size(tried) > PROGRESS * old
            state.compressed, state.logits, state.loss = tried, logits, loss
            state.trust_radius = min(2 * radius, self._first_radius / self._settings.trust_radius)
            state.gain = min((2 if progress else 4) * gain, LARGEST_GAIN) if timid else gain
            state.rejected = 0 if progress else state.rejected
        else:
            state.trust_radius, state.gain = (radius / 2, gain) if gain == 1 else (radius, max(1.0, gain / 4))
            state.rejected += 1
        state.importance.update(self._model.costs(before), self._model.costs(state.compressed))
        self._raise_bound(state, loss)
        state.number += 1
        return Iteration(
            state.number - 1, loss, accepted, bound, radius, gain, self._model.size(state.compressed)
        )

    def _propose(self, state: State) -> Compressed:
        """Compress within the tolerances; lower the gain while more goes than an iteration may take."""
        gradients = self._gradients(state)
        old = self._model.size(state.compressed)
        least = (1 - self._settings.step) * old if self._settings.objective == "prune" else 0.0
        room = max(0.0, state.loss_bound - state.loss)
        tried = self._model.apply(state.compressed, self._tolerances(state, gradients, room * state.gain))
        low, high = 1.0, state.gain
        for _ in range(STEP_TRIES if self._model.size(tried) < least and high > 1 else 0):
            gain = (low * high) ** 0.5
            finer = self._model.apply(state.compressed, self._tolerances(state, gradients, room * gain))
            size = self._model.size(finer)
            if size >= old:
                low = gain
                continue
            # Where every group is more than the step, the least that goes at all is taken.
            state.gain, tried, high = gain, finer, gain
            if size >= least:
                break
        return tried

    def _raise_bound(self, state: State, loss: float) -> None:
        """Raise the loss bound where the loss has come up to it; at last so far that the loop ends."""
        step = (self._settings.sigma - 1) * self.dense_loss
        if abs(state.loss_bound - loss) >= CLOSE * step and state.rejected < PATIENCE:
            return
        last = self._settings.loss_bound * self.dense_loss
        raised = state.loss_bound * self._settings.sigma
        # The last step is shortened to end on the bound; the one after it leaves the loop.
        state.loss_bound = min(raised, last) if state.loss_bound < last else raised
        state.rejected = 0

    def _tolerances(self, state: State, gradients: Values, budget: float) -> dict[str, np.ndarray]:
        """Return τ of every weight: one problem over all the parameters."""
        names = self._model.parameters
        g = np.concatenate([gradients[name].ravel() for name in names])
        if not np.isfinite(g).all():
            raise ModelError("A gradient is NaN or infinite.", "Check the images and the model's parameters.")
        if not g.any():
            raise DataError(
                f"The gradients of all weights are zero on the {self._settings.sampling} samples: "
                "nothing tells which weights matter.",
                "Give images on which the model is not perfectly sure, or check that it is not saturated.",
            )
        bound = np.concatenate(
            [self._model.bound(state.compressed, name, state.trust_radius).ravel() for name in names]
        )
        cuts = np.cumsum([gradients[name].size for name in names])[:-1]
        tolerances = np.split(logarithmic(g, budget, bound), cuts)
        return {n: t.reshape(gradients[n].shape) for n, t in zip(names, tolerances, strict=True)}

    def _gradients(self, state: State) -> dict[str, np.ndarray]:
        """Return |g| at the state's weights, by parameter, divided by what the weights are worth."""
        self._write(state.compressed.weights)
        fresh: dict[str, np.ndarray] = {}
        batches = self._batches(state)
        for batch in batches:
            found = self._twin.gradients(self._x[batch], self._y[batch])
            for name in self._model.parameters:
                fresh[name] = fresh.get(name, 0) + np.square(found[name], dtype=np.float32) / len(batches)
        # Weights 1, m, m², ... of this iteration and those before, divided by their sum.
        memory, count = self._settings.memory, state.number
        kept = memory * (1 - memory**count) / (1 - memory ** (count + 1))
        for name, square in fresh.items():
            old = state.squares.get(name, np.float32(0))
            state.squares[name] = (np.float32(kept) * old + np.float32(1 - kept) * square).astype(np.float32)
        found = {name: np.sqrt(square) for name, square in state.squares.items()}
        found = found if self._settings.sensitivity == "weight" else shrink_to_filters(found)
        return {name: g / np.float32(self._model.worth.get(name, 1)) for name, g in found.items()}

    def _batches(self, state: State) -> list[np.ndarray | slice]:
        settings, n = self._settings, len(self._x)
        if settings.sampling == "all":
            return [slice(None)]
        # A generator of the iteration's own: a resumed run draws the same samples.
        rng = np.random.default_rng([settings.seed, state.number])
        count = min(n, settings.batches * settings.batch_size)
        if self._committee is None:
            drawn = rng.choice(n, count, replace=False)
        else:
            drawn = rng.permutation(self._committee.query(state.logits, settings.share, rng, count))
        return [drawn[start : start + settings.batch_size] for start in range(0, count, settings.batch_size)]

    def _write(self, weights: Values) -> None:
        with torch.no_grad():
            for name, value in weights.items():
                self._twin.tensors[name].copy_(torch.from_numpy(value))


def shrink_to_filters(gradients: Values) -> dict[str, np.ndarray]:
    """Give each weight the geometric mean of the |g| of its filter and of the whole network.

    Parameters
    ----------
    gradients
        |g| by parameter, each [filters, ...].
    """
    everything = np.concatenate([value.ravel() for value in gradients.values()]).mean()
    shrunk = {}
    for name, value in gradients.items():
        mean = value.reshape(len(value), -1).mean(axis=1).reshape(-1, *[1] * (value.ndim - 1))
        shrunk[name] = np.broadcast_to(np.sqrt(mean * everything), value.shape).astype(value.dtype)
    return shrunk


def _cross_entropy(logits: np.ndarray, y: np.ndarray) -> float:
    return float(F.cross_entropy(torch.from_numpy(logits).double(), torch.as_tensor(y, dtype=torch.int64)))
