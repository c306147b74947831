"""What TOCO is compared with, on its interface: magnitude, optimal brain damage, random, and uniform bits.

Sources: magnitude pruning, Han et al. 2015; optimal brain damage, LeCun et al. 1990: saliency `½ h w²`, h the
diagonal of the Gauss-Newton matrix.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm

from tvm_compress.data.dataset import Split
from tvm_compress.errors import SettingError
from tvm_compress.fastlc.curvature import estimate_curvature
from tvm_compress.finetune import finetune
from tvm_compress.method import MethodResult
from tvm_compress.passes.params import get_params, set_params
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy, fingerprint
from tvm_compress.passes.prune_weights import PruneWeights
from tvm_compress.passes.sites import find_sites
from tvm_compress.passes.weight_groups import reduce_tiles, spread_tiles, tile_sizes
from tvm_compress.tolerance.bits import quantize_uniform
from tvm_compress.tolerance.compress import MAX_CODEBOOK_BITS, HoldWeights

METHODS = ("magnitude", "obd", "random", "uniform-bits")


@dataclass(frozen=True)
class BaselineSettings:
    """Settings of a baseline.

    Parameters
    ----------
    method
        One of `METHODS`.
    sparsity
        Share of all the sites' weights that goes to zero, those with the lowest scores over the whole
        network; for the pruning methods.
    bits
        1 to 8, for "uniform-bits".
    group
        A group shape but "channel"; a group's score is its members' mean.
    images
        Training images for "obd".
    finetune_epochs, learning_rate
        Afterwards, as with TOCO.

    Raises
    ------
    SettingError
        On a value outside its range.
    """

    method: str = "magnitude"
    sparsity: float = 0.5
    bits: int = 8
    group: str = "element"
    images: int = 1024
    seed: int = 0
    finetune_epochs: int = 0
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingError(f"Baseline {self.method!r} is unknown.", f"Known are: {', '.join(METHODS)}.")
        if not 0 <= self.sparsity < 1:
            raise SettingError(f"sparsity is {self.sparsity}, but must be in [0, 1).")
        if not 1 <= self.bits <= MAX_CODEBOOK_BITS:
            raise SettingError(f"bits is {self.bits}, but must be 1 to {MAX_CODEBOOK_BITS}.")


def baseline(module: tvm.IRModule, split: Split, settings: BaselineSettings) -> MethodResult:
    """Compress a float module by a baseline; the result is as TOCO's."""
    sites = find_sites(module)
    if settings.method == "uniform-bits":
        params = get_params(module)
        weights = {
            site.weight: quantize_uniform(params[site.weight], np.full(site.weight_shape, settings.bits))
            for site in sites
        }
        chosen = {site.name: SitePolicy(codebook_bits=settings.bits) for site in sites}
        compressed, summary = set_params(module, weights), {"bits_per_weight": float(settings.bits)}
    else:
        train = split.train.subset(settings.images, np.random.default_rng(settings.seed))
        scores = pruning_scores(module, settings.method, train.normalized(), train.y, settings.seed)
        masks = global_masks(scores, settings.sparsity, settings.group)
        compressed = PruneWeights(masks)(module)
        weights = {site.weight: get_params(compressed)[site.weight] for site in sites}
        chosen = {
            site.name: SitePolicy(
                weight_pruning_ratio=1 - int(np.count_nonzero(masks[site.weight])) / masks[site.weight].size,
                group=settings.group,
            )
            for site in sites
        }
        left = sum(int(np.count_nonzero(mask)) for mask in masks.values())
        summary = {"sparsity": 1 - left / sum(mask.size for mask in masks.values())}
    if settings.finetune_epochs:
        compressed = finetune(
            compressed,
            split.train,
            settings.finetune_epochs,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            observer=HoldWeights(compressed, weights, zeros_only=settings.method != "uniform-bits"),
        )
    policy = CompressionPolicy(
        sites=chosen, seed=settings.seed, found_by=settings.method, model=fingerprint(sites)
    )
    return MethodResult(compressed, policy, summary)


def pruning_scores(
    module: tvm.IRModule, method: str, x: np.ndarray, y: np.ndarray, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return how much weights are needed, by weight parameter's name; "magnitude", "obd" or "random"."""
    params = get_params(module)
    sites = find_sites(module)
    if method == "magnitude":
        return {site.weight: np.abs(params[site.weight]) for site in sites}
    if method == "random":
        rng = np.random.default_rng(seed)
        return {site.weight: rng.random(site.weight_shape) for site in sites}
    if method != "obd":
        raise SettingError(f"{method!r} scores no weights.", "Use magnitude, obd or random.")
    curvature = estimate_curvature(module, x, y, seed=seed).diagonal
    return {s.weight: 0.5 * curvature[s.name] * np.square(params[s.weight]) for s in sites}


def global_masks(scores: Mapping[str, np.ndarray], sparsity: float, group: str) -> dict[str, np.ndarray]:
    """Return masks, False for the groups with the lowest scores over all parameters; each keeps one group."""
    means, sizes = {}, {}
    for name, score in scores.items():
        sizes[name] = tile_sizes(group, score.shape)
        means[name] = reduce_tiles(score.astype(np.float64), group, np.add) / sizes[name]
    protected = np.concatenate([_best(mean).ravel() for mean in means.values()])
    flat = np.where(protected, np.inf, np.concatenate([mean.ravel() for mean in means.values()]))
    count = np.concatenate([size.ravel() for size in sizes.values()])
    order = np.argsort(flat, kind="stable")
    fits = int(np.searchsorted(np.cumsum(count[order]), sparsity * count.sum() + 1e-9, side="right"))
    kept = np.ones(len(flat), bool)
    kept[order[:fits]] = False
    kept |= protected
    cuts = np.split(kept, np.cumsum([mean.size for mean in means.values()])[:-1])
    return {
        name: spread_tiles(cut.reshape(means[name].shape), group, scores[name].shape)
        for name, cut in zip(means, cuts, strict=True)
    }


def _best(mean: np.ndarray) -> np.ndarray:
    best = np.zeros(mean.shape, bool)
    best.flat[int(np.argmax(mean))] = True
    return best
