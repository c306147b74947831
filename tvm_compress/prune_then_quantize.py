"""Prune, then quantize: the recipe of "Prune or quantize?" (section 2.6 and 3) as one function.

A slim network with moderate bits beats a fat one with very few: channels are removed first, the slim network
is trained for a few epochs, its weights are put on a grid of few bits with a step for each filter, and the
batch norms' statistics are taken again from images without labels.

Differences from the paper. Channels go by coupled sets, the same share of each, and are removed in one go,
without ADMM. Activations are quantized too, to `activation_bits`, since the result is deployed. With 8-bit
activations weights of fewer bits are computed by the INT8 kernels: their integers are small, the kernel is
the same.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import tvm

from tvm_compress.compressor import Compressor, quantization_part
from tvm_compress.data.dataset import Dataset, Split
from tvm_compress.errors import ModelError, SettingError
from tvm_compress.finetune import finetune
from tvm_compress.method import MethodResult
from tvm_compress.metrics.cost import metrics
from tvm_compress.metrics.esn_training import EpochEsn, EsnRecord, EsnRecorder, allocate_bits
from tvm_compress.passes.groups import find_coupled_sets, round_channels
from tvm_compress.passes.params import get_params, get_stage, set_params
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy, fingerprint
from tvm_compress.passes.quantization import weight_limit, weight_scale
from tvm_compress.passes.sites import Site, find_sites
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.tolerance.channels import channel_scores
from tvm_compress.twin import Twin

CRITERIA = ("l2", "l1", "tolerance")
# Weight bits that a layer may have, with 8-bit activations and with fewer (bit-serial).
GRID_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
BITSERIAL_BITS = (1, 2, 3, 4, 5, 6)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class EsnSettings:
    """How `prune_then_quantize` works.

    Attributes
    ----------
    width
        Share of each coupled set's channels that is kept, in (0, 1]; 1 quantizes only.
    weight_bits
        1 to 8, or 32 to prune only. With `allocate`, the mean over the MACs; it need not be whole then.
    activation_bits
        8, or 2 to 6: then sites are bit-serial where the target has such kernels and weights have 6 bits or
        fewer.
    edge_bits
        Weight bits of the first and the last site, at least; 0 treats them as the others.
    allocate
        Give each layer bits of its own, from the signal norm that was recorded in training.
    record
        Of an earlier training; without it, `allocate` takes what the fine-tuning here records.
    epochs
        Of fine-tuning after pruning (the paper: 4).
    quantized_epochs
        Of fine-tuning with the quantizers (the paper: 0).
    learning_rate
        Of the first epoch; half of it with the quantizers.
    distill
        Whether the dense network teaches the slim one.
    augment
        How training images are varied: see `finetune`.
    images
        How many training images give statistics and ranges; their labels are used by criterion "tolerance"
        only.
    criterion
        "l2" (the paper's: the norm of the filters), "l1" or "tolerance".
    rounding
        Kept channels are rounded up to a multiple.

    Raises
    ------
    SettingError
        Where a value is out of range; names the setting.
    """

    width: float = 0.5
    weight_bits: float = 4
    activation_bits: int = 8
    edge_bits: int = 8
    allocate: bool = False
    record: EsnRecord | None = None
    epochs: int = 4
    quantized_epochs: int = 0
    learning_rate: float = 0.02
    distill: bool = False
    augment: str = "none"
    images: int = 512
    criterion: str = "l2"
    rounding: int = 8
    target: str = "host"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.width <= 1:
            raise SettingError(f"width is {self.width}, but must be in (0, 1].", "0.5 keeps half.")
        if self.weight_bits != 32 and not 1 <= self.weight_bits <= 8:
            raise SettingError(f"weight_bits is {self.weight_bits}, but must be 1 to 8, or 32 to prune only.")
        if not self.allocate and self.weight_bits != int(self.weight_bits):
            raise SettingError(
                f"weight_bits is {self.weight_bits}, not a whole number.",
                "Only bits allocated by layer may have such a mean: allocate=True.",
            )
        if self.activation_bits != 8 and not 2 <= self.activation_bits <= 6:
            raise SettingError(f"activation_bits is {self.activation_bits}, but must be 8 or 2 to 6.")
        if not 0 <= self.edge_bits <= 8:
            raise SettingError(f"edge_bits is {self.edge_bits}, but must be 0 to 8.")
        if self.criterion not in CRITERIA:
            raise SettingError(
                f"Criterion {self.criterion!r} is unknown.", f"Known are: {', '.join(CRITERIA)}."
            )
        if self.images < 2 or self.epochs < 0 or self.quantized_epochs < 0 or self.rounding < 1:
            raise SettingError(
                f"images is {self.images}, epochs {self.epochs}, quantized_epochs {self.quantized_epochs}, "
                f"rounding {self.rounding}.",
                "At least: 2 images, 0 epochs, rounding 1.",
            )
        if self.allocate and self.record is None and self.epochs == 0:
            raise SettingError(
                "Bits can be allocated only from a training whose signal norm was recorded.",
                "Give a record (--esn-record), or one epoch of fine-tuning or more.",
            )
        if self.record is not None and not self.record.epochs:
            raise SettingError("The ESN record holds no epoch.", "Record a training of one epoch or more.")


@dataclass(frozen=True)
class Slim:
    """A pruned and fine-tuned network, still in float; several quantizations can start from it.

    Attributes
    ----------
    policy
        Which channels were kept.
    record
        The signal norm of its fine-tuning; no epochs where nothing was trained.
    """

    module: tvm.IRModule
    policy: CompressionPolicy
    record: EsnRecord


def prune_then_quantize(
    module: tvm.IRModule,
    split: Split,
    settings: EsnSettings,
    progress: Progress | None = None,
    record: str | os.PathLike[str] | None = None,
) -> MethodResult:
    """Prune a float module, fine-tune it, quantize it; the test part is never touched.

    Parameters
    ----------
    progress
        Called with the number of epochs done, of both fine-tunings together.
    record
        File that the signal norm of the fine-tuning is saved to after each epoch (an `EsnRecord`).

    Returns
    -------
    MethodResult
        Stage qdq (float with 32 weight bits). `summary`: the signal norms before and after, the bits by site,
        and the signal norm in training.

    Raises
    ------
    ModelError
        If the module is not at stage float, or nothing of it can be pruned.
    SettingError, DataError
        Where settings and record do not fit the module.
    """
    slim = prune(module, split, settings, progress, record)
    result = quantize(slim, split.train, settings, progress)
    before = {f"dense_{name}": value for name, value in _norms(metrics(module)).items()}
    return replace(result, summary={**before, **result.summary})


def prune(
    module: tvm.IRModule,
    split: Split,
    settings: EsnSettings,
    progress: Progress | None = None,
    record: str | os.PathLike[str] | None = None,
) -> Slim:
    """First half: remove channels and fine-tune in float."""
    if get_stage(module) != "float":
        raise ModelError(
            f"Prune-then-quantize takes a float module, not one of stage {get_stage(module)!r}.",
            "Give the dense model.",
        )
    some = _images(split.train, settings)
    scores = None
    if settings.criterion == "tolerance" and settings.width < 1:
        scores = channel_scores(module, some.normalized(), some.y)
    compressor = Compressor(module, some.normalized(), scores)
    policy = compressor.resolve(_width_policy(module, settings))
    pruned = compressor.prune(policy)
    recorder = EsnRecorder({site.name: site.weight for site in find_sites(pruned)}, record)
    if settings.epochs:
        pruned = finetune(
            pruned,
            split.train,
            settings.epochs,
            settings.learning_rate,
            settings.seed,
            teacher=Twin(module) if settings.distill else None,
            augment=settings.augment,
            progress=_counting(progress, 0),
            observer=recorder,
        )
    return Slim(pruned, policy, recorder.record)


def quantize(
    slim: Slim,
    train: Dataset,
    settings: EsnSettings,
    progress: Progress | None = None,
) -> MethodResult:
    """Second half: quantize with a step for each filter and re-estimate the batch norms' statistics."""
    training = {"training_esn": _plain(slim.record)}
    if settings.weight_bits == 32:
        return MethodResult(slim.module, slim.policy, _norms(metrics(slim.module)) | training)
    sites = find_sites(slim.module)
    bits = _bits(sites, slim, settings)
    policy = _bits_policy(slim, sites, bits, settings)
    x = _images(train, settings).normalized()
    module = Compressor(slim.module, x, None).quantize(slim.module, quantization_part(policy))
    module = _on_grid(module, sites, policy, bits)
    if settings.quantized_epochs:
        module = finetune(
            module,
            train,
            settings.quantized_epochs,
            settings.learning_rate / 2,
            settings.seed,
            progress=_counting(progress, settings.epochs),
            observer=_KeepOnGrid(sites, policy, bits),
        )
    twin = Twin(module)
    twin.reestimate_batch_norm(x)
    module = twin.to_module()
    norms = _norms(metrics(module, quantization_part(policy)))
    return MethodResult(module, policy, norms | {"bits_by_site": bits} | training)


def _norms(costs: Mapping[str, float]) -> dict[str, Any]:
    return {name: costs[name] for name in ("esn_a", "esn_d", "esn_d_filters")}


def _images(train: Dataset, settings: EsnSettings) -> Dataset:
    return train.subset(settings.images, np.random.default_rng(settings.seed))


def _width_policy(module: tvm.IRModule, settings: EsnSettings) -> CompressionPolicy:
    """Policy that keeps the same share of every coupled set that can lose channels."""
    sites: dict[str, SitePolicy] = {}
    for group in find_coupled_sets(module):
        if not group.prunable or settings.width == 1:
            continue
        wanted = int(np.ceil(settings.width * group.channels))
        kept = round_channels(wanted, group.channels, settings.rounding)
        sites |= {name: SitePolicy(channels=kept) for name in group.producers}
    if settings.width < 1 and not sites:
        raise ModelError("No channel of this network can be removed.", "Use width 1 to quantize only.")
    return CompressionPolicy(
        sites=sites,
        target=settings.target,
        rounding=settings.rounding,
        criterion=settings.criterion,
        seed=settings.seed,
        found_by="prune-then-quantize",
        model=fingerprint(find_sites(module)),
    )


def _bits(sites: list[Site], slim: Slim, settings: EsnSettings) -> dict[str, int]:
    """Weight bits by site: alike or allocated, the first and last at least `edge_bits`."""
    allowed = GRID_BITS if settings.activation_bits == 8 else BITSERIAL_BITS
    edges = {sites[0].name, sites[-1].name} if settings.edge_bits else set()
    inner = [site for site in sites if site.name not in edges]
    if settings.allocate:
        epoch = _epoch(settings.record or slim.record)
        params = get_params(slim.module)
        weights = {site.name: params[site.weight] for site in inner}
        macs = {site.name: float(site.macs) for site in inner}
        bits = allocate_bits(epoch, weights, macs, settings.weight_bits, allowed) if inner else {}
    else:
        bits = {site.name: int(settings.weight_bits) for site in inner}
    edge = max(settings.edge_bits, int(np.ceil(settings.weight_bits)))
    return {site.name: bits.get(site.name, edge) for site in sites}


def _epoch(record: EsnRecord) -> EpochEsn:
    """The last epoch: that of the weights which are quantized."""
    return record.epochs[-1]


def _bits_policy(
    slim: Slim, sites: list[Site], bits: Mapping[str, int], settings: EsnSettings
) -> CompressionPolicy:
    """The slim network's policy with the sites' schemes; what has no bit-serial kernel becomes INT8."""
    chosen = dict(slim.policy.sites)
    rules = rules_for(parse_target(settings.target))
    for site in sites:
        before = slim.policy[site.name]
        wanted = bits[site.name]
        if settings.activation_bits < 8 and wanted <= BITSERIAL_BITS[-1]:
            activation_bits = settings.activation_bits
            one = replace(before, scheme="bitserial", weight_bits=wanted, activation_bits=activation_bits)
        else:
            one = replace(before, scheme="int8", weight_bits=8, activation_bits=8)
        chosen[site.name] = one
    # Legality is asked of the slim network's shapes: those channels are gone already.
    legal = quantization_part(replace(slim.policy, sites=chosen)).legalize(sites, rules)
    for site in sites:
        found = legal[site.name]
        note = found.note
        if found.scheme == "int8" and bits[site.name] < 8:
            note = "; ".join(filter(None, [note, f"INT8 kernels, weights of {bits[site.name]} bits"]))
        chosen[site.name] = replace(
            chosen[site.name],
            scheme=found.scheme,
            weight_bits=found.weight_bits,
            activation_bits=found.activation_bits,
            note=note,
        )
    return replace(slim.policy, sites=chosen)


def _on_grid(
    module: tvm.IRModule, sites: list[Site], policy: CompressionPolicy, bits: Mapping[str, int]
) -> tvm.IRModule:
    """Give INT8 sites of fewer bits the scales of those bits, and clip their weights to them."""
    params = get_params(module)
    changed: dict[str, np.ndarray] = {}
    for site in sites:
        wanted = bits[site.name]
        if policy[site.name].scheme != "int8" or wanted == 8:
            continue
        weight = params[site.weight]
        scale = weight_scale(weight, wanted)
        bound = (scale * weight_limit(wanted)).reshape(-1, *[1] * (weight.ndim - 1))
        signs = np.where(weight >= 0, bound, -bound)
        changed[f"{site.name}.weight_scale"] = scale
        changed[site.weight] = signs if wanted == 1 else np.clip(weight, -bound, bound).astype(np.float32)
    return set_params(module, changed) if changed else module


class _KeepOnGrid:
    """Observer of the fine-tuning: INT8 weights of fewer bits stay within the range of those bits."""

    def __init__(self, sites: list[Site], policy: CompressionPolicy, bits: Mapping[str, int]) -> None:
        self._sites = [
            (site, weight_limit(bits[site.name]))
            for site in sites
            if policy[site.name].scheme == "int8" and bits[site.name] < 8
        ]

    def begin_epoch(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Nothing to do."""

    def after_step(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Clip."""
        for site, limit in self._sites:
            weight = tensors[site.weight]
            bound = (tensors[f"{site.name}.weight_scale"] * limit).reshape(-1, *[1] * (weight.dim() - 1))
            weight.copy_(torch.minimum(torch.maximum(weight, -bound), bound))

    def end_epoch(self, epoch: int, means: Mapping[str, float]) -> None:
        """Nothing to do."""


def _counting(progress: Progress | None, before: int) -> Callable[[int, dict[str, float]], None]:
    def tell(epoch: int, _: dict[str, float]) -> None:
        if progress is not None:
            progress(before + epoch)

    return tell


def _plain(record: EsnRecord) -> list[dict[str, float]]:
    return [{"epoch": epoch.epoch, "esn_a": epoch.esn_a, **epoch.means} for epoch in record.epochs]
