"""Exact minimisers of the quadratic model where they are known: pruning and fixed sets of values."""

from collections.abc import Sequence

import numpy as np

from tvm_compress.errors import SettingError
from tvm_compress.fastlc.quadratic import QuadraticModel


def pruning_gains(model: QuadraticModel) -> np.ndarray:
    """What each weight is worth: by how much the model's loss grows when it is 0 instead of its best value.

    `½ h (w - g/h)²`. Erratum: the poster's `g w - ½ h w² - g²/(2h)` is minus that, so its "largest values"
    would keep the weights that matter least. With g = 0 this is optimal brain damage. Where h is 0 the model
    has no best value; the weight stays as it is and is ranked by |g w|.
    """
    gains = np.square(model.target)
    gains *= model.curvature
    gains *= 0.5
    flat = model.curvature == 0
    if flat.any():
        gains[flat] = np.abs(model.gradient[flat] * model.weights[flat])
    return gains


def largest(gains: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` largest values, the earlier ones among equals."""
    flat = np.asarray(gains).ravel()
    if not 0 <= count <= flat.size:
        raise SettingError(f"{count} of {flat.size} weights cannot be kept.")
    if count == 0:
        return np.zeros(np.shape(gains), bool)
    threshold = np.partition(flat, flat.size - count)[flat.size - count]
    mask = flat > threshold
    ties = np.flatnonzero(flat == threshold)
    mask[ties[: count - int(np.count_nonzero(mask))]] = True
    return mask.reshape(np.shape(gains))


def prune_exactly(model: QuadraticModel, kept: int) -> np.ndarray:
    """Weights, at most `kept` of them not 0, with the least loss of the model.

    Raises
    ------
    SettingError
        If `kept` is negative or more than there are weights.
    """
    return np.where(largest(pruning_gains(model), kept), model.target, 0.0)


def choose_exactly(model: QuadraticModel, values: Sequence[float] = (-1.0, 1.0)) -> np.ndarray:
    """Weights, each one of a few values, with the least loss of the model: every value is tried."""
    options = np.asarray(values, np.float64)
    change = options.reshape(-1, *(1,) * model.weights.ndim) - model.weights
    losses = model.gradient * change + 0.5 * model.curvature * change**2
    return options[losses.argmin(axis=0)]
