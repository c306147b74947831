"""Samples are taken in rounds that all candidates share, until they are steady; caches can be flushed."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tvm_compress.rpc.clock import ClockSession, Timing, sample_in_rounds
from tvm_compress.rpc.device import DeviceFailedError, LatencyResult, MeasurementSettings, open_device
from tvm_compress.rpc.program import UNKNOWN_CACHES, CacheFlush, Kernel

SETTINGS = MeasurementSettings(warmup=0, repeat=3, min_repeat_ms=0, max_spread=0.02, max_repeat=9)
VECTOR = [((1 << 16,), "float32")] * 2


class Scripted:
    """A candidate whose samples are known beforehand; None is a crash."""

    file = "scripted.so"

    def __init__(self, samples: Sequence[float | None]) -> None:
        self._samples = iter(samples)

    def invoke(self) -> None: ...

    def flush_caches(self, size: bool | int) -> int:
        return int(size)

    def evaluate(self, number: int) -> float:
        sample = next(self._samples)
        if sample is None:
            raise DeviceFailedError("crash", "It fell.")
        return sample


def sample(settings: MeasurementSettings, **samples: Sequence[float | None]):
    timings = {name: Timing(partial(Scripted, script), settings) for name, script in samples.items()}
    return sample_in_rounds(timings, settings)


def test_without_a_spread_there_are_exactly_the_samples_asked_for():
    result = sample(replace(SETTINGS, max_spread=None), a=[1.0, 5.0, 9.0])["a"]
    assert (len(result.samples), result.stopped_by) == (3, "repeat")


def test_steady_samples_stop_at_once():
    result = sample(SETTINGS, a=[1.0, 1.01, 1.0])["a"]
    assert (len(result.samples), result.stopped_by) == (3, "spread")


def test_rounds_go_on_until_all_are_steady_and_stay_paired():
    # "b" is restless for three rounds: the median deviation of 2, 3, 1, 2 is 0.5, of 2, 3, 1, 2, 2 it is 0.
    results = sample(SETTINGS, a=[1.0] * 5, b=[2.0, 3.0, 1.0, 2.0, 2.0])
    assert {name: (len(r.samples), r.stopped_by) for name, r in results.items()} == {
        "a": (5, "spread"),
        "b": (5, "spread"),
    }
    assert results["b"].spread <= 0.02 * results["b"].value


def test_the_limit_ends_what_never_becomes_steady():
    results = sample(SETTINGS, restless=[1.0, 2.0, 3.0] * 3, still=[1.0] * 9)
    assert {(len(r.samples), r.stopped_by) for r in results.values()} == {(9, "limit")}


def test_who_fails_delays_nobody():
    results = sample(SETTINGS, bad=[1.0, 9.0, None], good=[1.0] * 3)
    assert list(results) == ["bad", "good"]
    assert results["bad"].error == ("crash", "It fell.")
    assert results["bad"].stopped_by is None
    assert (len(results["good"].samples), results["good"].stopped_by) == (3, "spread")


def test_a_real_device_stops_by_spread_or_limit(build):
    library = build("layers", "local")
    inputs = [np.ones((2, 8), "float32"), np.ones((8, 4), "float32")]
    jobs = {"a": (library, inputs), "b": (library, inputs)}
    reached = replace(SETTINGS, min_repeat_ms=1.0, max_spread=0.99, timeout_s=20.0)
    for settings, expected in ((reached, (3, "spread")), (replace(reached, max_spread=1e-15), (9, "limit"))):
        with open_device("local").open(settings) as session:
            results = session.time_many(jobs)
        assert {(len(r.samples), r.stopped_by) for r in results.values()} == {expected}
        assert all(r.counters["calls_per_sample"] > 1 for r in results.values())


@pytest.mark.parametrize("kind", ["main", "kernel"])
@pytest.mark.parametrize("flush", [True, 64 << 20])
def test_flushed_caches_make_calls_slower(build, kind, flush):
    library = build("vector" if kind == "main" else "vector_kernels", "local")
    fastest = {}
    for cache_flush in (False, flush):
        settings = MeasurementSettings(
            repeat=15, min_repeat_ms=0, number=2, timeout_s=20.0, cache_flush=cache_flush
        )
        with open_device("local").open(settings) as session:
            if kind == "main":
                result = session.time(library, [np.ones(1 << 16, "float32")])
            else:
                result = session.time_kernels(library, {"twice": VECTOR})["twice"]
        assert result.error is None
        assert result.counters["calls_per_sample"] == 2
        fastest[bool(cache_flush)] = min(result.samples)
    # What disturbs a sample makes it slower: the fastest of each are compared. 256 KiB are read and written.
    assert fastest[True] > 1.3 * fastest[False]
    wanted = result.counters["cache_flush_bytes"]
    assert wanted == flush if flush is not True else wanted >= UNKNOWN_CACHES


def test_a_worker_without_python_flushes_by_tvms_own_means(build):
    with open_device("emulated-a72").open() as session:
        worker: Any = vars(session)["_worker"]
        flush = worker.call("Preparing", 20.0, CacheFlush.prepare, worker, True)
        assert flush == CacheFlush(UNKNOWN_CACHES, {"cache_flush_bytes": UNKNOWN_CACHES})
        module, file = worker.load(build("vector_kernels", "emulated-a72"), 20.0)
        kernel = Kernel(worker, module, file, "twice", VECTOR, 20.0)
        assert kernel.flush_caches(1 << 20) == 1 << 20
        assert kernel.evaluate(2) > 0
        del module, kernel


class ScriptedKernels(ClockSession):
    """A session whose kernels take what is known beforehand, pass by pass; None is a crash."""

    def __init__(self, **passes: Sequence[float | None]) -> None:
        self.settings = SETTINGS
        self._passes = {name: iter(values) for name, values in passes.items()}
        self.order: list[str] = []

    def _time_many(self, candidates):
        raise NotImplementedError

    def _time_kernel(self, loaded, name):
        self.order.append(name)
        value = next(self._passes[name])
        if value is None:
            return LatencyResult.failed("crash", "It fell.", "seconds", SETTINGS)
        return LatencyResult.from_samples([value], "seconds", SETTINGS)


def test_of_several_passes_the_fastest_counts_and_a_failure_ends_a_kernels_passes():
    session = ScriptedKernels(a=[3.0, 1.0, 2.0], b=[1.0, None], c=[2.0, 2.0, 3.0])
    results = session.time_kernels(Path("none.so"), {"a": [], "b": [], "c": []}, 3)
    assert results["a"].value == 1.0
    assert results["b"].error == ("crash", "It fell.")
    assert results["c"].value == 2.0
    assert "".join(session.order) == "abcabcac"


def test_passes_over_the_kernels_of_a_library_load_it_once(build):
    library = build("kernels", "local")
    arguments = [((4096,), "float32")] * 2
    with open_device("local").open(replace(SETTINGS, min_repeat_ms=0.1, timeout_s=20.0)) as session:
        results = session.time_kernels(library, {"double": arguments}, 4)
        worker: Any = vars(session)["_worker"]
        assert [path.name for path in worker.directory.glob("*.so")] == ["library1.so"]
        # A crash takes the worker with it: the next kernel gets a new one.
        both = session.time_kernels(library, {"crash": [((1,), "int32")], "double": arguments}, 2)
    assert results["double"].ok
    assert results["double"].value > 0
    assert both["crash"].error is not None
    assert both["crash"].error[0] == "crash"
    assert both["double"].ok
