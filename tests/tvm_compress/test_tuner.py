"""Tuning on this machine: the round trip tune -> compile -> verify, and what is never lost by it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from tvm_compress import tuner
from tvm_compress.artifact import Artifact
from tvm_compress.cli.main import main
from tvm_compress.errors import DeviceError, SettingError, TuningError
from tvm_compress.model import Model
from tvm_compress.passes.pipeline import lower
from tvm_compress.rpc.device import LatencyResult, open_device
from tvm_compress.schedules.apply import KernelInfo, kernel_infos
from tvm_compress.schedules.choices import choice_of, layer_key
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.schedules.tuning import Tuning
from tvm_compress.search.latency import LatencyMeter
from tvm_compress.tuner import LEAST_GAIN, tune_model
from tvm_compress.twin import Twin

HOST = parse_target("host")


@pytest.fixture(scope="module")
def model() -> Model:
    """Two equal convolutions with other followers, one of stride 2, and a classifier."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(24, 40),
    )  # fmt: skip
    return Model.from_torch(network.eval(), (torch.zeros(1, 3, 16, 16),))


class FakeTimes:
    """Times that follow from a kernel's choice alone, in place of the device's."""

    def __init__(self, best: str = "", broken: str = "") -> None:
        self.best = best
        self.broken = broken
        self.measured: list[str] = []

    def __call__(
        self, meter: LatencyMeter, kernels: Sequence[KernelInfo], again: bool = False
    ) -> Mapping[str, LatencyResult]:
        found = {}
        for kernel in kernels:
            choice = choice_of(kernel.info, rules_for(HOST).fp32_lanes)
            self.measured.append(layer_key(kernel.info))
            if choice.kernel != self.broken:
                value = 1.0 if choice.kernel == self.best else 2.0
                found[kernel.key] = LatencyResult.from_samples([value], "seconds", meter._kernel_settings)
        return found


def tune(model: Model, path: Path, times: FakeTimes, trials: int = 4, network: float = 0.9) -> dict[str, Any]:
    with (
        patch.object(LatencyMeter, "time_kernels", lambda *given, **named: times(*given, **named)),
        patch.object(tuner, "network_ratio", lambda *given: network),
    ):
        return {one.layer: one for one in tune_model(model, HOST, open_device("local"), path, trials)}


def test_the_fastest_choice_is_kept_and_followed(model: Model, tmp_path: Path) -> None:
    found = tune(model, tmp_path / "db.json", FakeTimes(best="F2"))
    threes = [one for one in found.values() if "strides=1,1" in one.layer]
    # The two equal layers are one entry, though other operators follow them.
    assert len(threes) == 2
    assert len(found) == 4
    assert {one.choice.kernel for one in threes} == {"F2"}
    assert all(one.value <= one.default_value for one in found.values())
    calls = {one.layer: one.value for one in threes}
    assert sorted(calls.values()) == [1.0, 2.0]
    tuned = kernel_infos(lower(model.module, HOST, tuning=tmp_path / "db.json"), HOST)
    algorithms = [kernel.info.get("algorithm") for kernel in tuned if kernel.info.get("KH") == 3]
    assert algorithms == ["F2", "F2", "F2", None]
    keys = {kernel.key for kernel in tuned}
    assert all(key in keys for one in found.values() for key in one.kernels)


def test_ties_and_failures_leave_the_default(model: Model, tmp_path: Path) -> None:
    found = tune(model, tmp_path / "db.json", FakeTimes())
    assert all(one.choice == one.default for one in found.values())
    default = {one.default.kernel for one in found.values()}
    broken = next(name for name in ("F2", "F4") if name not in default)
    found = tune(model, tmp_path / "other.json", FakeTimes(best=broken, broken=broken))
    assert all(one.choice == one.default for one in found.values())


def test_a_network_that_is_not_faster_keeps_its_defaults(model: Model, tmp_path: Path) -> None:
    found = tune(model, tmp_path / "db.json", FakeTimes(best="F2"), network=1.01)
    assert all(one.choice == one.default and one.value == one.default_value for one in found.values())
    keys = {kernel.key for kernel in kernel_infos(lower(model.module, HOST), HOST)}
    assert all(key in keys for one in found.values() for key in one.kernels)


def test_a_device_that_fails_on_the_defaults_is_an_error(model: Model, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="fails on the kernels that the schedules choose"):
        tune(model, tmp_path / "db.json", FakeTimes(broken="direct"))
    assert not (tmp_path / "db.json").exists()


def test_known_layers_are_not_measured_again_and_others_kept(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "db.json"
    first = tune(model, path, FakeTimes(best="F2"))
    stranger = replace(next(iter(first.values())), layer="a stranger's")
    path.write_text(Tuning.load(path).merged([stranger]).to_json(), encoding="utf-8")
    times = FakeTimes(best="F4")
    assert tune(model, path, times) == first
    assert not times.measured
    # More trials measure again.
    again = tune(model, path, times, trials=6)
    assert times.measured
    assert {one.choice.kernel for one in again.values() if "strides=1,1" in one.layer} == {"F4"}
    assert stranger in Tuning.load(path).layers
    assert len(Tuning.load(path).layers) == len(first) + 1


def test_tune_compile_verify_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 40))
    model = Model.from_torch(network.eval(), (torch.zeros(1, 3, 4, 4),))
    model.save(tmp_path / "model")
    words = ["tune", str(tmp_path / "model"), "-o", str(tmp_path / "db.json"), "--trials", "2", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["layers"]) == 2
    assert told["unit"] == "seconds"
    for layer in told["layers"]:
        assert layer["value"] <= layer["default_value"]
        assert (
            layer["choice"] == layer["default"] or layer["value"] < (1 - LEAST_GAIN) * layer["default_value"]
        )
    words = ["compile", str(tmp_path / "model"), "--tuning", str(tmp_path / "db.json"), "--json"]
    assert main([*words, "-o", str(tmp_path / "a")]) == 0
    assert main([*words, "-o", str(tmp_path / "b")]) == 0
    capsys.readouterr()
    images = np.random.default_rng(0).standard_normal((3, 3, 4, 4)).astype(np.float32)
    logits = [Artifact.load(tmp_path / name).predict(images, open_device("local")) for name in "ab"]
    np.testing.assert_array_equal(logits[0], logits[1])
    np.testing.assert_allclose(logits[0], Twin(model.module).predict(images), rtol=1e-3, atol=1e-3)
    # People get a table.
    assert main(["tune", str(tmp_path / "model"), "-o", str(tmp_path / "db.json"), "--trials", "2"]) == 0
    assert "next: tvm-compress compile" in capsys.readouterr().out


def test_what_cannot_be_tuned_is_told(model: Model, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="trials is 0"):
        tune_model(model, HOST, open_device("local"), tmp_path / "db.json", trials=0)
    (tmp_path / "db.json").write_text("7", encoding="utf-8")
    with pytest.raises(TuningError, match="its version is None"):
        tune_model(model, HOST, open_device("local"), tmp_path / "db.json")
    assert (tmp_path / "db.json").read_text() == "7"
