"""The latency model: it learns kernels' times, says when it cannot, and comes back from disk the same."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from tvm_compress.cost.features import FEATURE_NAMES, kernel_vector
from tvm_compress.cost.latency_model import MIN_ROWS, LatencyModel
from tvm_compress.errors import StudyError


@dataclass
class Kernel:
    name: str
    kind: str
    features: dict[str, float]
    count: int = 1
    key: str = ""
    extra: dict = field(default_factory=dict)


def kernels(number: int, seed: int = 0) -> list[Kernel]:
    rng = np.random.default_rng(seed)
    found = []
    for index in range(number):
        channels, size = 8 * int(rng.integers(1, 9)), int(rng.choice([7, 14, 28]))
        macs = channels * channels * 9 * size * size
        features: dict[str, float] = {
            "macs": macs,
            "sum_ops": macs / 4,
            "input_bytes": 4 * channels * size * size,
            "output_bytes": 4 * channels * size * size,
            "IC": channels,
            "OC": channels,
            "OH": size,
            "OW": size,
            "activation_bits": 8,
            "weight_bits": 8,
        }
        kind = ("conv2d_fp32", "conv2d_int8")[index % 2]
        found.append(Kernel(f"k{index}", kind, features, key=f"key{index}"))
    return found


def true_time(kernel: Kernel) -> float:
    rate = {"conv2d_fp32": 2e10, "conv2d_int8": 7e10}[kernel.kind]
    fill = 1.0 if kernel.features["IC"] % 16 == 0 else 1.4
    return kernel.features["macs"] / rate * fill + 2e-6


def fitted(some: list[Kernel], **options) -> LatencyModel:
    model = LatencyModel("seconds", **options)
    return model.fit(model.rows_of(some, [true_time(k) for k in some]))


def test_model_predicts_kernels_that_it_never_saw():
    seen, unseen = kernels(80), kernels(40, seed=1)
    model = fitted(seen)
    assert model.trained
    predicted, true = np.array(model.predict_kernels(unseen)), np.array([true_time(k) for k in unseen])
    assert np.median(np.abs(predicted / true - 1)) < 0.1
    untrained = fitted(seen[: MIN_ROWS - 1])
    assert not untrained.trained
    rough = np.array(untrained.predict_kernels(unseen))
    assert np.median(np.abs(np.log(rough / true))) < np.log(4)


def test_the_same_rows_give_the_same_model_also_from_disk(tmp_path):
    first, second = (fitted(kernels(40), provenance={"device": "local"}) for _ in range(2))
    asked = kernels(10, seed=3)
    assert first.predict_kernels(asked) == second.predict_kernels(asked)
    first.save(tmp_path / "model.json")
    loaded = LatencyModel.load(tmp_path / "model.json")
    assert loaded.predict_with_errors(asked) == first.predict_with_errors(asked)
    assert (loaded.unit, loaded.rows, loaded.trained) == ("seconds", 40, True)
    assert loaded.provenance["device"] == "local"
    assert "xgboost" in loaded.provenance


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(StudyError, match="cannot be read"):
        LatencyModel.load(tmp_path / "model.json")


def test_useless_rows_do_not_count():
    model = LatencyModel("seconds")
    assert model.fit(model.rows_of(kernels(3), (float("nan"), 0.0, 1.0))).rows == 1


def test_a_model_that_was_fitted_before_leaves_only_the_difference_to_learn(tmp_path):
    """On a device that is twice as fast, a few kernels are enough for what the first took many."""
    prior = fitted(kernels(80))
    few, asked = kernels(6, seed=5), kernels(20, seed=6)
    model = LatencyModel("seconds", prior=prior)
    model.fit(model.rows_of(few, [0.5 * true_time(k) for k in few]))
    assert not model.trained
    expected = 0.5 * np.array([true_time(k) for k in asked])
    assert np.median(np.abs(model.predict_kernels(asked) / expected - 1)) < 0.1
    assert [e for _, e in model.predict_with_errors(asked)] == [
        e for _, e in prior.predict_with_errors(asked)
    ]
    many = kernels(40, seed=7)
    model.fit(model.rows_of(many, [0.5 * true_time(k) for k in many]))
    assert model.trained
    assert np.median(np.abs(model.predict_kernels(asked) / expected - 1)) < 0.1
    model.save(tmp_path / "model.json")
    assert LatencyModel.load(tmp_path / "model.json").predict_kernels(asked) == model.predict_kernels(asked)


def test_vector_names_every_number_and_takes_unknown_kinds():
    kernel = Kernel("pool", "max_pool2d", {"output_bytes": 7.0, "IC": 24.0})
    values = dict(zip(FEATURE_NAMES, kernel_vector(kernel), strict=True))
    assert values["kind_other"] == 1.0
    assert values["log2_output_bytes"] == 3.0
    assert values["ic_over_32"] == 0.75
