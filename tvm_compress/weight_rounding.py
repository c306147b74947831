"""Rounding of weights by what it does to the layers' outputs, in the place of rounding to the nearest.

The nearest integer of each weight is not the best choice for the layer: errors of weights that see
correlated inputs add up or cancel. Here the integers of each output channel are chosen to keep the layer's
output, `Σ_p s_p ||(Q(w) - w)ᵀ x_p||²` over patches x_p of calibration images (Nagel et al. 2020, "Up or
down? Adaptive rounding", section 3.2, states this objective). It is minimised column by column: each
rounding error is spread over the columns that follow, by the inverse of `H = Σ_p s_p x_p x_pᵀ` (Frantar and
Alistarh 2022, "Optimal brain compression"), columns of much curvature first.

The weights s_p are 1, or the curvature of the loss at the layer's output: then places that the loss does not
look at do not count.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
import tvm

from tvm_compress.errors import DataError, ModelError, SettingError
from tvm_compress.passes.insert_qdq import WEIGHT_SCALE
from tvm_compress.passes.params import get_params, get_stage, set_params
from tvm_compress.passes.quantization import weight_limit
from tvm_compress.passes.sites import Site, find_sites
from tvm_compress.twin import Twin
from tvm_compress.twin.float_ops import split_padding, to_nchw
from tvm_compress.twin.twin import SiteRecord

METHODS = ("nearest", "reconstruction", "curvature")

# Share of H's mean diagonal that is added to it: columns that no image moves have no curvature of their own.
DAMPING = 0.01
# Columns whose errors are spread among themselves at once, and over all others together afterwards.
_BLOCK = 64


def round_weights(
    module: tvm.IRModule,
    bits: Mapping[str, int],
    x: np.ndarray,
    method: str = "reconstruction",
    batch_size: int = 32,
    seed: int = 0,
) -> tvm.IRModule:
    """Give a QDQ module whose weights stand on the integers that its layers lose least by.

    The scales stay.

    Parameters
    ----------
    bits
        Weight bits of the sites to round; weights of 1 bit have no rounding and stay as they are.
    x
        Normalised images [N, C, H, W], without labels.
    method
        "reconstruction": every place counts alike. "curvature": by the squared derivative of the loss by the
        layer's output, for labels drawn from the model's own distribution (a sample of the Gauss-Newton
        matrix). "nearest": nothing is done.
    seed
        Of the labels that are drawn.

    Raises
    ------
    ModelError
        If the module is not at the QDQ stage.
    SettingError
        On an unknown method.
    DataError
        If there are no images.
    """
    if method not in METHODS:
        raise SettingError(f"Weights cannot be rounded by {method!r}.", f"Known are: {', '.join(METHODS)}.")
    if get_stage(module) != "qdq":
        raise ModelError(
            f"Weights are rounded at the stage qdq, not {get_stage(module)!r}.", "Quantize the module first."
        )
    if method == "nearest":
        return module
    if not len(x):
        raise DataError("There are no images to round weights by.")
    sites = [site for site in find_sites(module) if 1 < bits.get(site.name, 1) <= 8]
    params, changed = get_params(module), {}
    for site, seen in zip(sites, _second_moments(module, sites, x, method, batch_size, seed), strict=True):
        weight = params[site.weight]
        scale = params[site.name + WEIGHT_SCALE].astype(np.float64)
        rows = weight.reshape(len(seen), len(weight) // len(seen), -1).astype(np.float64)
        limit = weight_limit(bits[site.name])
        steps = scale.reshape(rows.shape[:2])
        rounded = [_round_group(*group, limit) for group in zip(rows, steps, seen, strict=True)]
        # The product of float32 numbers that the quantizer divides again gives the same integers.
        changed[site.weight] = (np.stack(rounded) * steps[..., None]).reshape(weight.shape).astype(np.float32)
    return set_params(module, changed)


def _second_moments(
    module: tvm.IRModule, sites: list[Site], x: np.ndarray, method: str, batch_size: int, seed: int
) -> list[np.ndarray]:
    """H of each site, [G, K, K] for its G groups, over all images."""
    twin = Twin(module)
    generator = torch.Generator().manual_seed(seed)
    totals: dict[str, torch.Tensor] = {}
    for start in range(0, len(x), batch_size):
        images = torch.from_numpy(np.ascontiguousarray(x[start : start + batch_size]))
        with torch.set_grad_enabled(method == "curvature"):
            logits, records = twin.record(images)
        wanted = {site.name: records[site.name] for site in sites}
        shares = _shares(logits, wanted, generator) if method == "curvature" else {}
        for name, record in wanted.items():
            patches = _patches(record)
            weighted = patches if name not in shares else patches * shares[name][:, None, None, :]
            # [N, G, K, L]: sums over images and places.
            moment = torch.einsum("ngkl,ngml->gkm", weighted, patches)
            totals[name] = totals[name] + moment if name in totals else moment
    return [totals[site.name].double().numpy() for site in sites]


def _shares(
    logits: torch.Tensor, records: Mapping[str, SiteRecord], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Squared derivative of the loss at each place [N, L] of the sites' outputs, 1 on average."""
    labels = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
    outputs = [record.output for record in records.values()]
    slopes = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), outputs)
    shares = {}
    for name, slope in zip(records, slopes, strict=True):
        squares = slope.square().sum(-1).reshape(len(logits), -1)
        shares[name] = squares / squares.mean().clamp_min(1e-30)
    return shares


def _patches(record: SiteRecord) -> torch.Tensor:
    """What the weights of each group multiply, [N, G, K, L]."""
    node, x = record.node, record.input.detach()
    if node.op == "relax.matmul":
        return x[:, None, :, None]
    groups = int(node.attr("groups", 1))
    info = node.info[1]
    assert info is not None
    padding, before = split_padding(node.ints("padding"))
    nchw = to_nchw(x) if before is None else F.pad(to_nchw(x), before)
    kernel = info.shape[2], info.shape[3]
    unfolded = F.unfold(nchw, kernel, node.ints("dilation"), padding, node.ints("strides"))
    return unfolded.reshape(len(x), groups, -1, unfolded.shape[-1])


def _round_group(rows: np.ndarray, scale: np.ndarray, moment: np.ndarray, limit: int) -> np.ndarray:
    """Integers [O, K], as float64, of weights [O, K] with scales [O]."""
    # Columns of much curvature first: their errors find the most columns that can make up for them.
    order = np.argsort(-np.diag(moment), kind="stable")
    units = rows[:, order] / scale[:, None]
    factor = _inverse_factor(moment[np.ix_(order, order)])
    integers = np.empty_like(units)
    for start in range(0, units.shape[1], _BLOCK):
        end = min(start + _BLOCK, units.shape[1])
        block, errors = units[:, start:end].copy(), np.empty((len(units), end - start))
        for k in range(end - start):
            column = factor[start + k, start + k : end]
            chosen = np.clip(np.rint(block[:, k]), -limit, limit)
            integers[:, start + k] = chosen
            errors[:, k] = (block[:, k] - chosen) / column[0]
            block[:, k:] -= np.outer(errors[:, k], column)
        units[:, end:] -= errors @ factor[start:end, end:]
    result = np.empty_like(integers)
    result[:, order] = integers
    return result


def _inverse_factor(moment: np.ndarray) -> np.ndarray:
    """Upper triangular U with `Uᵀ U` the inverse of H, damped."""
    mean = float(np.diag(moment).mean())
    damped = moment + np.eye(len(moment)) * (DAMPING * mean if mean > 0 else 1.0)
    inverse = np.linalg.inv(damped)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T
