"""The effective signal norm of a network in training, and the bits for each layer that it suggests.

Source: "Prune or quantize? Strategy for Pareto-optimally low-cost and accurate CNN", equations 4 and 5,
section 2.7 and appendix B: in training the weights are the signal, and their walk since the epoch began is
the noise; what noise a layer bears there, it may bear from a quantizer.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from tvm_compress.errors import DataError, SettingError
from tvm_compress.files import write_text
from tvm_compress.metrics.esn import esn_a, esn_a_from_noise, filter_steps, mid_rise

VERSION = 1
# Halvings of the interval in which the allocation looks for its factor: far beyond what bits can tell.
BISECTIONS = 60


@dataclass(frozen=True)
class SiteEsn:
    """What one epoch showed of one layer.

    Attributes
    ----------
    signal
        Sum of ||W||² over the epoch's steps.
    noise
        Sum of ||W - W at the epoch's start||².
    nonzero
        Number of weights that are not zero at the epoch's end.
    """

    signal: float
    noise: float
    nonzero: int

    @property
    def esn_a(self) -> float:
        """Equation 4; infinite while nothing moves."""
        return esn_a_from_noise(self.signal, self.noise, self.nonzero)


@dataclass(frozen=True)
class EpochEsn:
    """What one epoch showed: each layer by its site's name, and the epoch's means (`loss`, ...)."""

    epoch: int
    means: dict[str, float]
    sites: dict[str, SiteEsn]

    @property
    def esn_a(self) -> float:
        """Sum over the layers."""
        return sum(site.esn_a for site in self.sites.values())


@dataclass(frozen=True)
class EsnRecord:
    """The signal norm of a training, epoch by epoch."""

    epochs: tuple[EpochEsn, ...]

    def to_json(self) -> str:
        """Write as JSON text."""
        epochs = [asdict(epoch) for epoch in self.epochs]
        return json.dumps({"version": VERSION, "epochs": epochs}, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a file; it is never seen half-written."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "EsnRecord":
        """Read what `save` wrote.

        Raises
        ------
        DataError
            If the file is missing, damaged, or of another version.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            if values["version"] != VERSION:
                raise DataError(f"The ESN record {path} has version {values['version']!r}, not {VERSION}.")
            return cls(
                tuple(
                    EpochEsn(
                        int(epoch["epoch"]),
                        dict(epoch["means"]),
                        {name: SiteEsn(**site) for name, site in epoch["sites"].items()},
                    )
                    for epoch in values["epochs"]
                )
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"The ESN record {path} cannot be read: {error!r}.", "Record it again: --esn-record FILE."
            ) from error


class EsnRecorder:
    """Records the signal norm while `finetune` trains: its `observer`.

    Parameters
    ----------
    weights
        Name of the weight parameter by the site's name.
    path
        Where the record is saved after each epoch; None keeps it in memory only.
    """

    def __init__(self, weights: Mapping[str, str], path: str | os.PathLike[str] | None = None) -> None:
        self._weights = dict(weights)
        self._path = path
        self._start: dict[str, torch.Tensor] = {}
        self._sums: dict[str, list[float]] = {}
        self._nonzero: dict[str, int] = {}
        self._epochs: list[EpochEsn] = []

    @property
    def record(self) -> EsnRecord:
        """What was seen so far."""
        return EsnRecord(tuple(self._epochs))

    def begin_epoch(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep a copy of the weights."""
        self._start = {site: tensors[name].detach().clone() for site, name in self._weights.items()}
        self._sums = {site: [0.0, 0.0] for site in self._weights}

    def after_step(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Add one step's signal and noise."""
        for site, name in self._weights.items():
            weight = tensors[name].detach()
            self._sums[site][0] += float(weight.square().sum())
            self._sums[site][1] += float((weight - self._start[site]).square().sum())
            self._nonzero[site] = int(torch.count_nonzero(weight))

    def end_epoch(self, epoch: int, means: Mapping[str, float]) -> None:
        """Close the epoch and save."""
        sites = {
            site: SiteEsn(signal, noise, self._nonzero[site]) for site, (signal, noise) in self._sums.items()
        }
        self._epochs.append(EpochEsn(epoch, dict(means), sites))
        if self._path is not None:
            self.record.save(self._path)


def allocate_bits(
    training: EpochEsn,
    weights: Mapping[str, np.ndarray],
    macs: Mapping[str, float],
    mean_bits: float,
    allowed: Sequence[int],
) -> dict[str, int]:
    """Choose the bits of each layer so that quantization leaves the proportions that training showed.

    A layer whose signal-to-noise ratio in training was S/N is given the fewest bits whose ESN_a is at least
    `f * S/N * ||W||_0 / 12`. The factor f, one for the network, is the largest for which the bits' mean,
    weighted by MACs, is at most `mean_bits`. Only the ratio comes from the record, so that a record of the
    dense network serves the pruned one.

    Parameters
    ----------
    weights, macs
        Float weights [O, ...] and multiply-accumulates of the layers to be given bits, by site.
    allowed
        Bits to choose from.

    Raises
    ------
    SettingError
        If mean_bits is below the fewest bits allowed, or the record lacks a layer, or one did not move.
    """
    choices = sorted(set(allowed))
    if not choices or not math.isfinite(mean_bits) or mean_bits < choices[0]:
        raise SettingError(
            f"Layers cannot have {mean_bits} bits on average: allowed are {choices}.", "Ask for more bits."
        )
    missing = sorted(set(weights) - set(training.sites))
    if missing:
        raise SettingError(
            f"The ESN record has no layer {missing[0]!r}.",
            "It is of another network: record this one's training.",
        )
    still = sorted(site for site in weights if training.sites[site].noise <= 0)
    if still:
        raise SettingError(
            f"Layer {still[0]!r} did not move in epoch {training.epoch} of the ESN record.",
            "Record a training of all layers, with a learning rate above 0.",
        )
    reached = {
        site: np.array([esn_a(mid_rise(w, filter_steps(w, bits), bits)) for bits in choices])
        for site, w in weights.items()
    }
    wanted = {}
    for site, weight in weights.items():
        seen = training.sites[site]
        wanted[site] = esn_a_from_noise(seen.signal, seen.noise, int(np.count_nonzero(weight)))
    total = sum(macs[site] for site in weights)

    def at(log_factor: float) -> dict[str, int]:
        factor = math.exp(log_factor)
        place = {site: int(np.searchsorted(reached[site], factor * wanted[site])) for site in weights}
        return {site: choices[min(index, len(choices) - 1)] for site, index in place.items()}

    def mean(bits: Mapping[str, int]) -> float:
        return sum(macs[site] * bits[site] for site in weights) / max(total, 1e-30)

    low, high = -200.0, 200.0
    if mean(at(high)) <= mean_bits:
        return at(high)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(at(middle)) <= mean_bits else (low, middle)
    return at(low)
