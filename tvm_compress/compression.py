"""Applies a policy to a model and builds models, without searching: what `compress` and `compile` do."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from tvm_compress.artifact import Artifact
from tvm_compress.calibration import RangeReport
from tvm_compress.compressor import Compressor, PostTraining, Training, quantized_epochs, realize
from tvm_compress.data.dataset import Dataset, Split
from tvm_compress.errors import ModelError, PolicyError, SettingError
from tvm_compress.metrics.cost import metrics
from tvm_compress.model import Model
from tvm_compress.passes.groups import find_coupled_sets, round_channels
from tvm_compress.passes.params import get_stage
from tvm_compress.passes.pipeline import build
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy, fingerprint
from tvm_compress.passes.sites import find_sites
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.tolerance.channels import channel_scores
from tvm_compress.twin import Twin


def uniform_policy(
    model: Model,
    *,
    target: str,
    pruning_ratio: float = 0.0,
    weight_bits: int = 32,
    activation_bits: int = 32,
    rounding: int = 8,
    criterion: str = "tolerance",
    seed: int = 0,
) -> CompressionPolicy:
    """Policy that treats every site alike: the same share of channels removed, the same bits.

    32 bits leave a site in fp32; 8-bit activations make it INT8, its weights on a grid of 1 to 8 bits; 1 to 6
    bits make it bit-serial where the target's rule allows it.

    Raises
    ------
    SettingError
        If the pruning ratio is outside [0, 1) or the bits do not name a scheme.
    """
    if not 0 <= pruning_ratio < 1:
        raise SettingError(f"pruning_ratio is {pruning_ratio}, but must be in [0, 1).", "0.5 removes half.")
    scheme = _scheme(weight_bits, activation_bits)
    kept = {
        producer: round_channels(int(np.ceil((1 - pruning_ratio) * group.channels)), group.channels, rounding)
        for group in find_coupled_sets(model.module)
        if group.prunable and pruning_ratio > 0
        for producer in group.producers
    }
    sites = find_sites(model.module)
    policy = CompressionPolicy(
        sites={
            site.name: SitePolicy(
                channels=kept.get(site.name),
                scheme=scheme,
                weight_bits=weight_bits,
                activation_bits=activation_bits,
            )
            for site in sites
        },
        target=target,
        rounding=rounding,
        criterion=criterion,
        seed=seed,
        found_by="uniform",
        model=fingerprint(sites),
    )
    return policy.legalize(sites, rules_for(parse_target(target)), find_coupled_sets(model.module))


def _scheme(weight_bits: int, activation_bits: int) -> str:
    if (weight_bits, activation_bits) == (32, 32):
        return "fp32"
    if 1 <= weight_bits <= 8 and activation_bits == 8:
        return "int8"
    if 1 <= weight_bits <= 6 and 1 <= activation_bits <= 6:
        return "bitserial"
    raise SettingError(
        f"No scheme computes {weight_bits}-bit weights with {activation_bits}-bit activations.",
        "Use 32 and 32 (fp32), 1 to 8 and 8 (INT8), or 1 to 6 each (bit-serial).",
    )


def compress_model(
    model: Model,
    policy: CompressionPolicy,
    split: Split,
    *,
    finetune_epochs: int = 0,
    learning_rate: float = 0.01,
    seed: int = 0,
    images: int = 256,
    post_training: PostTraining | None = None,
    progress: Callable[[int], None] | None = None,
) -> Model:
    """Prune, quantize and fine-tune a dense model as a policy says; the test part is never touched.

    Parameters
    ----------
    images
        How many training images give gradients, statistics and ranges, and what `post_training` needs.
    post_training
        How ranges, scales and integers are found, before any fine-tuning.

    Raises
    ------
    PolicyError
        If the policy is of another model, or it prunes single weights and fine-tuning is wanted.
    ModelError
        If the model is compressed already.
    """
    if images < 1:
        raise SettingError(f"images is {images}, but must be 1 or more.")
    if get_stage(model.module) != "float" or "policy" in model.metadata:
        raise ModelError("This model is compressed already.", "Give the dense model that it was made from.")
    policy.check(find_sites(model.module))
    if finetune_epochs and any(site.weight_pruning_ratio for site in policy.sites.values()):
        raise PolicyError(
            "The policy prunes single weights (weight_pruning_ratio), which fine-tuning would fill again.",
            "Leave --finetune-epochs at 0, or let --method toco prune: its fine-tuning keeps the zeros.",
        )
    some = split.train.subset(images, np.random.default_rng(seed))
    x = some.normalized()
    scores = channel_scores(model.module, x, some.y, criterion=policy.criterion)
    quantized = quantized_epochs(policy, finetune_epochs)
    training = Training(
        split.train,
        finetune_epochs - quantized,
        quantized,
        learning_rate,
        seed,
        progress=progress,
    )
    candidate = Compressor(model.module, x, scores, post_training).apply(policy, training)
    return compressed_model(model, candidate.policy, candidate.module, candidate.ranges)


def compressed_model(
    dense: Model, policy: CompressionPolicy, module: tvm.IRModule, ranges: Sequence[RangeReport] = ()
) -> Model:
    """Model of a compressed module, with the policy that made it and its calibration in its metadata."""
    metadata = {**dense.metadata, "policy": policy.to_json()}
    if ranges:
        metadata["calibration"] = [row.to_dict() for row in ranges]
    return replace(dense, module=module, metadata=metadata)


def model_ranges(model: Model) -> list[RangeReport]:
    """Calibrated ranges of a model's quantized activations; none where it has none."""
    return [RangeReport.from_dict(row) for row in model.metadata.get("calibration", ())]


