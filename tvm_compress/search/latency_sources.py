"""Where a search takes a candidate's latency from: the whole network, its kernels, or the latency model."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, Protocol

import numpy as np
import tvm
import tvm_ffi

from tvm_compress.cost.latency_model import KernelRow, LatencyModel
from tvm_compress.errors import SettingError
from tvm_compress.passes.pipeline import build, lower
from tvm_compress.rpc.device import LatencyResult
from tvm_compress.schedules.apply import KernelInfo, kernel_infos
from tvm_compress.search.latency import LatencyMeter
from tvm_compress.search.network_overhead import Check, calls_of, overhead_per_call
from tvm_compress.search.results import MEASURED, PREDICTED, SUMMED
from tvm_compress.search.settings import SearchSettings

# A candidate that the device fails on (twice) counts as this many times slower than the dense model.
FAILED_RATIO = 10.0
# A network whose predicted latency may be off by more than this share has kernels timed, the least sure ones,
# until it may not; one that would enter the Pareto set, or may be the best so far, by less.
UNCERTAIN = 0.05
FAIRLY_SURE = 0.03
# A reward changes by three times what its latency does: a best policy that is off by 1 % is another one.
SURE = 0.003
# So many known kernels are timed again with every whole network but the first, to see whether the device is
# what it was.
DRIFT_SAMPLE = 3
# Beyond this change of their times all that are known are corrected.
DRIFT = 0.1
# The model is fitted again when it knows so many times as many kernels: a fit takes as long as timing some.
REFIT = 1.25
# So many modules' kernels are kept, for policies that come again.
MOST_KEPT = 256


@dataclass(frozen=True)
class Latency:
    """Latency of a network in the device's unit, its ratio to the dense model's, and where it comes from."""

    value: float
    ratio: float
    kind: str  # "measured" | "summed" | "predicted" | "failed"


class LatencySource(Protocol):
    """Tells the latency of a module."""

    def latency(self, module: tvm.IRModule, key: str, episode: int, accuracy: float) -> Latency:
        """Latency of an integer (or float) module with the structure `key`."""
        ...

    def ratio(self, module: tvm.IRModule, key: str) -> float:
        """Latency over the dense model's, where many modules differ by little and the last is measured."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what later answers depend on."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s values."""
        ...


