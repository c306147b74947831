"""Sampling kernels, fitting a latency model to a device, evaluating it; and `tvm-compress cost`."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from tvm_compress.cli.main import main
from tvm_compress.compressor import Compressor
from tvm_compress.cost.latency_model import LatencyModel
from tvm_compress.errors import DataError
from tvm_compress.model import Model
from tvm_compress.passes.pipeline import build, lower
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.sites import find_sites
from tvm_compress.rpc.device import LatencyResult, MeasurementSettings, open_device
from tvm_compress.rpc.emulated_a72 import EmulatedSession
from tvm_compress.rpc.store import MeasurementStore
from tvm_compress.samples.load import load_sample
from tvm_compress.schedules.apply import KernelInfo, kernel_infos
from tvm_compress.schedules.kernel_key import target_digest
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.search import latency, sampling
from tvm_compress.search.latency import KERNEL_PREFIX, LatencyMeter
from tvm_compress.search.latency_fit import errors_of, fit_latency_model, stored_kernels
from tvm_compress.search.latency_sources import HybridLatency, joint_error, least_sure
from tvm_compress.search.sampling import KernelSampler, random_network, random_policy, subject_of
from tvm_compress.search.settings import DEFAULT_TARGETS, SearchSettings

HOST = parse_target("host")


@pytest.fixture
def meter(tmp_path: Path) -> Iterator[LatencyMeter]:
    store = MeasurementStore(tmp_path / "measurements.sqlite")
    with LatencyMeter(open_device("local"), HOST, store, (1, 1, 28, 28)) as opened:
        yield opened


def pretend(meter: LatencyMeter, kernel: KernelInfo, device: str = "local") -> float:
    """Put a kernel into the store with a time that its work gives: for what is no matter of clocks."""
    seconds = 1e-9 * (kernel.features["sum_ops"] + 2 * kernel.features["vector_ops"] + 1000)
    settings = MeasurementSettings()
    result = LatencyResult.from_samples([seconds], "seconds", settings)
    facts = {"what": "kernel", "kind": kernel.kind, "features": kernel.features}
    meter.store.put(KERNEL_PREFIX + kernel.key, device, result, facts)
    return seconds


def test_random_networks_lower_to_kernels_and_repeat():
    first, second = (random_network(np.random.default_rng(3)) for _ in range(2))
    assert first.input_spec == second.input_spec
    sites = [find_sites(network.module) for network in (first, second)]
    assert sites[0] == sites[1]
    assert sum(site.kind == "conv2d" for site in sites[0]) >= 3


def test_the_sampler_draws_different_policies_the_same_for_a_seed(meter: LatencyMeter):
    sample = load_sample("resnet8-fashion")
    drawn = [KernelSampler([sample], meter, seed).draw() for seed in (0, 0, 1)]
    keys = [[kernel.key for kernel in kernels] for kernels in drawn]
    assert keys[0] == keys[1] != keys[2]


def test_the_sampler_draws_again_where_a_layer_gives_nothing_but_zeros(meter: LatencyMeter):
    first, second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)
    network = nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(8 * 4 * 4, 10)).eval()
    torch.nn.init.constant_(first.get_parameter("bias"), -100.0)
    model = Model.from_torch(network, (torch.zeros(1, 1, 8, 8),))
    compressor, problem = subject_of(model, rules_for(HOST), np.random.default_rng(0))
    int8 = SitePolicy(scheme="int8", weight_bits=8, activation_bits=8)
    with pytest.raises(DataError, match="constant"):
        compressor.apply(CompressionPolicy({site.name: int8 for site in problem.sites}))
    sampler = KernelSampler([model], meter, 0)
    with patch.object(sampling, "RANDOM_SHARE", 0.0):
        # What is left of that network are its policies in fp32.
        drawn = [sampler.draw() for _ in range(5)]
    assert {kernel.kind for kernels in drawn for kernel in kernels} >= {"conv2d_fp32", "dense_fp32"}


def test_kernels_of_a_network_beyond_the_last_cache_read_their_weights_from_memory(tmp_path: Path):
    torch.manual_seed(0)
    # 640 KB of weights each: one fits into 1 MB, all do not.
    network = nn.Sequential(nn.Flatten(), *(nn.Linear(400, 400) for _ in range(3)))
    model = Model.from_torch(network.eval(), (torch.zeros(1, 1, 20, 20),))
    target = parse_target("raspberry-pi/4b-aarch64")
    store = MeasurementStore(tmp_path / "m.sqlite")
    with LatencyMeter(open_device("emulated-a72"), target, store, model.input_spec.shape) as meter:
        meter.set_dense(model.module, "dense")
        kernels = kernel_infos(lower(model.module, target), target)
        alone = {key: result.value for key, result in meter.time_kernels(kernels).items()}
        there = meter.in_network(kernels, alone)
        first = meter.in_network(kernels[:1], alone)
    sums = [sum(times[k.key] * k.count for k in kernels) for times in (alone, there)]
    assert sums[0] < 0.7 * meter.dense.value
    assert sums[1] == pytest.approx(meter.dense.value, rel=0.1)
    assert first == {kernels[0].key: alone[kernels[0].key]}


def test_constants_of_quantization_do_not_make_another_kernel():
    sample = load_sample("resnet8-fashion")
    int8 = SitePolicy(scheme="int8", weight_bits=8, activation_bits=8)
    policy = CompressionPolicy({site.name: int8 for site in find_sites(sample.module)})
    keys = []
    for seed in range(2):
        x = (seed + 1) * np.random.default_rng(seed).normal(size=(4, 1, 28, 28)).astype(np.float32) + seed
        integer = Compressor(sample.module, x, None).apply(policy).integer_module
        keys.append([kernel.key for kernel in kernel_infos(lower(integer, HOST), HOST)])
    same = np.mean([a == b for a, b in zip(*keys, strict=True)])
    # Whether sums fit 32 bits depends on the ranges, and makes another kernel.
    assert same > 0.7
    assert len(set(keys[0])) > 8


def test_kernels_that_are_timed_again_are_not_built_again(meter: LatencyMeter):
    kernels = KernelSampler([], meter, 0).draw()
    some = kernels[:3]
    with patch.object(latency, "object_files", wraps=latency.object_files) as built:
        first = meter.time_kernels(some)
        second = meter.time_kernels(kernels[2:4])
        again = meter.time_kernels(kernels[:4], again=True)
    # One library for the first, one for the kernel that the second call added.
    assert built.call_count == 2
    assert len(built.call_args.args[0]) == 1
    assert set(again) == set(first) | set(second) == {kernel.key for kernel in kernels[:4]}
    assert all(result.ok and result.value > 0 for result in again.values())


def test_a_model_is_fitted_to_a_device_and_goes_on_from_what_is_stored(meter: LatencyMeter):
    sampler = KernelSampler([load_sample("resnet8-fashion")], meter)
    calls: list[int] = []
    model = fit_latency_model(sampler, meter, 26, progress=lambda done, total: calls.append(done))
    assert model.trained
    assert model.rows == 26
    assert calls == [0, 26]
    assert model.provenance["device"] == "local"
    stored = stored_kernels(meter.store, meter.device, HOST)
    assert len(stored) == 26
    assert all(kernel.value > 0 for kernel in stored)
    again = fit_latency_model(sampler, meter, 26)
    assert again.predict_kernels(stored) == model.predict_kernels(stored)


def test_predictions_come_with_errors_that_are_about_right(meter: LatencyMeter):
    sampler = KernelSampler([load_sample("resnet8-fashion")], meter)
    fitted: dict[str, KernelInfo] = {}
    fresh: dict[str, KernelInfo] = {}
    while len(fitted) < 150:
        fitted |= {kernel.key: kernel for kernel in sampler.draw()}
    for kernel in fitted.values():
        pretend(meter, kernel)
    model = fit_latency_model(sampler, meter, len(fitted))
    while len(fresh) < 60:
        fresh |= {kernel.key: kernel for kernel in sampler.draw() if kernel.key not in fitted}
    predicted = model.predict_with_errors(list(fresh.values()))
    true = [pretend(meter, kernel) for kernel in fresh.values()]
    off = errors_of([(value, t) for (value, _), t in zip(predicted, true, strict=True)])
    claimed = np.array([error for _, error in predicted])
    assert np.median(off) < 0.1
    assert 0.3 < np.mean(off <= claimed) <= 1.0
    # Where it claims large errors it makes larger ones.
    order = np.argsort(claimed)
    assert off[order[30:]].mean() > off[order[:30]].mean()


def test_the_store_gives_the_newest_time_of_this_device_and_target(meter: LatencyMeter):
    rng = np.random.default_rng(0)
    compressor, problem = subject_of(load_sample("resnet8-fashion"), rules_for(HOST), rng)
    policy = random_policy(problem, rng)
    kernel = kernel_infos(lower(compressor.apply(policy).integer_module, HOST), HOST)[0]
    pretend(meter, kernel, device="tracker://elsewhere:1/pi")
    assert stored_kernels(meter.store, meter.device, HOST) == []
    first = pretend(meter, kernel)
    assert [k.value for k in stored_kernels(meter.store, meter.device, HOST)] == [first]
    assert stored_kernels(meter.store, meter.device, parse_target("raspberry-pi/4b-aarch64")) == []
    assert target_digest(HOST) in kernel.key


def test_cost_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, rows, table = tmp_path / "model.json", str(tmp_path / "m.sqlite"), tmp_path / "rows.csv"
    layers = [nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()]
    small = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    Model.from_torch(small, (torch.zeros(1, 1, 10, 10),)).save(tmp_path / "small")
    network = ["--network", str(tmp_path / "small")]
    assert main(["cost", "fit", "-o", str(model), "--measurements", rows, *network, "--sample", "30"]) == 0
    assert "30 of 30 kernels" in capsys.readouterr().out
    assert LatencyModel.load(model).rows == 30
    words = ["cost", "eval", str(model), "--measurements", rows, *network, "--policies", "3", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["networks"] == 3
    assert told["sums_median_error"] < 0.5
    assert main(["cost", "export", "--measurements", rows, "-o", str(table)]) == 0
    lines = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert len(lines) >= 30
    assert {line["unit"] for line in lines} == {"seconds"}
    assert all(float(line["value"]) > 0 for line in lines)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["fit", "-o", "M", "--measurements", "R", "--sample", "0"], "needs 24"),
        (["fit", "-o", "M", "--measurements", "R", "--device", "tracker://h:1/k"], "--target"),
        (
            ["eval", "absent.json", "--measurements", "R", "--network", "sample:resnet8-fashion"],
            "cannot be read",
        ),
    ],
)
def test_cost_commands_say_what_is_wrong(words, text, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = {"M": str(tmp_path / "m.json"), "R": str(tmp_path / "m.sqlite")}
    assert main(["cost", *(paths.get(word, word) for word in words)]) == 2
    assert text in capsys.readouterr().err


def test_a_model_of_another_unit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    LatencyModel("estimated_cycles").save(tmp_path / "model.json")
    words = ["cost", "eval", str(tmp_path / "model.json"), "--network", "sample:resnet8-fashion"]
    assert main([*words, "--measurements", str(tmp_path / "m.sqlite")]) == 2
    assert "estimated_cycles, but local measures seconds" in capsys.readouterr().err


def test_of_a_network_the_least_sure_kernels_are_timed_and_no_more_than_needed(meter: LatencyMeter):
    kernels = {kernel.key: kernel for kernel in KernelSampler([], meter, 0).draw()}
    errors = {key: float(2**place) for place, key in enumerate(list(kernels)[:4])}
    keys = list(errors)

    def chosen(limit: float) -> list[str]:
        return [kernel.key for kernel in least_sure(list(kernels.values()), errors, limit)]

    assert joint_error(errors.values()) == pytest.approx(85**0.5)
    assert chosen(9.3) == []
    assert chosen(9.2) == chosen(4.6) == keys[3:]
    assert chosen(4.5) == [keys[3], keys[2]]
    assert chosen(1) == keys[:0:-1]
    assert chosen(0) == keys[::-1]


@pytest.mark.parametrize("device", ["local", "emulated-a72"])
def test_kernels_of_a_measured_network_need_no_library_of_their_own(device: str, tmp_path: Path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 12 * 12, 10)]
    model = Model.from_torch(nn.Sequential(*layers).eval(), (torch.zeros(1, 2, 12, 12),))
    target = parse_target(DEFAULT_TARGETS[device])
    lowered = lower(model.module, target)
    kernels = kernel_infos(lowered, target)
    store = MeasurementStore(tmp_path / "m.sqlite")
    with LatencyMeter(open_device(device), target, store, model.input_spec.shape) as meter:
        meter.set_dense(model.module, "dense")
        compiled = build(lowered, target)
        whole = meter.measure(compiled, "whole", kernels)
        again = meter.time_networks({"same": compiled})
        with (
            patch.object(latency, "object_files", wraps=latency.object_files) as built,
            patch.object(EmulatedSession, "time_kernels", side_effect=AssertionError) as counted,
        ):
            times = {key: result.value for key, result in meter.time_kernels(kernels).items()}
    assert not built.called
    assert not counted.called
    total = sum(times[kernel.key] * kernel.count for kernel in kernels)
    assert list(again) == ["same"]
    if device == "emulated-a72":
        assert again["same"].value == whole.value
        # The network tells what each takes in it.
        assert total == pytest.approx(whole.value, rel=1e-9)
    else:
        # Both are the fastest of several passes: a short measurement may be slow on a busy machine.
        assert 0.3 * again["same"].value < total < 3 * again["same"].value


def test_who_could_be_the_best_depends_on_how_sure_its_prediction_is(meter: LatencyMeter):
    source = HybridLatency(meter, SearchSettings(latency="hybrid", budget=0.5))
    assert source._could_be_best(0.1, 0.9, 0.0)
    source._points.append((0.8, 0.5))
    # At the budget this one is better by 0.05, and 4 % beside it worse by 0.24 - 0.05.
    assert source._could_be_best(0.85, 0.5, 0.0)
    for ratio in (0.48, 0.52):
        assert not source._could_be_best(0.85, ratio, 0.01)
        assert source._could_be_best(0.85, ratio, 0.05)
    # One that is less accurate is not, wherever it may be.
    assert not source._could_be_best(0.79, 0.52, 0.5)
    # As accurate and faster, it stands on the front all the same.
    assert source._would_be_on_front(0.8, 0.4)
    assert not source._would_be_on_front(0.8, 0.6)
