"""Set weights to zero, by masks or as a policy says: float -> float, shapes stay."""

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import IRModule

from tvm_compress.errors import PolicyError
from tvm_compress.passes.module_pass import ModulePass
from tvm_compress.passes.params import get_params, require_stage, set_params
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.passes.sites import find_sites
from tvm_compress.passes.weight_groups import reduce_tiles, spread_tiles, tile_sizes

Scores = Mapping[str, np.ndarray]


@tvm.transform.module_pass(opt_level=0, name="tvm_compress.PruneWeights")
class PruneWeights(ModulePass):
    """Write zeros into parameters; code, names and shapes stay: float -> float.

    Parameters
    ----------
    masks
        By parameter's name, bool of its shape: False goes to zero. Parameters that are not named stay.
        `find_masks` makes them of a policy.

    Raises
    ------
    PolicyError
        Where a mask fits no parameter; names it.
    """

    def __init__(self, masks: Mapping[str, np.ndarray]) -> None:
        self._masks = dict(masks)

    def transform_module(self, module: IRModule, context: tvm.transform.PassContext) -> IRModule:
        """Apply the pass."""
        del context
        require_stage(module, "float", what="PruneWeights")
        params = get_params(module)
        for name, mask in self._masks.items():
            if name not in params:
                raise PolicyError(f"A mask is for {name!r}, which is no parameter of the model.")
            if mask.shape != params[name].shape or mask.dtype != np.bool_:
                raise PolicyError(
                    f"The mask of {name!r} must be bool {list(params[name].shape)}, "
                    f"not {mask.dtype} {list(mask.shape)}."
                )
        zeroed = {name: np.where(mask, params[name], 0) for name, mask in self._masks.items()}
        return set_params(module, {n: v.astype(params[n].dtype, copy=False) for n, v in zeroed.items()})


def find_masks(
    module: IRModule, policy: CompressionPolicy, scores: Scores | None = None
) -> dict[str, np.ndarray]:
    """Give the masks of a policy's `weight_pruning_ratio` and `group`, by weight parameter's name.

    Groups go in the order of their scores, the lowest first and the earlier one among equals, as many as fit
    into the ratio; a group's score is the highest of its members'.

    Parameters
    ----------
    scores
        By weight parameter's name, one number per weight; |w| where there is none.

    Raises
    ------
    PolicyError
        Where the policy does not fit the module.
    """
    require_stage(module, "float", what="find_masks")
    sites = find_sites(module)
    policy.check(sites)
    params = get_params(module)
    masks = {}
    for site in sites:
        wanted = policy[site.name]
        if wanted.weight_pruning_ratio == 0 or wanted.group == "channel":
            continue
        weight = params[site.weight]
        score = np.abs(weight) if scores is None or site.weight not in scores else scores[site.weight]
        if score.shape != weight.shape or not np.isfinite(score).all():
            raise PolicyError(
                f"Site {site.name!r} needs finite scores {list(weight.shape)}, "
                f"not an array of shape {list(score.shape)}."
            )
        masks[site.weight] = _lowest_removed(score, wanted.group, wanted.weight_pruning_ratio)
    return masks


def _lowest_removed(score: np.ndarray, group: str, ratio: float) -> np.ndarray:
    tiles = reduce_tiles(score, group)
    order = np.argsort(tiles, axis=None, kind="stable")
    removed = np.cumsum(tile_sizes(group, score.shape).ravel()[order])
    # A ratio that was counted on such a mask gives that mask again, whatever the division rounded.
    fits = int(np.searchsorted(removed, ratio * score.size * (1 + 1e-12) + 1e-9, side="right"))
    kept = np.ones(tiles.size, bool)
    kept[order[:fits]] = False
    return spread_tiles(kept.reshape(tiles.shape), group, score.shape)
