"""Correction of biases: what quantization adds to each channel's mean is taken off again.

Rounding and clipping move a layer's outputs, and channel by channel the move does not average out. Its mean
over calibration images is subtracted where the channel is shifted anyway (Nagel et al. 2019, "Data-free
quantization through weight equalization and bias correction", section 4.2 and appendix D, the empirical
form): from the running mean of the batch norm that follows, or from the bias; a layer with neither gets a
bias. Layers are corrected in order of execution, each behind those that are corrected already.
"""

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


def correct_biases(module: tvm.IRModule, dense: tvm.IRModule, x: np.ndarray) -> tvm.IRModule:
    """Give a QDQ module whose quantized layers have, on the images, the mean outputs of the dense ones.

    Parameters
    ----------
    dense
        Float module that it was quantized from, with the same sites.
    x
        Normalised images [N, C, H, W], without labels; the first `MAX_IMAGES` are used.

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
    x = x[:MAX_IMAGES]
    params = get_params(module)
    sites = [name.removesuffix(WEIGHT_SCALE) for name in params if name.endswith(WEIGHT_SCALE)]
    wanted = _mean_outputs(dense, x)
    if missing := sorted(set(sites) - set(wanted)):
        raise ModelError(f"The dense module has no site {missing[0]!r}.", "Give what it was quantized from.")
    moved = _moved_means(module, {name: wanted[name] for name in sites}, x)
    without = [name for name in sites if name not in _shifts(module)]
    if without:
        module = AddBias(without)(module)
    params, shifts = get_params(module), _shifts(module)
    changed = {}
    for site in sites:
        name, sign = shifts[site]
        changed[name] = (params[name] + sign * moved[site]).astype(np.float32)
    return set_params(module, changed)


def _mean_outputs(module: tvm.IRModule, x: np.ndarray) -> dict[str, np.ndarray]:
    """Mean output of each site by channel, float64 [O], over images and places."""
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}

    def add(site: str, value: torch.Tensor) -> None:
        rows = value.reshape(-1, value.shape[-1])
        sums[site] = sums.get(site, 0.0) + rows.sum(0, dtype=torch.float64).numpy()
        counts[site] = counts.get(site, 0) + len(rows)

    Twin(module).site_outputs(x, add)
    return {site: total / counts[site] for site, total in sums.items()}


def _moved_means(module: tvm.IRModule, wanted: dict[str, np.ndarray], x: np.ndarray) -> dict[str, np.ndarray]:
    """How far each site's mean output is from what is wanted once those before it are right."""
    moved: dict[str, np.ndarray] = {}

    def correct(site: str, value: torch.Tensor) -> None:
        if site in wanted:
            axes = tuple(range(value.dim() - 1))
            moved[site] = value.mean(axes, dtype=torch.float64).numpy() - wanted[site]
            value.sub_(torch.from_numpy(moved[site].astype(np.float32)))

    Twin(module).site_outputs(x, correct, batch_size=len(x))
    return moved


def _shifts(module: tvm.IRModule) -> dict[str, tuple[str, float]]:
    """Parameter that shifts a site's output, and its sign; sites without one are missing."""
    function, params = module["main"], get_params(module)
    sites = {var: name for name, var in site_outputs(function).items()}
    found: dict[str, tuple[str, float]] = {}
    for _, value in bindings(function):
        if operator(value) == "relax.nn.batch_norm" and value.args[0] in sites:
            found[sites[value.args[0]]] = (value.args[3].name, 1.0)
        elif operator(value) == "relax.add":
            for one, other in (value.args, reversed(value.args)):
                name = getattr(other, "name", "")
                if one in sites and name in params and params[name].shape == (int(one.ty.shape[-1]),):
                    found[sites[one]] = (name, -1.0)
    return found