class MeasuredLatency:
    """Builds and measures every policy that was not measured before; sums of kernels may tell its ratios."""

    def __init__(self, meter: LatencyMeter, kernels: "KernelLatency | None" = None) -> None:
        self._meter = meter
        self._kernels = kernels

    def latency(self, module: tvm.IRModule, key: str, episode: int, accuracy: float) -> Latency:
        """See `LatencySource`."""
        return _whole(self._meter, module, key)

    def ratio(self, module: tvm.IRModule, key: str) -> float:
        """See `LatencySource`."""
        if self._kernels is not None:
            return self._kernels.ratio(module, key)
        return _whole(self._meter, module, key).ratio

    def state_dict(self) -> dict[str, Any]:
        """Nothing: what was measured is in the store."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


def _whole(
    meter: LatencyMeter, module: tvm.IRModule, key: str, kernels: Sequence[KernelInfo] = ()
) -> Latency:
    """Measure a whole network, lowered or not, unless the store has it; its `kernels` may be next."""
    result = meter.measured(key) or meter.measure(build(module, meter.target), key, kernels)
    if not result.ok:
        return _failed(meter)
    return Latency(result.value, result.value / meter.dense.value, MEASURED)


def _failed(meter: LatencyMeter) -> Latency:
    return Latency(FAILED_RATIO * meter.dense.value, FAILED_RATIO, "failed")


class KernelLatency:
    """Sums up a policy's kernels, each of which is built and timed once in all its networks.

    Whole networks are measured for the first episodes and every n-th, to tell what a call costs beside its
    kernel; the median of that is added to all sums.
    """

    def __init__(self, meter: LatencyMeter, settings: SearchSettings) -> None:
        self._meter = meter
        self._settings = settings
        #: The whole networks so far.
        self.checks: list[Check] = []
        # By the hash of a module, its constants' values included.
        self._kernels: dict[int, list[KernelInfo]] = {}

    def latency(self, module: tvm.IRModule, key: str, episode: int, accuracy: float) -> Latency:
        """See `LatencySource`."""
        if self._is_check(episode):
            lowered = lower(module, self._meter.target)
            return self._check(lowered, kernel_infos(lowered, self._meter.target), key)
        return self._estimate(self._kernels_of(module), accuracy)

    def ratio(self, module: tvm.IRModule, key: str) -> float:
        """See `LatencySource`; kernels that were not timed yet are."""
        return self._summed(self._kernels_of(module)).ratio

    def _kernels_of(self, module: tvm.IRModule) -> list[KernelInfo]:
        """Kernels of a module; a search comes back to policies that it likes, and so to the same module."""
        content = tvm_ffi.structural_hash(module)
        if content not in self._kernels:
            if len(self._kernels) >= MOST_KEPT:
                self._kernels.clear()
            self._kernels[content] = kernel_infos(lower(module, self._meter.target), self._meter.target)
        return self._kernels[content]

    def _is_check(self, episode: int) -> bool:
        return len(self.checks) < self._settings.measure_first or (
            (episode + 1) % self._settings.measure_every == 0
        )

    def _check(self, lowered: tvm.IRModule, kernels: Sequence[KernelInfo], key: str) -> Latency:
        """Measure the whole network and each of its kernels; remember how far their sum is from it."""
        latency = _whole(self._meter, lowered, key, kernels)
        total = self._sum_of_timed(kernels)
        if latency.kind == MEASURED and total is not None:
            self.checks.append(Check(total, calls_of(kernels), latency.value))
        return latency

    def _total(self, kernels: Sequence[KernelInfo]) -> float | None:
        """Sum of kernels, or None where the device fails on one."""
        return self._sum_of_timed(kernels)

    def _sum_of_timed(self, kernels: Sequence[KernelInfo]) -> float | None:
        """Sum of kernels, each of them timed, or None where the device fails on one."""
        times = self._time(kernels)
        if any(kernel.key not in times for kernel in kernels):
            return None
        return self._meter.sum_in_network(kernels, times)

    def _estimate(self, kernels: Sequence[KernelInfo], accuracy: float) -> Latency:
        """Latency without the whole network."""
        return self._summed(kernels)

    def _time(self, kernels: Sequence[KernelInfo]) -> dict[str, float]:
        """Time of one call of each kernel, by key; those that fail are missing."""
        return _values(self._meter.time_kernels(kernels))

    def _summed(self, kernels: Sequence[KernelInfo]) -> Latency:
        total = self._total(kernels)
        return _failed(self._meter) if total is None else self._corrected(total, calls_of(kernels), SUMMED)

    def _corrected(self, total: float, calls: int, kind: str) -> Latency:
        value = total + calls * overhead_per_call(self.checks)
        return Latency(value, value / self._meter.dense.value, kind)

    def sum_errors(self) -> list[float]:
        """How far each whole network was from the corrected sum of its kernels, as a share of it."""
        sums = [self._corrected(check.total, check.calls, SUMMED).value for check in self.checks]
        return [abs(total / check.whole - 1.0) for total, check in zip(sums, self.checks, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The checks so far; the kernels' times are in the store."""
        return {"checks": [astuple(check) for check in self.checks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s values."""
        self.checks = [Check(*check) for check in state["checks"]]


def joint_error(errors: Collection[float]) -> float:
    """Standard error of a sum of kernels, of their own: the root of the sum of squares."""
    return math.sqrt(sum(error**2 for error in errors))


def least_sure(kernels: Sequence[KernelInfo], errors: Mapping[str, float], limit: float) -> list[KernelInfo]:
    """Kernels of the largest errors: as few as leave no more than a limit of joint error with the others."""
    by_key = {kernel.key: kernel for kernel in kernels}
    left, chosen = dict(errors), []
    for key in sorted(errors, key=lambda key: (-errors[key], key)):
        if joint_error(left.values()) <= limit:
            break
        chosen.append(by_key[key])
        del left[key]
    return chosen


def _values(results: Mapping[str, LatencyResult]) -> dict[str, float]:
    return {key: result.value for key, result in results.items()}


class HybridLatency(KernelLatency):
    """Predicts kernels that were not timed yet, and times them where it matters.

    Of each policy those are timed of which the model is least sure, until it is sure enough of the sum; surer
    where a policy by its prediction would stand on the Pareto set, and surest where it could be the best so
    far by what the prediction may be off. The model is fitted again to all that is known. Whole networks are
    measured as in `KernelLatency`; with them, some known kernels are timed again to see a drift.
    """

    def __init__(
        self, meter: LatencyMeter, settings: SearchSettings, prior: LatencyModel | None = None
    ) -> None:
        super().__init__(meter, settings)
        unit = meter.device.unit
        if prior is not None and prior.unit != unit:
            raise SettingError(
                f"The latency model predicts {prior.unit}, but {meter.device.name} measures {unit}.",
                "Give one that was fitted on this device.",
            )
        self._rows: dict[str, KernelRow] = {}
        # How many of them, the first, the model was fitted to.
        self._fitted = 0
        # (accuracy, ratio) of every episode so far.
        self._points: list[tuple[float, float]] = []
        #: Changes that all times were corrected by, as shares.
        self.drifts: list[float] = []
        facts = {"device": meter.device.name}
        self._model = LatencyModel(unit, settings.seed, facts, prior=prior)

    @property
    def model(self) -> LatencyModel:
        """The model, fitted to what was timed, all but the last few."""
        if len(self._rows) >= REFIT * self._fitted:
            self._fit(len(self._rows))
        return self._model

    def latency(self, module: tvm.IRModule, key: str, episode: int, accuracy: float) -> Latency:
        """See `LatencySource`."""
        latency = super().latency(module, key, episode, accuracy)
        self._points.append((accuracy, latency.ratio))
        return latency

    def _check(self, lowered: tvm.IRModule, kernels: Sequence[KernelInfo], key: str) -> Latency:
        if self.checks:
            self._look_for_drift(kernels)
        return super()._check(lowered, kernels, key)

    def _estimate(self, kernels: Sequence[KernelInfo], accuracy: float) -> Latency:
        calls = calls_of(kernels)

        def limit(total: float, error: float) -> float:
            ratio = self._corrected(total, calls, PREDICTED).ratio
            if self._could_be_best(accuracy, ratio, error):
                return SURE
            return FAIRLY_SURE if self._would_be_on_front(accuracy, ratio) else UNCERTAIN

        total = self._total(kernels, limit)
        if total is None:
            return _failed(self._meter)
        timed = all(kernel.key in self._rows for kernel in kernels)
        return self._corrected(total, calls, SUMMED if timed else PREDICTED)

    def _total(
        self, kernels: Sequence[KernelInfo], limit: Callable[[float, float], float] = lambda *_: SURE
    ) -> float | None:
        """As the other; of the kernels that were not timed yet, only so many are that the sum is sure enough.

        Parameters
        ----------
        limit
            By how much of it a sum may be off, given the sum and by how much of it the prediction may be.
        """
        while True:
            total, errors = self._predict(kernels)
            error = joint_error(errors.values()) / total
            needed = least_sure(kernels, errors, limit(total, error) * total)
            if not needed:
                return total
            if len(self._time(needed)) < len(needed):
                return None

    def _predict(self, kernels: Sequence[KernelInfo]) -> tuple[float, dict[str, float]]:
        """Sum of kernels, known or predicted; how far each of these may be off in it, by its key."""
        unknown = [kernel for kernel in kernels if kernel.key not in self._rows]
        times = {k.key: self._rows[k.key].value for k in kernels if k.key in self._rows}
        errors: dict[str, float] = {}
        for kernel, (value, error) in zip(unknown, self.model.predict_with_errors(unknown), strict=True):
            times[kernel.key] = value
            # The same kernel may be called by several names.
            errors[kernel.key] = errors.get(kernel.key, 0.0) + error * value * kernel.count
        return self._meter.sum_in_network(kernels, times), errors

    def _time(self, kernels: Sequence[KernelInfo]) -> dict[str, float]:
        """As the other; a kernel that was timed once keeps its time, corrected for drift."""
        unknown = [kernel for kernel in kernels if kernel.key not in self._rows]
        times = super()._time(unknown)
        timed = [kernel for kernel in unknown if kernel.key in times]
        rows = self._model.rows_of(timed, [times[kernel.key] for kernel in timed])
        self._rows |= {kernel.key: row for kernel, row in zip(timed, rows, strict=True)}
        return {k.key: self._rows[k.key].value for k in kernels if k.key in self._rows}

    def _fit(self, count: int) -> None:
        """Fit the model to the first so many kernels that were timed."""
        self._fitted = count
        self._model.fit([self._rows[key] for key in sorted(list(self._rows)[:count])])

    def _could_be_best(self, accuracy: float, ratio: float, error: float) -> bool:
        """Whether a policy has the highest reward so far at a latency that the prediction leaves open."""
        settings = self._settings

        def reward(point: tuple[float, float]) -> float:
            return point[0] + settings.beta * abs(point[1] / settings.budget - 1.0)

        likeliest = min(max(settings.budget, ratio * (1 - error)), ratio * (1 + error))
        return all(reward((accuracy, likeliest)) > reward(point) for point in self._points)

    def _would_be_on_front(self, accuracy: float, ratio: float) -> bool:
        """Whether no policy so far is as good in both accuracy and latency."""
        return not any(a >= accuracy and r <= ratio for a, r in self._points)

    def _look_for_drift(self, kernels: Sequence[KernelInfo]) -> None:
        """Time the network's slowest kernels again; correct all times by the median change if it is large."""
        if self._meter.device.unit != "seconds":
            return
        known = [kernel for kernel in kernels if kernel.key in self._rows]
        slowest = sorted(known, key=lambda kernel: -self._rows[kernel.key].value)[:DRIFT_SAMPLE]
        now = _values(self._meter.time_kernels(slowest, again=True))
        changes = [value / self._rows[key].value for key, value in now.items()]
        if not changes or abs(change := float(np.median(changes)) - 1.0) <= DRIFT:
            return
        self.drifts.append(change)
        self._rows = {
            key: KernelRow(row.vector, row.bound, row.value * (1 + change)) for key, row in self._rows.items()
        }
        self.checks = [replace(check, total=check.total * (1 + change)) for check in self.checks]
        self._fit(len(self._rows))

    def state_dict(self) -> dict[str, Any]:
        """Kernels, checks and points so far, as plain values."""
        rows = {key: [list(row.vector), row.bound, row.value] for key, row in self._rows.items()}
        points = [list(p) for p in self._points]
        found = {"rows": rows, "fitted": self._fitted, "points": points, "drifts": self.drifts}
        return super().state_dict() | found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`'s values and fit the model to them."""
        super().load_state_dict(state)
        self._rows = {
            key: KernelRow(tuple(vector), bound, value)
            for key, (vector, bound, value) in state["rows"].items()
        }
        self._points = [(accuracy, ratio) for accuracy, ratio in state["points"]]
        self.drifts = list(state["drifts"])
        if self._rows:
            self._fit(state.get("fitted", len(self._rows)))
