"""A network of MobileNetV3 blocks through all that compresses: pruned, quantized, searched, and compiled."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.passes.torch_networks import Gated
from tvm_compress.cli.main import main
from tvm_compress.data.dataset import Dataset
from tvm_compress.model import Model
from tvm_compress.passes.annotate_quantization import quantized_tensors
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.search.sampling import random_policy, subject_of
from tvm_compress.twin import Twin

CLASSES = tuple("abcde")


def images(count: int) -> Dataset:
    """Noise, the class being how bright a channel is."""
    rng = np.random.default_rng(0)
    y = np.arange(count) % len(CLASSES)
    x = rng.uniform(0, 0.5, (count, 3, 8, 8)) + 0.1 * y.reshape(-1, 1, 1, 1)
    return Dataset(x.astype(np.float32), y.astype(np.int64), CLASSES)


@pytest.fixture(scope="module")
def model() -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Gated().eval()
    return Model.from_torch(network, (torch.zeros(1, 3, 8, 8),), class_names=CLASSES)


@pytest.fixture(scope="module")
def saved(model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Give the paths of the model and of data for it."""
    folder = tmp_path_factory.mktemp("gated")
    model.save(folder / "model")
    data = images(120)
    np.savez(folder / "data.npz", x=(data.x * 255).astype(np.uint8).transpose(0, 2, 3, 1), y=data.y)
    return str(folder / "model"), str(folder / "data.npz")


METHODS = {
    "pruned, INT8": ["--pruning-ratio", "0.5", "--weight-bits", "8", "--activation-bits", "8"],
    "4 bits, trained": ["--weight-bits", "4", "--activation-bits", "4", "--finetune-epochs", "1"],
    "corrected": [
        *("--weight-bits", "4", "--activation-bits", "8", "--bias-correction"),
        *("--equalize", "--weight-rounding", "reconstruction"),
    ],
    "toco": ["--method", "toco", "--objective", "prune", "--group", "channel", "--iterations", "2"],
    "fastlc": ["--method", "fastlc", "--scheme", "kmeans", "--bits", "2"],
    "esn": ["--method", "esn", "--width", "0.75", "--finetune-epochs", "1", "--quantized-epochs", "1"],
}


@pytest.mark.parametrize("name", METHODS)
def test_methods_give_what_compiles_to_the_twins_answers(
    name: str, saved: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, data = saved
    out, artifact = str(tmp_path / "model"), str(tmp_path / "artifact")

    def call(*arguments: str) -> dict[str, Any]:
        assert main([*arguments, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    images_option = [] if "esn" in METHODS[name] else ["--images", "32"]
    call("compress", source, "--data", data, "-o", out, *images_option, *METHODS[name])
    call("compile", out, "-o", artifact)
    checked = call("verify", artifact, "--model", out, "--data", data, "--limit", "10")
    assert checked["agreement"] == 1.0


def test_policies_as_the_search_draws_them(model: Model) -> None:
    """Random channels and bits: integers as QDQ, and ranges of what stands between quantized sites."""
    rng = np.random.default_rng(3)
    compressor, problem = subject_of(model, rules_for(parse_target("host")), rng)
    x = images(40).normalized()
    between = 0
    for _ in range(6):
        candidate = compressor.apply(random_policy(problem, rng))
        quantized = {name for name, site in candidate.policy.sites.items() if site.quantized}
        named = {name for row in candidate.ranges for name in row.sites}
        held = set(quantized_tensors(candidate.module)) if quantized else set()
        assert named == quantized | held
        between += len(held)
        found, expected = Twin(candidate.integer_module).predict(x), Twin(candidate.module).predict(x)
        assert np.abs(found - expected).max() <= 0.1 * np.abs(expected).max()
    assert between > 0
