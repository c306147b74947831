"""Which channels a network can do without: tolerances aggregated over coupled sets."""

from collections.abc import Mapping

import numpy as np
import tvm

from tvm_compress.errors import DataError, SettingError
from tvm_compress.passes.groups import CoupledSet, Cut, find_coupled_sets
from tvm_compress.passes.params import get_params
from tvm_compress.twin import Twin

CRITERIA = ("tolerance", "l1", "l2")


def channel_scores(
    module: tvm.IRModule, x: np.ndarray, y: np.ndarray, criterion: str = "tolerance", batch_size: int = 8
) -> dict[str, np.ndarray]:
    """Score every channel of every coupled set; the larger, the more the channel is needed.

    "tolerance" gives the smallest budget of loss ΔL at which the channel becomes prunable, after TOCO
    (section 3): with φ = -log τ over the n weights that have a gradient, the tolerances are `τ_i = ΔL / (n
    |g_i|)`, a weight may go to zero once `|w_i| <= τ_i`, and a group goes only if every member may. So a
    channel goes from `ΔL = n max_i |w_i g_i|` on, the maximum being taken over all the weights that go with
    it: the filters, batch norms and biases that make it, and the weights of its consumers. (Clipping
    tolerances at |w_i| and redistributing what that frees changes the budgets, never their order.)

    Two choices differ from the paper. First, |g_i| is the root mean square of the gradient over small
    batches, not the gradient over all samples: at trained weights that one is zero but for noise. Secondly,
    all the weights of a channel count, not those of its filter alone. Measured once when this was chosen (one
    ResNet-8 on Fashion-MNIST, one seed; 25 % to 62.5 % of each set's channels removed, no fine-tuning,
    accuracy averaged over four ratios): 40 % so, 32 % by the plain gradient, 37 % by filters alone, 39 % by
    "l1", 38 % by "l2", 30 % to 31 % at random. The sum over a channel's weights did equally well; the maximum
    is the paper's rule.

    "l1" and "l2" give the mean |w| or w² of the channel's filters.

    Parameters
    ----------
    x, y
        Images [N, C, H, W] (normalised), labels [N]; "l1" and "l2" do not look at them.
    batch_size
        Images per gradient.

    Returns
    -------
    float64 [channels] by the set's name, for the sets that must not be pruned too.

    Raises
    ------
    SettingError
        On an unknown criterion.
    DataError
        If there are no images, or a gradient is not finite.
    """
    if criterion not in CRITERIA:
        raise SettingError(f"Criterion {criterion!r} is unknown.", f"Known are: {', '.join(CRITERIA)}.")
    sets = find_coupled_sets(module)
    params = get_params(module)
    if criterion != "tolerance":
        power = 1 if criterion == "l1" else 2
        return {coupled.name: _magnitudes(coupled, params, power) for coupled in sets}
    gradients = gradient_norms(module, x, y, batch_size)
    n = sum(int(np.count_nonzero(g)) for g in gradients.values())
    return {coupled.name: n * _largest_product(coupled, params, gradients) for coupled in sets}


def gradient_norms(
    module: tvm.IRModule, x: np.ndarray, y: np.ndarray, batch_size: int
) -> dict[str, np.ndarray]:
    """Root mean square, over batches, of the gradient of the mean cross-entropy, by parameter name."""
    if len(x) == 0:
        raise DataError("There are no images to take gradients of.")
    twin = Twin(module)
    squares: dict[str, np.ndarray] = {}
    starts = range(0, len(x), batch_size)
    for start in starts:
        part = slice(start, start + batch_size)
        for name, gradient in twin.gradients(x[part], y[part], batch_size).items():
            squares[name] = squares.get(name, 0.0) + np.square(gradient, dtype=np.float64)
    for name, square in squares.items():
        if not np.isfinite(square).all():
            raise DataError(
                f"The gradient of {name!r} is NaN or infinite.",
                "Check the images and the model's parameters.",
            )
    return {name: np.sqrt(square / len(starts)) for name, square in squares.items()}


def _of_channels(value: np.ndarray, cut: Cut, channels: int) -> np.ndarray:
    """Bring a parameter into the form [channels, what goes with each]."""
    along = np.moveaxis(value, cut.axis, 0)[cut.offset : cut.offset + channels * cut.repeat]
    return along.reshape(channels, -1)


def _largest_product(
    coupled: CoupledSet, params: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray]
) -> np.ndarray:
    largest = np.zeros(coupled.channels)
    for cut in coupled.cuts:
        # Running statistics have no gradients.
        if cut.parameter in gradients:
            products = np.abs(params[cut.parameter]) * gradients[cut.parameter]
            largest = np.maximum(largest, _of_channels(products, cut, coupled.channels).max(axis=1))
    return largest


def _magnitudes(coupled: CoupledSet, params: Mapping[str, np.ndarray], power: int) -> np.ndarray:
    total = np.zeros(coupled.channels)
    for cut in coupled.cuts:
        value = params[cut.parameter]
        if cut.axis == 0 and value.ndim > 1:
            powers = np.abs(value.astype(np.float64)) ** power
            total += _of_channels(powers, cut, coupled.channels).mean(axis=1)
    return total
