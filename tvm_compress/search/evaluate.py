"""The evaluator that the search uses: accuracy by the twin's integers, latency from the device."""

import time
from dataclasses import asdict
from typing import Any

import numpy as np

from tvm_compress.compressor import Candidate, Compressor, Training
from tvm_compress.metrics.cost import metrics
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.search.latency import structure_key
from tvm_compress.search.latency_sources import LatencySource
from tvm_compress.search.results import MEASURED, EpisodeResult
from tvm_compress.twin import Twin


class CompressionEvaluator:
    """Applies a policy and measures what comes of it; a policy seen before is answered from memory.

    Accuracy is that of the integer module, the integers that the artifact computes, on validation images; the
    test images are not at hand here.

    Parameters
    ----------
    compressor
        Applies policies.
    source
        Of latencies.
    x, y
        Normalised validation images [N, C, H, W] and labels [N].
    model, where
        Fingerprint of the model, and what else the latency depends on: parts of the keys of measurements.
    unit
        Of the latencies.
    training
        Retraining of each candidate before its accuracy is taken, or None.
    """

    def __init__(
        self,
        compressor: Compressor,
        source: LatencySource,
        x: np.ndarray,
        y: np.ndarray,
        model: str,
        where: str,
        unit: str,
        training: Training | None = None,
    ) -> None:
        self._compressor = compressor
        self._source = source
        self._x, self._y = x, y
        self._model, self._where, self._unit = model, where, unit
        self._training = training
        self._seen: dict[str, EpisodeResult] = {}
        #: How long each latency took to find in this process, building included.
        self.latency_seconds: list[float] = []

    def evaluate(self, policy: CompressionPolicy, episode: int) -> EpisodeResult:
        """Result of a policy in an episode."""
        key = self.key(policy)
        if key in self._seen:
            return self._seen[key]
        result = self.judge(self._compressor.apply(policy, self._training), key, episode)
        if result.latency_kind == MEASURED:
            self._seen[key] = result
        return result

    def ratio(self, policy: CompressionPolicy) -> float:
        """Latency of a policy over the dense model's; nothing is trained for it."""
        return self._source.ratio(self._compressor.apply(policy).integer_module, self.key(policy))

    def key(self, policy: CompressionPolicy) -> str:
        """Key of a policy's structure on this model and device."""
        return structure_key(policy, self._model, self._where)

    def judge(self, candidate: Candidate, key: str, episode: int) -> EpisodeResult:
        """Accuracy, latency and costs of a candidate."""
        accuracy = Twin(candidate.integer_module).accuracy(self._x, self._y)
        begin = time.perf_counter()
        latency = self._source.latency(candidate.integer_module, key, episode, accuracy)
        self.latency_seconds.append(time.perf_counter() - begin)
        costs = metrics(candidate.module, candidate.policy)
        return EpisodeResult(accuracy, latency.value, latency.ratio, latency.kind, self._unit, costs)

    def state_dict(self) -> dict[str, Any]:
        """Results by policy, and the latencies' state."""
        seen = {key: asdict(result) for key, result in self._seen.items()}
        return {"seen": seen, "source": self._source.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s values."""
        self._seen = {key: EpisodeResult(**values) for key, values in state["seen"].items()}
        self._source.load_state_dict(state["source"])
