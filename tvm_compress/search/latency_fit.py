"""Fits a latency model to kernels of a device, and tells what it is worth."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import numpy as np
from tvm.target import Target

from tvm_compress.cost.latency_model import LatencyModel
from tvm_compress.model import Model
from tvm_compress.passes.pipeline import build, lower
from tvm_compress.rpc.device import Device
from tvm_compress.rpc.store import MeasurementStore
from tvm_compress.schedules.apply import KernelInfo, kernel_infos
from tvm_compress.schedules.kernel_key import key_ending
from tvm_compress.schedules.target_rules import rules_for
from tvm_compress.search.latency import KERNEL_PREFIX, LatencyMeter
from tvm_compress.search.network_overhead import Check, calls_of, overhead_per_call
from tvm_compress.search.sampling import KernelSampler, random_policy, subject_of

# Kernels to choose from, for each that is timed.
POOL = 2
# Kernels that are timed together, and after which the model is fitted again.
BATCH = 64


@dataclass(frozen=True)
class MeasuredKernel:
    """A kernel of a store, as far as a model needs it."""

    key: str
    kind: str
    features: dict[str, float]
    value: float
    count: int = 1


def stored_kernels(store: MeasurementStore, device: Device, target: Target) -> list[MeasuredKernel]:
    """Kernels for a target that a device has timed, in the order of their keys; the newest time counts.

    Those of older schedules are left out, and those that tell of the device alone.
    """
    found = {}
    ending = key_ending(target)
    for row in store.rows():
        facts, result = row["provenance"], row["result"]
        key = row["key"].removeprefix(KERNEL_PREFIX)
        if row["device"] == device.stored_as and facts.get("features") and key.endswith(ending):
            found[key] = MeasuredKernel(key, facts["kind"], facts["features"], result.value)
    return [found[key] for key in sorted(found)]


def fit_latency_model(
    sampler: KernelSampler,
    meter: LatencyMeter,
    count: int,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LatencyModel:
    """Time kernels until the meter's store has `count` of them, and fit a model to all.

    Of each pool of drawn kernels, those are timed where the model so far expects the largest errors. A store
    that holds kernels already goes on from there.
    """
    rng = np.random.default_rng([seed, 1])
    model = LatencyModel(meter.device.unit, seed)
    while True:
        known = stored_kernels(meter.store, meter.device, meter.target)
        model.fit(model.rows_of(known, [kernel.value for kernel in known]))
        progress(min(len(known), count), count)
        if len(known) >= count:
            break
        wanted = min(BATCH, count - len(known))
        pool = _pool(sampler, {kernel.key for kernel in known}, POOL * wanted)
        errors = np.array([error for _, error in model.predict_with_errors(pool)])
        chosen = rng.choice(len(pool), wanted, replace=False, p=errors / errors.sum())
        meter.time_kernels([pool[i] for i in sorted(chosen)])
    model.provenance = {**meter.device.describe(), "target": str(meter.target), "kernels": model.rows}
    return model


def _pool(sampler: KernelSampler, known: Set[str], size: int) -> list[KernelInfo]:
    """Kernels that are not known, of as many networks as it takes."""
    pool: dict[str, KernelInfo] = {}
    while len(pool) < size:
        pool |= {kernel.key: kernel for kernel in sampler.draw() if kernel.key not in known}
    return list(pool.values())


@dataclass(frozen=True)
class Evaluation:
    """Pairs of (predicted, measured) of kernels and of networks; (sum of kernels, measured) of networks."""

    kernels: list[tuple[float, float]]
    networks: list[tuple[float, float]]
    sums: list[tuple[float, float]]

    def summary(self, within: float = 0.1) -> dict[str, float]:
        """Shares within a relative error, median errors, and rank correlation of networks."""
        from scipy.stats import spearmanr

        networks = np.array(self.networks)
        return {
            "kernels": len(self.kernels),
            "networks": len(self.networks),
            "kernels_within": float(np.mean(errors_of(self.kernels) <= within)),
            "kernels_median_error": float(np.median(errors_of(self.kernels))),
            "networks_within": float(np.mean(errors_of(self.networks) <= within)),
            "networks_median_error": float(np.median(errors_of(self.networks))),
            "networks_spearman": float(spearmanr(networks[:, 0], networks[:, 1]).statistic),
            "sums_median_error": float(np.median(errors_of(self.sums))),
        }


def errors_of(pairs: Sequence[tuple[float, float]]) -> np.ndarray:
    """Relative error of each (predicted, measured)."""
    predicted, measured = np.array(pairs).T
    return np.abs(predicted / measured - 1.0)


def evaluate_latency_model(
    latency_model: LatencyModel,
    model: Model,
    meter: LatencyMeter,
    policies: int,
    seed: int,
    seen: Set[str] = frozenset(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Compare predictions with measurements, on random policies of one network.

    Every distinct kernel counts once, but those whose keys were `seen` in fitting. To sums of measured
    kernels and to predictions of networks the overhead of their calls is added that whole networks have over
    sums of measured kernels, as a search does it. Kernels and networks are timed alike: a clock's figures are
    the fastest of several passes over all of them.
    """
    rng = np.random.default_rng([seed, 2])
    compressor, problem = subject_of(model, rules_for(meter.target), rng)
    infos, built = {}, {}
    for number in range(policies):
        name = str(number)
        lowered = lower(compressor.apply(random_policy(problem, rng)).integer_module, meter.target)
        infos[name], built[name] = kernel_infos(lowered, meter.target), build(lowered, meter.target)
        progress(number + 1, policies)
    distinct = {kernel.key: kernel for kernels in infos.values() for kernel in kernels}
    times = {key: result.value for key, result in meter.time_kernels(list(distinct.values())).items()}
    predicted = dict(zip(distinct, latency_model.predict_kernels(list(distinct.values())), strict=True))
    checks, predictions = [], []
    for name, whole in meter.time_networks(built).items():
        if all(k.key in times for k in infos[name]):
            total = meter.sum_in_network(infos[name], times)
            checks.append(Check(total, calls_of(infos[name]), whole.value))
            predictions.append(meter.sum_in_network(infos[name], predicted))
    overhead = overhead_per_call(checks)
    return Evaluation(
        [(predicted[key], value) for key, value in times.items() if key not in seen],
        [(p + overhead * one.calls, one.whole) for p, one in zip(predictions, checks, strict=True)],
        [(one.total + overhead * one.calls, one.whole) for one in checks],
    )
