"""Correction of biases: what quantization does to each channel's mean and spread is taken off again.

Rounding and clipping move a layer's outputs, and channel by channel the move does not average out. Its mean
over calibration images is subtracted where the channel is shifted anyway (Nagel et al. 2019, "Data-free
quantization through weight equalization and bias correction", section 4.2 and appendix D, the empirical
form): from the running mean of the batch norm that follows, or from the bias; a layer with neither gets a
bias. Layers are corrected in order of execution, each behind those that are corrected already.

Difference from the paper: a batch norm's running variance is corrected too. Weights that are rounded with the
least squared error are smaller than what they stand for, by a percent or two at 4 bits, and so are the
outputs. Behind corrected means that adds up from layer to layer: after the 20 layers of a ResNet-18 with
4-bit weights a fifth of the signal would be left.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import tvm

from tvm_compress.errors import DataError, ModelError
from tvm_compress.passes.add_bias import AddBias
from tvm_compress.passes.graph import bindings, operator
from tvm_compress.passes.insert_qdq import WEIGHT_SCALE
from tvm_compress.passes.params import get_params, get_stage, set_params
from tvm_compress.passes.sites import site_outputs
from tvm_compress.twin import Twin

# All images go through the network at once: a layer is corrected in the middle of the only run.
MAX_IMAGES = 256
# A channel's spread is corrected by at most this factor: beyond it, it is noise that is left of the channel.
MAX_GAIN = 2.0


@dataclass(frozen=True)
class _Statistics:
    """Mean and standard deviation of a layer's outputs by channel, float64 [O], over images and places."""

    mean: np.ndarray
    deviation: np.ndarray


@dataclass(frozen=True)
class _Shift:
    """The parameters that shift a layer's output: a bias, or a batch norm's running mean and variance."""

    mean: str
    variance: str = ""
    epsilon: float = 0.0


def correct_biases(module: tvm.IRModule, dense: tvm.IRModule, x: np.ndarray) -> tvm.IRModule:
    """Give a QDQ module whose quantized layers have, on the images, the mean outputs of the dense ones.

    Where a batch norm follows a layer, the standard deviations are those of the dense one too.

    Parameters
    ----------
    dense
        Float module that it was quantized from, with the same sites.
    x
        Normalised images [N, C, H, W], without labels; of more than `MAX_IMAGES` so many are used, from all
        over x: data sets are often sorted by class.

    Raises
    ------
    ModelError
        If the modules are not at the stages qdq and float, or a site is missing in the dense one.
    DataError
        If there are no images.
    """
    if get_stage(module) != "qdq":
        raise ModelError(f"Biases are corrected in a QDQ module, not at stage {get_stage(module)!r}.")
    if get_stage(dense) != "float":
        raise ModelError(f"Biases are corrected towards a float module, not {get_stage(dense)!r}.")
    if len(x) == 0:
        raise DataError("There are no images to correct biases with.")
    x = x[np.linspace(0, len(x) - 1, min(len(x), MAX_IMAGES)).round().astype(int)]
    params = get_params(module)
    sites = [name.removesuffix(WEIGHT_SCALE) for name in params if name.endswith(WEIGHT_SCALE)]
    wanted = _statistics(dense, x)
    if missing := sorted(set(sites) - set(wanted)):
        raise ModelError(f"The dense module has no site {missing[0]!r}.", "Give what it was quantized from.")
    without = [name for name in sites if name not in _shifts(module)]
    if without:
        module = AddBias(without)(module)
    params, shifts = get_params(module), _shifts(module)
    most = {site: _most_gain(shifts[site], params) for site in sites if shifts[site].variance}
    changed: dict[str, np.ndarray] = {}
    for site, (found, gain) in _corrections(module, {s: wanted[s] for s in sites}, most, x).items():
        shift, mean = shifts[site], wanted[site].mean
        if not shift.variance:
            changed[shift.mean] = params[shift.mean] + (mean - found)
            continue
        # (found + (mean' - mean) / gain) is to the new statistics what mean' is to the old ones.
        changed[shift.mean] = found + (params[shift.mean] - mean) / gain
        variance = params[shift.variance].astype(np.float64) + shift.epsilon
        changed[shift.variance] = np.maximum(variance / gain**2 - shift.epsilon, 0)
    return set_params(module, {name: value.astype(np.float32) for name, value in changed.items()})


def _statistics(module: tvm.IRModule, x: np.ndarray) -> dict[str, _Statistics]:
    """Statistics of each site's outputs."""
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}

    def add(site: str, value: torch.Tensor) -> None:
        rows = value.reshape(-1, value.shape[-1]).double()
        moments = torch.stack([rows.sum(0), rows.square().sum(0)]).numpy()
        sums[site] = sums.get(site, 0.0) + moments
        counts[site] = counts.get(site, 0) + len(rows)

    Twin(module).site_outputs(x, add)
    found = {}
    for site, total in sums.items():
        mean, square = total / counts[site]
        found[site] = _Statistics(mean, np.sqrt(np.maximum(square - mean**2, 0)))
    return found


def _most_gain(shift: _Shift, params: Mapping[str, np.ndarray]) -> np.ndarray:
    """How much larger a layer's channels can be made, [O]: a variance cannot fall below 0."""
    variance = params[shift.variance].astype(np.float64)
    return np.minimum(np.sqrt(variance / shift.epsilon + 1), MAX_GAIN)


def _corrections(
    module: tvm.IRModule,
    wanted: Mapping[str, _Statistics],
    most: Mapping[str, np.ndarray],
    x: np.ndarray,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean [O] of each site's outputs once those before it are right, and what their spread lacks, a factor.

    Only sites in `most` have their spread corrected, by at most this factor.
    """
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def correct(site: str, value: torch.Tensor) -> None:
        if site not in wanted:
            return
        rows = value.reshape(-1, value.shape[-1])
        mean = rows.mean(0, dtype=torch.float64).numpy()
        gain = np.ones(len(mean))
        if site in most:
            deviation = rows.double().std(0, correction=0).numpy()
            alive = (deviation > 0) & (wanted[site].deviation > 0)
            ratio = wanted[site].deviation / np.where(alive, deviation, 1)
            gain = np.where(alive, np.clip(ratio, 1 / MAX_GAIN, most[site]), 1.0)
        found[site] = mean, gain
        offset = wanted[site].mean - mean * gain
        value.mul_(torch.from_numpy(gain.astype(np.float32)))
        value.add_(torch.from_numpy(offset.astype(np.float32)))

    Twin(module).site_outputs(x, correct, batch_size=len(x))
    return found


def _shifts(module: tvm.IRModule) -> dict[str, _Shift]:
    """Parameters that shift each site's output; sites without any are missing."""
    function, params = module["main"], get_params(module)
    sites = {var: name for name, var in site_outputs(function).items()}
    found: dict[str, _Shift] = {}
    for _, value in bindings(function):
        if operator(value) == "relax.nn.batch_norm" and value.args[0] in sites:
            mean, variance = (arg.name for arg in value.args[3:5])
            found[sites[value.args[0]]] = _Shift(mean, variance, float(value.attrs.epsilon))
        elif operator(value) == "relax.add":
            for one, other in (value.args, reversed(value.args)):
                name = getattr(other, "name", "")
                if one in sites and name in params and params[name].shape == (int(one.ty.shape[-1]),):
                    found[sites[one]] = _Shift(name)
    return found
