"""What a network takes beyond its kernels: weights from farther away, and its calls."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st

from tvm_compress.passes.pipeline import lower
from tvm_compress.rpc.device import open_device
from tvm_compress.rpc.store import MeasurementStore
from tvm_compress.samples.load import load_sample
from tvm_compress.schedules.apply import KernelInfo, kernel_infos
from tvm_compress.schedules.reading import LANES, reading_kernel
from tvm_compress.schedules.target_rules import parse_target
from tvm_compress.search.latency import LatencyMeter
from tvm_compress.search.latency_fit import stored_kernels
from tvm_compress.search.network_overhead import (
    LEAST_READ,
    MOST_READ,
    Check,
    overhead_per_call,
    read_from_afar,
    sizes_to_read,
    time_of_byte,
    touched_bytes_of,
)

HOST = parse_target("host")
# A cache of 64 KB: a byte takes 1 within, 5 beyond.
READING = {
    1 << 14: 1.0 * (1 << 14),
    1 << 16: 1.0 * (1 << 16),
    1 << 17: 5.0 * (1 << 17),
    1 << 20: 5.0 * (1 << 20),
}


def kernel_of(key: str, weight_bytes: float, count: int = 1, output_bytes: float = 0) -> KernelInfo:
    """Make a kernel of which nothing but its bytes matters."""
    features = {"weight_bytes": float(weight_bytes), "input_bytes": 0.0, "output_bytes": float(output_bytes)}
    return replace(reading_kernel(LEAST_READ, HOST), key=key, count=count, features=features)


def test_weights_come_from_farther_away_where_those_of_the_network_do_not_fit():
    small, large, alone = kernel_of("a", 40000), kernel_of("b", 50000, 2), kernel_of("c", 1 << 18)
    assert read_from_afar([small], READING) == {"a": 0}
    assert read_from_afar([small, large], READING) == pytest.approx({"a": 4 * 40000, "b": 4 * 50000})
    # What the others write takes their place too.
    writing = kernel_of("d", 0, output_bytes=100000)
    assert read_from_afar([small, writing], READING) == pytest.approx({"a": 4 * 40000, "d": 0})
    # It does not fit alone either.
    assert read_from_afar([small, alone], READING) == pytest.approx({"a": 4 * 40000, "c": 0})


@given(st.lists(st.integers(0, 1 << 22), min_size=1, max_size=6))
def test_nothing_is_read_faster_in_a_network(sizes: list[int]):
    kernels = [kernel_of(str(i), size) for i, size in enumerate(sizes)]
    more = read_from_afar(kernels, READING)
    assert list(more) == [kernel.key for kernel in kernels]
    assert all(0 <= more[str(i)] <= 4 * size for i, size in enumerate(sizes))


def test_between_two_sizes_the_time_of_a_byte_is_between_theirs():
    assert time_of_byte(0, READING) == time_of_byte(1 << 10, READING) == 1
    assert time_of_byte(2**16.5, READING) == pytest.approx(3)
    assert time_of_byte(1 << 30, READING) == 5


@given(st.floats(0, 1e12))
def test_sizes_reach_beyond_the_network_but_not_beyond_the_most(largest: float):
    sizes = sizes_to_read(largest)
    assert sizes[0] == LEAST_READ
    assert sizes == [LEAST_READ << n for n in range(len(sizes))]
    assert min(largest, MOST_READ) <= sizes[-1] <= MOST_READ


def test_the_overhead_is_that_of_the_middle_check():
    checks = [Check(100.0, 10, 120.0), Check(50.0, 5, 100.0), Check(300.0, 20, 380.0)]
    assert overhead_per_call(checks) == 4
    assert overhead_per_call([]) == 0


@pytest.mark.parametrize("size", [LEAST_READ, 4 * LEAST_READ])
def test_the_kernel_that_reads_reads_all(size: int):
    kernel = reading_kernel(size, HOST)
    data = np.random.default_rng(0).integers(-1000, 1000, (size // 4 // LANES, LANES)).astype(np.int32)
    sums = tvm.runtime.tensor(np.zeros(LANES, np.int32))
    tvm.compile(kernel.func, HOST)["main"](tvm.runtime.tensor(data), sums)
    np.testing.assert_array_equal(sums.numpy(), data.sum(axis=0))


def test_a_clock_tells_what_reading_takes_and_no_model_learns_from_it(tmp_path: Path):
    sample = load_sample("resnet8-fashion")
    store = MeasurementStore(tmp_path / "m.sqlite")
    kernels = kernel_infos(lower(sample.module, HOST), HOST)
    alone = {kernel.key: 1e-6 for kernel in kernels}
    with LatencyMeter(open_device("local"), HOST, store, sample.input_spec.shape) as meter:
        there = meter.in_network(kernels, alone)
        rows = {row["key"]: row["result"].value for row in store.rows()}
        # From what the store has now.
        assert meter.in_network(kernels, alone) == there
        assert stored_kernels(store, meter.device, HOST) == []
    assert set(there) == set(alone)
    assert all(there[key] >= alone[key] for key in alone)
    # From 16 KB to what the sample touches, its 300 KB of weights included; more takes longer.
    assert len(rows) == len(sizes_to_read(touched_bytes_of(kernels))) >= 6
    assert max(rows.values()) > 8 * min(rows.values())