def model_policy(model: Model) -> CompressionPolicy | None:
    """Policy that a compressed model was made with; None for a dense one."""
    text = model.metadata.get("policy")
    return None if text is None else CompressionPolicy.from_json(str(text))


def compile_model(
    model: Model,
    target_text: str,
    path: str | Path,
    compact: bool = False,
    tuning: str | Path | None = None,
) -> Artifact:
    """Build a model, dense or compressed, for a target and write the artifact.

    Parameters
    ----------
    compact
        Rule out kernels that are faster for keeping weights in a larger form.
    tuning
        Tuning database (`tuner.tune_model`), whose choices go before the schedules' own.

    Raises
    ------
    TargetError
        If the target is not known, or its cross-compiler is missing.
    TuningError
        If the tuning database cannot be read.
    """
    target = parse_target(target_text)
    module = realize(model.module)
    policy = model_policy(model)
    return Artifact.create(
        path,
        build(module, target, compact=compact, tuning=tuning),
        input_spec=model.input_spec,
        class_names=model.class_names,
        policy=None if policy is None else json.loads(policy.to_json()),
        metrics=metrics(model.module, policy),
        fcompile=export_fcompile(str(target.attrs.get("mtriple", ""))),
    )


def twin_logits(model: Model, data: Dataset) -> np.ndarray:
    """Logits [N, classes] of the twin, from the integers where the model is quantized."""
    return Twin(realize(model.module)).predict(data.normalized())


def model_summary(model: Model) -> dict[str, Any]:
    """Plain description of a model: sites, coupled sets, costs, for `inspect`."""
    policy = model_policy(model)
    sets = find_coupled_sets(model.module)
    return {
        "stage": get_stage(model.module),
        "input": {"name": model.input_spec.name, "shape": list(model.input_spec.shape)},
        "classes": list(model.class_names),
        "sites": [
            {
                "name": site.name,
                "kind": site.kind,
                "weight_shape": list(site.weight_shape),
                "out_shape": list(site.out_shape),
                "macs": site.macs,
                "policy": policy[site.name].to_dict() if policy else {},
            }
            for site in find_sites(model.module)
        ],
        "coupled_sets": [
            {
                "name": group.name,
                "channels": group.channels,
                "producers": list(group.producers),
                "prunable": group.prunable,
                "reason": group.reason,
            }
            for group in sets
        ],
        "metrics": metrics(model.module, policy),
        "metadata": _plain(model.metadata),
    }


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metadata.items() if key != "policy"}
