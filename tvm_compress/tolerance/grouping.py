"""Which weights go together: the group shapes of `passes.weight_groups`, and the channels of coupled sets."""

from collections.abc import Mapping, Sequence

import numpy as np
import tvm

from tvm_compress.errors import SettingError
from tvm_compress.passes.groups import CoupledSet, Cut, find_coupled_sets, round_channels
from tvm_compress.passes.params import get_params
from tvm_compress.passes.policy import GROUP
from tvm_compress.passes.sites import find_sites
from tvm_compress.passes.weight_groups import reduce_tiles, spread_tiles

Values = Mapping[str, np.ndarray]


class Grouping:
    """The groups of a module's weights.

    Parameters
    ----------
    group
        "element", "simd-N", "filter" or "block-MxN": groups within each site's weight. "channel": what makes
        a channel of a coupled set, which is the filters, batch norms and biases of all its producers; the
        weights that read the channel need not be small for it to go, they go with it.
    trainable
        Names of the parameters that have gradients; the running statistics of batch norms have none.

    Attributes
    ----------
    parameters
        Names of the parameters that take part, in the module's order.

    Raises
    ------
    SettingError
        On an unknown group shape, and where no channel can go.
    """

    def __init__(self, module: tvm.IRModule, group: str, trainable: Sequence[str]) -> None:
        if not GROUP.fullmatch(group):
            raise SettingError(
                f"Group {group!r} is unknown.", "Known are element, simd-N, filter, channel, block-MxN."
            )
        self.group = group
        self._sets: list[CoupledSet] = []
        if group == "channel":
            self._sets = [one for one in find_coupled_sets(module) if one.prunable]
            if not self._sets:
                raise SettingError("No channel of this model can be removed.", "Take another group shape.")
            wanted = {cut.parameter for one in self._sets for cut in _made_by(one, trainable)}
        else:
            wanted = {site.weight for site in find_sites(module)}
        self.parameters = tuple(name for name in get_params(module) if name in wanted)
        self._trainable = tuple(trainable)
        self._sites = {site.weight: site for site in find_sites(module)}

    def decide(self, need: Values) -> dict[str, np.ndarray]:
        """Return masks, False where a weight goes: a group goes only if every member may.

        Parameters
        ----------
        need
            By parameter, how many times its tolerance each weight would have to move, `|w| / τ`: it may go
            from 1 down. A site (or coupled set) always keeps the group with the greatest need.
        """
        if self.group == "channel":
            return self._decide_channels(need)
        masks = {}
        for name in self.parameters:
            tiles = reduce_tiles(need[name], self.group)
            masks[name] = spread_tiles(_kept(tiles), self.group, need[name].shape)
        return masks

    def _decide_channels(self, need: Values) -> dict[str, np.ndarray]:
        masks = {name: np.ones(need[name].shape, bool) for name in self.parameters}
        for one in self._sets:
            cuts = _made_by(one, self._trainable)
            most = np.zeros(one.channels)
            for cut in cuts:
                most = np.maximum(most, _channels_of(need[cut.parameter], cut, one.channels).max(axis=1))
            kept = _kept(most)
            for cut in cuts:
                # A view: what is written is written into the mask.
                _channels_of(masks[cut.parameter], cut, one.channels)[~kept] = False
        return masks

    def operations(self) -> dict[str, float]:
        """Return, by parameter, the multiplications that go with one of its weights, as a share of the mean.

        With "channel": those that go with a channel, of the sites that make it and of those that read it. The
        mean is geometric, over the parameters.
        """
        found: dict[str, float] = {}
        if self.group == "channel":
            for one in self._sets:
                gone = 0.0
                for cut in one.cuts:
                    site = self._sites.get(cut.parameter)
                    gone += site.macs * cut.repeat / site.weight_shape[cut.axis] if site is not None else 0.0
                found |= {cut.parameter: gone for cut in _made_by(one, self._trainable)}
        else:
            found = {name: site.macs / np.prod(site.weight_shape) for name, site in self._sites.items()}
        mean = np.exp(np.mean([np.log(found[name]) for name in self.parameters]))
        return {name: float(found[name] / mean) for name in self.parameters}

    def kept_channels(
        self, masks: Values, rounding: int = 1, importance: Values | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Return the channels that masks leave, by the name of each set that loses some.

        Parameters
        ----------
        rounding
            Channels that masks take come back until a multiple of this is left: kernels take as long without
            them.
        importance
            By parameter, needed above a rounding of 1: of a set's channels the most important come back.
        """
        result = {}
        for one in self._sets:
            cut = _made_by(one, self._trainable)[0]
            kept = np.asarray(_channels_of(masks[cut.parameter], cut, one.channels).any(axis=1))
            wanted = round_channels(int(kept.sum()), one.channels, rounding)
            if importance is not None and wanted > kept.sum():
                worth = _channels_of(importance[cut.parameter], cut, one.channels).max(axis=1)
                kept[np.argsort(np.where(kept, np.inf, worth), kind="stable")[-wanted:]] = True
            if not kept.all():
                result[one.name] = tuple(int(index) for index in np.flatnonzero(kept))
        return result

    def producers(self, name: str) -> tuple[str, ...]:
        """Return the sites that make the channels of a coupled set."""
        return next(one.producers for one in self._sets if one.name == name)


def needed_moves(weights: np.ndarray, tolerances: np.ndarray) -> np.ndarray:
    """Return `|w| / τ`, float64; 0 for weights that are 0 already."""
    magnitudes = np.abs(weights).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(magnitudes > 0, magnitudes / tolerances, 0.0)


def _kept(need: np.ndarray) -> np.ndarray:
    kept = need > 1
    if not kept.any():
        kept.flat[int(np.argmax(need))] = True
    return kept


def _made_by(one: CoupledSet, trainable: Sequence[str]) -> list[Cut]:
    """Return the places that hold what makes the set's channels, filters first."""
    return [cut for cut in one.cuts if cut.axis == 0 and cut.parameter in trainable]


def _channels_of(values: np.ndarray, cut: Cut, channels: int) -> np.ndarray:
    """Give a view of a parameter as [channels, what goes with each]; axis 0 only."""
    first = values[cut.offset : cut.offset + channels * cut.repeat]
    return first.reshape(channels, -1)
