"""From a policy to modules that can be run: prune, re-estimate, retrain, calibrate, quantize, realise."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import tvm

from tvm_compress.bias_correction import correct_biases
from tvm_compress.calibration import METHODS as CALIBRATIONS
from tvm_compress.calibration import Calibration, RangeReport, calibrate
from tvm_compress.data.dataset import Dataset
from tvm_compress.errors import SettingError
from tvm_compress.finetune import finetune
from tvm_compress.passes.annotate_quantization import quantized_tensors
from tvm_compress.passes.equalize_channels import EqualizeChannels
from tvm_compress.passes.params import get_stage
from tvm_compress.passes.pipeline import compress
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.passes.prune_channels import resolve_kept
from tvm_compress.passes.realize_integer import RealizeInteger
from tvm_compress.twin import Twin
from tvm_compress.weight_rounding import METHODS as WEIGHT_ROUNDINGS
from tvm_compress.weight_rounding import round_weights

# Learning rate at the QDQ stage, as a share of that at the float stage: there the weights only settle.
QDQ_RATE = 0.5

# Share of the fine-tuning that is done with quantizers: an epoch with them takes more than twice as long,
# and what was pruned recovers as well without them. Sites of 8 bits lose next to nothing by quantization.
QDQ_SHARE = 1 / 3
INT8_SHARE = 1 / 20


@dataclass(frozen=True)
class PostTraining:
    """How a network is quantized from images alone; training may follow.

    Attributes
    ----------
    calibration
        How ranges follow from what was seen: one of `calibration.METHODS`.
    weight_rounding
        One of `weight_rounding.METHODS`.
    equalize
        Whether layers that follow each other share their weights' ranges first: see `EqualizeChannels`.
    bias_correction
        Whether channels' means and spread are put right at the end: see `bias_correction.correct_biases`.

    Raises
    ------
    SettingError
        On an unknown method.
    """

    calibration: str = "mse"
    weight_rounding: str = "nearest"
    equalize: bool = False
    bias_correction: bool = False

    def __post_init__(self) -> None:
        for what, known in (("calibration", CALIBRATIONS), ("weight_rounding", WEIGHT_ROUNDINGS)):
            if getattr(self, what) not in known:
                raise SettingError(
                    f"{what} is {getattr(self, what)!r}, which is unknown.", f"Known are: {', '.join(known)}."
                )


@dataclass(frozen=True)
class Training:
    """How a candidate is trained: some epochs pruned and still in float, the rest with its quantizers.

    Parameters
    ----------
    data
        Training images with labels.
    float_epochs, qdq_epochs
        At each stage. A candidate that lost no channels trains at the QDQ stage only, one that is not
        quantized in float only, each for the epochs of both.
    learning_rate
        In float; half of it at the QDQ stage.
    distill
        Whether the dense model teaches.
    augment
        How images are varied: see `finetune`.
    progress
        Called with the number of epochs done.
    """

    data: Dataset
    float_epochs: int
    qdq_epochs: int
    learning_rate: float
    seed: int
    distill: bool = True
    augment: str = "none"
    progress: Callable[[int], None] | None = None

    def epochs(self, pruned: bool, quantized: bool) -> tuple[int, int]:
        """Epochs (in float, at the QDQ stage) of a candidate."""
        total = self.float_epochs + self.qdq_epochs
        if not quantized:
            return (total, 0) if pruned else (0, 0)
        return (self.float_epochs, self.qdq_epochs) if pruned else (0, total if self.qdq_epochs else 0)


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
    ranges
        Of the quantized sites' inputs, as calibrated.
    """

    policy: CompressionPolicy
    module: tvm.IRModule
    integer_module: tvm.IRModule
    ranges: tuple[RangeReport, ...] = ()


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
    post_training
        How ranges, scales and integers are found, before any training.
    """

    def __init__(
        self,
        module: tvm.IRModule,
        calibration_x: np.ndarray,
        scores: Mapping[str, np.ndarray] | None,
        post_training: PostTraining | None = None,
    ) -> None:
        self.module = module
        self._x = calibration_x
        self._scores = scores
        self._post_training = post_training or PostTraining()
        self._teacher: Twin | None = None
        # Of the dense module: what is calibrated, and its calibration.
        self._prepared: tuple[tvm.IRModule, Calibration] | None = None

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
        return self._quantize(pruned, policy)[0]

    def _quantize(
        self, pruned: tvm.IRModule, policy: CompressionPolicy
    ) -> tuple[tvm.IRModule, tuple[RangeReport, ...]]:
        how = self._post_training
        sites = {name: site for name, site in policy.sites.items() if site.quantized}
        source, calibration = self._calibrated(pruned)
        module = compress(source, quantization_part(policy), calibration=calibration)
        weight_bits = {name: site.weight_bits for name, site in sites.items()}
        module = round_weights(module, weight_bits, self._x, how.weight_rounding)
        if how.bias_correction:
            module = correct_biases(module, source, self._x)
        bits = {name: site.activation_bits for name, site in sites.items()}
        bits |= dict.fromkeys(quantized_tensors(module), 8)
        ranges = calibration.report(bits)
        return module, tuple(ranges)

    def apply(self, policy: CompressionPolicy, training: Training | None = None) -> Candidate:
        """Apply a policy and, if asked, train what comes of it."""
        policy = self.resolve(policy)
        pruned = self.prune(policy)
        quantized = any(site.quantized for site in policy.sites.values())
        before, after = training.epochs(pruned is not self.module, quantized) if training else (0, 0)
        if training is not None:
            pruned = self._train(pruned, training, before, 0, training.learning_rate)
        module, ranges = self._quantize(pruned, policy) if quantized else (pruned, ())
        if training is not None:
            module = self._train(module, training, after, before, training.learning_rate * QDQ_RATE)
        return Candidate(policy, module, realize(module), ranges)

    def _train(
        self, module: tvm.IRModule, training: Training, epochs: int, before: int, rate: float
    ) -> tvm.IRModule:
        """Train for some epochs, `before` others being done."""
        if not epochs:
            return module
        if training.distill and self._teacher is None:
            self._teacher = Twin(self.module)

        def tell(epoch: int, _: dict[str, float]) -> None:
            if training.progress is not None:
                training.progress(before + epoch)

        return finetune(
            module,
            training.data,
            epochs,
            learning_rate=rate,
            seed=training.seed,
            teacher=self._teacher if training.distill else None,
            augment=training.augment,
            progress=tell,
        )

    def _calibrated(self, pruned: tvm.IRModule) -> tuple[tvm.IRModule, Calibration]:
        """Float module to quantize, equalized if that is wanted, and its calibration."""
        if pruned is self.module and self._prepared is not None:
            return self._prepared
        source = EqualizeChannels()(pruned) if self._post_training.equalize else pruned
        prepared = source, calibrate(source, self._x, self._post_training.calibration)
        if pruned is self.module:
            self._prepared = prepared
        return prepared


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


def quantized_epochs(policy: CompressionPolicy, epochs: int) -> int:
    """Of a training's epochs those that are spent with the quantizers."""
    fewest = min((s.weight_bits for s in policy.sites.values() if s.quantized), default=32)
    return math.ceil(epochs * (INT8_SHARE if fewest >= 8 else QDQ_SHARE))
