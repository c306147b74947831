"""TOCO from a dense model to a compressed one: what `tvm-compress compress --method toco` does."""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import tvm

from tvm_compress.data.dataset import Split
from tvm_compress.errors import ModelError
from tvm_compress.fastlc.curvature import model_fingerprint
from tvm_compress.finetune import finetune
from tvm_compress.method import MethodResult
from tvm_compress.passes.params import get_params, get_stage, set_params
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy, fingerprint
from tvm_compress.passes.prune_channels import PruneChannels
from tvm_compress.passes.prune_weights import PruneWeights
from tvm_compress.passes.sites import Site, find_sites
from tvm_compress.tolerance.algorithm1 import Algorithm1, Iteration, State
from tvm_compress.tolerance.compression_models import CompressionModel, Pruning, Quantization, Values
from tvm_compress.tolerance.grouping import Grouping
from tvm_compress.tolerance.settings import TocoSettings
from tvm_compress.tolerance.trials import Trials
from tvm_compress.twin import Twin

Progress = Callable[[Iteration], None]

MAX_CODEBOOK_BITS = 8


def toco(
    module: tvm.IRModule,
    split: Split,
    settings: TocoSettings,
    path: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> MethodResult:
    """Compress a float module by tolerance analysis.

    Pruned weights are zeros in the module that is returned, and the policy says how many of each site's, by
    `weight_pruning_ratio` and `group`; with group "channel" the channels are gone, and the policy names those
    kept. Quantized weights are the float values of their levels; a site with at most 256 of them has
    `codebook_bits`. Only training images are looked at.

    Parameters
    ----------
    module
        Float stage; dense.
    path
        Directory for `trials.jsonl` and the state, from which the same call goes on after an interruption.
    progress
        Called after each iteration.

    Raises
    ------
    ModelError
        If the module is at another stage, or a gradient is not finite.
    DataError
        If the dense model's loss is 0, or all gradients are.
    StudyError
        If `path` is of another run.
    """
    if get_stage(module) != "float":
        raise ModelError(
            f"TOCO takes a float module, not one of stage {get_stage(module)!r}.", "Give the dense model."
        )
    started = time.perf_counter()
    train = split.train
    if settings.images:
        train = train.subset(settings.images, np.random.default_rng(settings.seed))
    x = train.normalized()
    twin = Twin(module)
    y = train.y if settings.labels == "data" else twin.predict(x).argmax(axis=1)
    grouping = None
    if settings.objective == "prune":
        grouping = Grouping(module, settings.group, tuple(twin.trainable()))
    loop = Algorithm1(twin, _compression_model(module, settings, grouping), x, y, settings)
    trials = None if path is None else Trials(path, _facts(module, x, y, settings))
    saved = trials.load() if trials is not None else None
    state = loop.start() if saved is None else loop.restore(saved)
    done = list(trials.iterations) if trials is not None else []
    for iteration in loop.run(state):
        done.append(iteration)
        if trials is not None:
            trials.record(iteration, state)
        if progress is not None:
            progress(iteration)
    compressed, policy = _result(module, state, settings, grouping)
    loss, size = state.loss, done[-1].size if done else 1.0
    if settings.group == "channel":
        # Rounding brought some back, and what read the others' outputs is gone, too.
        loss, size = Twin(compressed).loss(x, y), _weights_of(compressed) / _weights_of(module)
    if settings.finetune_epochs:
        # Channels that are gone need no holding.
        held = {} if settings.group == "channel" else state.compressed.weights
        compressed = finetune(
            compressed,
            split.train,
            settings.finetune_epochs,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            observer=HoldWeights(compressed, held, zeros_only=settings.objective == "prune"),
        )
    summary = _summary(done, settings, split.labels, size)
    summary |= {"loss_before": loop.dense_loss, "loss_after": loss}
    return MethodResult(compressed, policy, summary | {"seconds": time.perf_counter() - started})


def _compression_model(
    module: tvm.IRModule, settings: TocoSettings, grouping: Grouping | None
) -> CompressionModel:
    if grouping is not None:
        return Pruning(grouping, settings.worth == "operations")
    params = get_params(module)
    weights = {site.weight: params[site.weight] for site in find_sites(module)}
    return Quantization(weights, settings.group, settings.percentile)


def _facts(module: tvm.IRModule, x: np.ndarray, y: np.ndarray, settings: TocoSettings) -> dict[str, Any]:
    """Return what a resumed run must have in common; more iterations may be asked for."""
    images = hashlib.sha256(np.ascontiguousarray(x).data)
    images.update(np.ascontiguousarray(y).data)
    values = asdict(settings)
    for name in ("iterations", "rounding", "finetune_epochs", "learning_rate", "target"):
        del values[name]
    return {"model": model_fingerprint(module), "data": images.hexdigest()[:16], **values}


def _result(
    module: tvm.IRModule, state: State, settings: TocoSettings, grouping: Grouping | None
) -> tuple[tvm.IRModule, CompressionPolicy]:
    """Return the compressed module, and the policy that says what was done."""
    weights = state.compressed.weights
    if grouping is None:
        return _quantized(module, state, settings)
    masks = {name: weight != 0 for name, weight in weights.items()}
    sites = find_sites(module)
    if settings.group == "channel":
        kept = grouping.kept_channels(masks, settings.rounding or 1, state.importance.values())
        chosen = {
            site: SitePolicy(kept=channels, group="channel")
            for name, channels in kept.items()
            for site in grouping.producers(name)
        }
        policy = _policy(sites, chosen, settings)
        return PruneChannels(policy)(module), policy
    params = get_params(module)
    # Weights that were zero from the start count as pruned too.
    chosen = {
        site.name: SitePolicy(
            weight_pruning_ratio=1 - int(np.count_nonzero(weights[site.weight])) / params[site.weight].size,
            group=settings.group,
        )
        for site in sites
        if not masks[site.weight].all()
    }
    return PruneWeights(masks)(module), _policy(sites, chosen, settings)


def _quantized(
    module: tvm.IRModule, state: State, settings: TocoSettings
) -> tuple[tvm.IRModule, CompressionPolicy]:
    sites, chosen, changed = find_sites(module), {}, {}
    for site in sites:
        weights, bits = state.compressed.weights[site.weight], state.compressed.bits[site.weight]
        levels = len(np.unique(weights))
        note = f"TOCO: {bits.mean():.2f} bits per weight on average, group {settings.group}"
        needed = max(1, int(levels - 1).bit_length())
        if needed <= MAX_CODEBOOK_BITS:
            changed[site.weight] = weights
            chosen[site.name] = SitePolicy(codebook_bits=needed, note=note)
        else:
            chosen[site.name] = SitePolicy(note=f"{note}: more than 256 levels, left in fp32")
    return set_params(module, changed), _policy(sites, chosen, settings)


def _policy(sites: list[Site], chosen: Mapping[str, SitePolicy], settings: TocoSettings) -> CompressionPolicy:
    return CompressionPolicy(
        sites=dict(chosen),
        target=settings.target,
        rounding=settings.rounding or 1,
        seed=settings.seed,
        found_by="toco",
        model=fingerprint(sites),
    )


class HoldWeights:
    """Observer of a fine-tuning: weights that compression fixed keep their values.

    Parameters
    ----------
    weights
        Compressed, by parameter's name.
    zeros_only
        Hold those that are zero; else all of a parameter, if the module has these very values.
    """

    def __init__(self, module: tvm.IRModule, weights: Values, zeros_only: bool) -> None:
        params = get_params(module)
        self._held: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name, weight in weights.items():
            value = params[name]
            fixed = value == 0 if zeros_only else np.full(value.shape, np.array_equal(value, weight))
            self._held[name] = torch.from_numpy(fixed), torch.from_numpy(value)

    def begin_epoch(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Nothing to do."""

    def after_step(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put the fixed values back."""
        for name, (fixed, value) in self._held.items():
            tensors[name].copy_(torch.where(fixed, value, tensors[name]))

    def end_epoch(self, epoch: int, means: Mapping[str, float]) -> None:
        """Nothing to do."""


def _weights_of(module: tvm.IRModule) -> int:
    """How many weights the sites have."""
    params = get_params(module)
    return sum(params[site.weight].size for site in find_sites(module))


def _summary(done: list[Iteration], settings: TocoSettings, labels: str, size: float) -> dict[str, Any]:
    result: dict[str, Any] = {
        "iterations": len(done),
        "accepted": sum(iteration.accepted for iteration in done),
    }
    if settings.objective == "prune":
        result["sparsity"] = 1 - size
    else:
        result["bits_per_weight"] = size
        result["bits_from"] = f"percentile {settings.percentile:g}" if settings.percentile else "minimum"
    if "model" in (settings.labels, labels):
        result["loss_labels"] = "model"
    return result
