"""From a policy to modules that can be run: prune, re-estimate, retrain, calibrate, quantize, realise."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import tvm

from tvm_compress.calibration import Calibration, calibrate
from tvm_compress.data.dataset import Dataset
from tvm_compress.finetune import finetune
from tvm_compress.passes.params import get_stage
from tvm_compress.passes.pipeline import compress
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.passes.prune_channels import resolve_kept
from tvm_compress.passes.realize_integer import RealizeInteger
from tvm_compress.twin import Twin


@dataclass(frozen=True)
class Training:
    """How a candidate is trained: epochs over `data`, with the dense model as teacher."""

    data: Dataset
    epochs: int
    learning_rate: float
    seed: int
    progress: Callable[[int, dict[str, float]], None] | None = None


@dataclass(frozen=True)
class Candidate:
    """A policy applied.

    Parameters
    ----------
    policy
        With the kept channels written out.
    module
        QDQ stage, or float where nothing is quantized.
    integer_module
        What is deployed: integer stage, or `module` itself where nothing is quantized.
    """

    policy: CompressionPolicy
    module: tvm.IRModule
    integer_module: tvm.IRModule


class Compressor:
    """Applies policies to one dense module.

    Parameters
    ----------
    module
        Float stage.
    calibration_x
        Normalised images [N, C, H, W] for the batch-norm statistics and the ranges.
    scores
        Of each coupled set's channels, by `tolerance.channel_scores`; None for the criteria l1 and l2.
    """

    def __init__(
        self, module: tvm.IRModule, calibration_x: np.ndarray, scores: Mapping[str, np.ndarray] | None
    ) -> None:
        self.module = module
        self._x = calibration_x
        self._scores = scores
        self._teacher: Twin | None = None
        self._dense_calibration: Calibration | None = None

    def resolve(self, policy: CompressionPolicy) -> CompressionPolicy:
        """Policy with the kept channels written out, by the scores."""
        return resolve_kept(self.module, policy, self._scores)

    def prune(self, policy: CompressionPolicy) -> tvm.IRModule:
        """Float module without the channels that the policy removes, batch-norm statistics re-estimated."""
        if all(site.channels is None for site in policy.sites.values()):
            return self.module
        twin = Twin(compress(self.module, pruning_part(policy), scores=self._scores))
        twin.reestimate_batch_norm(self._x)
        return twin.to_module()

    def quantize(self, pruned: tvm.IRModule, policy: CompressionPolicy) -> tvm.IRModule:
        """Pruned module with fake quantization, QDQ stage; itself where the policy quantizes nothing."""
        if not any(site.quantized for site in policy.sites.values()):
            return pruned
        return compress(pruned, quantization_part(policy), calibration=self._calibration(pruned))

    def apply(self, policy: CompressionPolicy, training: Training | None = None) -> Candidate:
        """Apply a policy and, if asked, train what comes of it."""
        policy = self.resolve(policy)
        module = self.quantize(self.prune(policy), policy)
        if training is not None and training.epochs > 0:
            module = self._train(module, training)
        return Candidate(policy, module, realize(module))

    def _train(self, module: tvm.IRModule, training: Training) -> tvm.IRModule:
        if self._teacher is None:
            self._teacher = Twin(self.module)
        return finetune(
            module,
            training.data,
            training.epochs,
            learning_rate=training.learning_rate,
            seed=training.seed,
            teacher=self._teacher,
            progress=training.progress,
        )

    def _calibration(self, pruned: tvm.IRModule) -> Calibration:
        if pruned is not self.module:
            return calibrate(pruned, self._x)
        if self._dense_calibration is None:
            self._dense_calibration = calibrate(pruned, self._x)
        return self._dense_calibration


def realize(module: tvm.IRModule) -> tvm.IRModule:
    """Integer module of a QDQ module; a float one is its own."""
    return tvm.ir.transform.Sequential([RealizeInteger()])(module) if get_stage(module) == "qdq" else module


def pruning_part(policy: CompressionPolicy) -> CompressionPolicy:
    """Policy without its bits."""
    sites = {
        name: replace(site, scheme="fp32", weight_bits=32, activation_bits=32)
        for name, site in policy.sites.items()
    }
    return replace(policy, sites=sites)


def quantization_part(policy: CompressionPolicy) -> CompressionPolicy:
    """Policy without its channels, for a module that has lost them already."""
    sites = {name: replace(site, channels=None, kept=None) for name, site in policy.sites.items()}
    return replace(policy, sites=sites, model="")
