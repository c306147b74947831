"""Tuning on the emulated Cortex-A72: one kernel, whose cycles repeat; what is found holds in the artifact."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from tvm_compress.compression import compile_model
from tvm_compress.model import Model
from tvm_compress.rpc.device import open_device
from tvm_compress.schedules.target_rules import parse_target
from tvm_compress.schedules.tuning import Tuning
from tvm_compress.tuner import tune_model
from tvm_compress.twin import Twin

RPI4 = "raspberry-pi/4b-aarch64"


def test_one_layer_is_tuned_and_the_artifact_is_as_fast_as_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = Model.from_torch(network.eval(), (torch.zeros(1, 4, 6, 6),))
    device = open_device("emulated-a72")
    path = tmp_path / "db.json"
    (layer,) = tune_model(model, RPI4, device, path, trials=3)
    assert layer.unit == "estimated_cycles"
    assert layer.tried == 4
    assert layer.value <= layer.default_value
    assert Tuning.load(path).for_target(parse_target(RPI4)) == {layer.layer: layer}
    tuned = compile_model(model, RPI4, tmp_path / "tuned", tuning=path)
    plain = compile_model(model, RPI4, tmp_path / "plain")
    x = np.random.default_rng(0).standard_normal((1, 4, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(tuned.predict(x, device), Twin(model.module).predict(x), rtol=1e-4, atol=1e-4)
    cycles = [artifact.benchmark(device)["this"].kernels for artifact in (tuned, plain)]
    # The kernel alone may find other lines in the cache than in the network.
    found, default = (max(value for name, value in part.items() if "conv2d" in name) for part in cycles)
    assert found <= default
