"""The search with the real passes, twin, kernels and local device, on a network of a few hundred weights."""

import dataclasses
import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from tvm_compress.compressor import Compressor, Training
from tvm_compress.cost.latency_model import LatencyModel
from tvm_compress.data.dataset import Dataset, Split
from tvm_compress.errors import DataError, ModelError, SettingError, StudyError
from tvm_compress.finetune import finetune
from tvm_compress.model import Model
from tvm_compress.passes.groups import find_coupled_sets
from tvm_compress.passes.params import get_params, get_stage, set_params
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.sites import find_sites
from tvm_compress.rpc.device import open_device
from tvm_compress.rpc.store import MeasurementStore
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.search import latency_sources
from tvm_compress.search.latency import LatencyMeter
from tvm_compress.search.latency_sources import KernelLatency
from tvm_compress.search.problem import SearchProblem
from tvm_compress.search.refine import best_refined, refine
from tvm_compress.search.results import ProgressEvent, SearchResult
from tvm_compress.search.run import run_search
from tvm_compress.search.sensitivity import analyse, from_json, kl_divergence, labelled, to_json, variants
from tvm_compress.search.settings import SearchSettings
from tvm_compress.search.study import read_trials
from tvm_compress.tolerance.channels import channel_scores
from tvm_compress.twin import Twin

CLASSES = ("left", "right", "top")


class Network(nn.Module):
    """A stem, a residual block and a dense layer, for 1 x 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv1, self.bn1 = nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.down = nn.Conv2d(32, 16, 1, stride=2, bias=False)
        self.fc = nn.Linear(16, len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)) + self.down(x))
        return self.fc(y.mean((2, 3)))


def images(count: int, seed: int) -> Dataset:
    """Noise with a bright bar whose place is the class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, len(CLASSES), count)
    x = rng.uniform(0, 0.5, (count, 1, 8, 8))
    for image, label in zip(x, y, strict=True):
        bar = {0: np.s_[:, :, :3], 1: np.s_[:, :, 5:], 2: np.s_[:, :3, :]}[int(label)]
        image[bar] += 0.2
    return Dataset(x.astype(np.float32), y.astype(np.int64), CLASSES)


@pytest.fixture(scope="module")
def split() -> Split:
    return Split(images(384, 0), images(128, 1), images(16, 2))


@pytest.fixture(scope="module")
def model(split: Split) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network().eval()
    imported = Model.from_torch(network, (torch.zeros(1, 1, 8, 8),), class_names=CLASSES)
    return dataclasses.replace(imported, module=finetune(imported.module, split.train, 4, learning_rate=0.05))


@pytest.fixture(scope="module")
def problem(model: Model) -> SearchProblem:
    rules = rules_for(parse_target("host"))
    sites, sets = find_sites(model.module), find_coupled_sets(model.module)
    return SearchProblem(sites, sets, "joint", rules.bitserial_legal, rounding=8, target="host")


@pytest.fixture(scope="module")
def compressor(model: Model, split: Split) -> Compressor:
    x = split.train.normalized(slice(0, 64))
    return Compressor(model.module, x, channel_scores(model.module, x, split.train.y[:64]))


SETTINGS = SearchSettings(
    agent="joint",
    budget=0.6,
    episodes=4,
    warmup=2,
    seed=1,
    rounding=8,
    retrain_images=128,
    calibration_images=64,
    validation_images=0,
    sensitivity_images=64,
    finetune_epochs=3,
    measure_first=2,
    measure_every=50,
)


@pytest.fixture(scope="module")
def studied(
    model: Model, split: Split, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SearchResult, list]:
    events: list[ProgressEvent] = []
    path = tmp_path_factory.mktemp("studies") / "joint"
    return run_search(model, split, SETTINGS, path, events.append), events


def test_search_hands_over_all_that_it_found(studied, model, split):
    result, events = studied
    assert len(result.trials) == 4
    assert result.dense.ratio == 1.0
    assert result.dense.unit == "seconds"
    assert result.dense.accuracy == Twin(model.module).accuracy(
        split.validation.normalized(), split.validation.y
    )
    assert {t.result.latency_kind for t in result.trials} == {"measured"}
    assert all(
        t.result.latency == pytest.approx(t.result.ratio * result.dense.latency) for t in result.trials
    )
    assert result.best_trial.reward == max(t.reward for t in result.trials)
    assert all(trial in result.trials for trial in result.pareto)
    assert set(result.sensitivity) == {site.name for site in find_sites(model.module)}
    assert result.best in result.refined
    stages = [e.stage for e in events]
    assert sorted(set(stages), key=stages.index) == ["tolerance", "sensitivity", "dense", "episode", "refine"]
    assert all(e.done <= e.total for e in events)


def test_refined_policies_are_ready_to_be_built(studied, split):
    result, _ = studied
    best = result.best
    quantized = any(site.quantized for site in best.policy.sites.values())
    assert get_stage(best.module) == ("qdq" if quantized else "float")
    assert get_stage(best.integer_module) == ("integer" if quantized else "float")
    x, y = split.validation.normalized(), split.validation.y
    assert Twin(best.integer_module).accuracy(x, y) == best.result.accuracy
    assert best.result.latency_kind == "measured"
    for site in best.policy.sites.values():
        assert (site.kept is None) == (site.channels is None)


def test_study_holds_what_is_needed_to_go_on(studied, model, split):
    result, _ = studied
    for name in ("study.json", "trials.jsonl", "checkpoint.pt", "sensitivity.json", "measurements.sqlite"):
        assert (result.path / name).exists()
    again = run_search(model, split, SETTINGS, result.path)
    assert again.trials == result.trials
    assert again.dense == result.dense
    assert again.best.policy == result.best.policy
    assert again.best.result.accuracy == result.best.result.accuracy
    with pytest.raises(StudyError, match="seed"):
        run_search(model, split, dataclasses.replace(SETTINGS, seed=2), result.path)
    other = dataclasses.replace(model, module=Twin(model.module).to_module())
    assert run_search(other, split, SETTINGS, result.path).trials == result.trials  # the same parameters
    changed = dataclasses.replace(model, module=finetune(model.module, split.train, 1))
    with pytest.raises(StudyError, match="parameters"):
        run_search(changed, split, SETTINGS, result.path)


class _KilledError(Exception):
    pass


def test_killed_search_decides_the_same_afterwards(studied, model, split, tmp_path):
    result, _ = studied

    def kill(event: ProgressEvent) -> None:
        if event.stage == "episode" and event.done == 2:
            raise _KilledError

    with pytest.raises(_KilledError):
        run_search(model, split, SETTINGS, tmp_path / "study", kill)
    first = read_trials(tmp_path / "study")
    assert len(first) == 2
    # Latencies differ from run to run, and so does what the agent learns from them. Until then
    # all is given by the seed.
    assert [t.policy for t in first] == [t.policy for t in result.trials[:2]]
    assert [t.result.accuracy for t in first] == [t.result.accuracy for t in result.trials[:2]]
    resumed = run_search(model, split, SETTINGS, tmp_path / "study")
    assert resumed.trials[:2] == first
    assert len(resumed.trials) == 4


def test_on_the_emulated_core_one_seed_gives_one_result_also_when_killed(model, split, tmp_path):
    settings = dataclasses.replace(
        SETTINGS, device="emulated-a72", latency="hybrid", measure_every=3, finetune_epochs=0, refine=1
    )
    whole = run_search(model, split, settings, tmp_path / "whole")

    def kill(event: ProgressEvent) -> None:
        if event.stage == "episode" and event.done == 3:
            raise _KilledError

    with pytest.raises(_KilledError):
        run_search(model, split, settings, tmp_path / "killed", kill)
    killed = run_search(model, split, settings, tmp_path / "killed")
    assert [dataclasses.replace(t, seconds=0) for t in killed.trials] == [
        dataclasses.replace(t, seconds=0) for t in whole.trials
    ]
    assert {t.result.unit for t in whole.trials} == {"estimated_cycles"}
    assert killed.best.result == whole.best.result


@pytest.mark.parametrize("agent", ["pruning", "quantization"])
def test_the_other_agents_leave_what_is_not_theirs(agent, model, split, tmp_path):
    settings = dataclasses.replace(SETTINGS, agent=agent, episodes=2, finetune_epochs=0, warmup=1)
    result = run_search(model, split, settings, tmp_path)
    for trial in result.trials:
        sites = trial.policy.sites.values()
        if agent == "pruning":
            assert {site.scheme for site in sites} == {"fp32"}
        else:
            assert {site.channels for site in sites} == {None}


def test_hybrid_measures_the_first_and_predicts_or_sums_up_others(model, split, tmp_path):
    settings = dataclasses.replace(SETTINGS, latency="hybrid", episodes=8, finetune_epochs=0, refine=1)
    result = run_search(model, split, settings, tmp_path)
    kinds = [trial.result.latency_kind for trial in result.trials]
    assert kinds[:2] == ["measured", "measured"]
    # A policy that comes again is answered with what it was measured at.
    assert set(kinds[2:]) & {"predicted", "summed"}
    assert 0 < result.seconds["latency"] < result.seconds["episodes"]
    assert result.best.result.latency_kind == "measured"
    saved = json.loads((tmp_path / "latency_model.json").read_text())
    assert saved["unit"] == "seconds"
    assert saved["rows"] > 5
    assert all(0.02 < t.result.ratio < 10 for t in result.trials)


def test_a_search_starts_from_a_latency_model_that_was_fitted_before(model, split, tmp_path):
    settings = dataclasses.replace(SETTINGS, latency="hybrid", episodes=4, finetune_epochs=0, refine=1)
    given = LatencyModel("seconds").fit([])
    run_search(model, split, settings, tmp_path / "study", latency_model=given)
    assert LatencyModel.load(tmp_path / "study" / "latency_model.json").prior == given
    with pytest.raises(StudyError, match="latency_model"):
        run_search(model, split, settings, tmp_path / "study")


def test_a_latency_model_that_nothing_uses_or_of_another_device_is_refused(model, split, tmp_path):
    given = LatencyModel("estimated_cycles").fit([])
    with pytest.raises(SettingError, match="measure"):
        run_search(model, split, SETTINGS, tmp_path, latency_model=given)
    hybrid = dataclasses.replace(SETTINGS, latency="hybrid")
    with pytest.raises(SettingError, match="estimated_cycles"):
        run_search(model, split, hybrid, tmp_path, latency_model=given)


def test_kernels_are_timed_once_and_summed_up(model, split, tmp_path):
    settings = dataclasses.replace(SETTINGS, latency="kernels", episodes=7, finetune_epochs=0, refine=1)
    with patch("tvm_compress.search.run.refine", wraps=refine) as refined:
        result = run_search(model, split, settings, tmp_path)
    # A single winner is not judged against others: it learns from the validation images too.
    trained_on = refined.call_args.args[3]
    assert len(trained_on) == len(split.train) + len(split.validation)
    kinds = [trial.result.latency_kind for trial in result.trials]
    assert kinds[:2] == ["measured"] * 2
    assert "summed" in kinds
    assert len(result.sum_errors) == 2
    assert result.best.result.latency_kind == "measured"
    summed = [t.result.ratio for t in result.trials if t.result.latency_kind == "summed"]
    assert all(0.02 < ratio < 10 for ratio in summed)
    rows = MeasurementStore(tmp_path / "measurements.sqlite").rows()
    kernels = [row["key"] for row in rows if row["provenance"]["what"] == "kernel"]
    assert len(kernels) == len(set(kernels)) > 5


def test_a_sum_of_kernels_is_corrected_by_whole_networks(model, tmp_path):
    store = MeasurementStore(tmp_path / "m.sqlite")
    target = parse_target("host")
    with LatencyMeter(open_device("local"), target, store, model.input_spec.shape) as meter:
        meter.set_dense(model.module, "dense")
        source = KernelLatency(meter, SETTINGS)
        first = [source.latency(model.module, f"policy {n}", n, 0.9) for n in range(SETTINGS.measure_first)]
        after = source.latency(model.module, "another", 5, 0.9)
    assert [one.kind for one in first] == ["measured"] * SETTINGS.measure_first
    assert after.kind == "summed"
    # The same network: its kernels' sum, corrected, is what the whole takes.
    assert after.value == pytest.approx(np.median([check.whole for check in source.checks]), rel=1e-9)
    again = KernelLatency(meter, SETTINGS)
    again.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert again.checks == source.checks


def test_a_module_is_lowered_once_as_long_as_all_of_it_stays_the_same(model, tmp_path):
    store = MeasurementStore(tmp_path / "m.sqlite")
    changed = {name: value.copy() for name, value in get_params(model.module).items()}
    changed["fc.weight"].flat[-1] += 1
    settings = dataclasses.replace(SETTINGS, measure_first=1, measure_every=10**6)
    with (
        LatencyMeter(open_device("local"), parse_target("host"), store, model.input_spec.shape) as meter,
        patch.object(latency_sources, "lower", wraps=latency_sources.lower) as lowered,
    ):
        meter.set_dense(model.module, "dense")
        source = KernelLatency(meter, settings)
        # The first is measured as a whole.
        modules = [model.module] * 3 + [set_params(model.module, changed)]
        latencies = [source.latency(module, "policy", 5, 0.9) for module in modules]
    assert latencies[1] == latencies[2] == latencies[3]
    assert lowered.call_count == 3


def test_sensitivity_grows_with_compression_and_repeats(problem, compressor, split):
    x = split.train.normalized(slice(0, 48))
    calls: list[tuple[int, int]] = []
    found = analyse(problem, compressor, x, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (len(variants(problem)), len(variants(problem)))
    assert set(found) == {site.name for site in problem.sites}
    assert set(found["conv1"]["weight"]) == {1, 2, 3, 4, 5, 6, 8}
    assert set(found["stem"]["weight"]) == {8}  # one input channel: no bit-serial
    assert set(found["stem"]["pruning"]) == {0.25, 0.5, 0.75}
    assert "pruning" not in found["down"]  # decided at conv2
    assert found["conv1"]["weight"][1] > found["conv1"]["weight"][4] > found["conv1"]["weight"][8]
    assert found["conv1"]["activation"][1] > found["conv1"]["activation"][8]
    assert all(value > 0 for value in found["stem"]["pruning"].values())
    assert analyse(problem, compressor, x, lambda done, total: None) == found
    assert from_json(json.loads(json.dumps(to_json(found)))) == found
    assert "weights 4 bit" in labelled(found)["conv1"]
    assert "channels -25%" in labelled(found)["stem"]


def test_divergence_is_that_of_the_definition():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 4))
    p, q = (np.exp(v) / np.exp(v).sum(axis=1, keepdims=True) for v in (a, b))
    assert kl_divergence(a, b) == pytest.approx(float((p * np.log(p / q)).sum() / 5))
    assert kl_divergence(a, a) == 0


def test_training_is_split_between_the_stages(split):
    training = Training(split.train, 4, 2, 0.02, 0)
    assert training.epochs(pruned=True, quantized=True) == (4, 2)
    assert training.epochs(pruned=False, quantized=True) == (0, 6)
    assert training.epochs(pruned=True, quantized=False) == (6, 0)
    assert training.epochs(pruned=False, quantized=False) == (0, 0)
    assert Training(split.train, 1, 0, 0.02, 0).epochs(pruned=False, quantized=True) == (0, 0)


def test_candidate_recovers_by_training(compressor, split):
    policy = CompressionPolicy(
        sites={
            "stem": SitePolicy(channels=8, scheme="int8", weight_bits=8, activation_bits=8),
            "conv1": SitePolicy(channels=16, scheme="int8", weight_bits=8, activation_bits=8),
        }
    )
    x, y = split.validation.normalized(), split.validation.y
    done: list[int] = []
    plain = compressor.apply(policy)
    trained = compressor.apply(policy, Training(split.train, 2, 1, 0.02, 0, progress=done.append))
    assert done == [1, 2, 3]
    assert get_stage(trained.module) == "qdq"
    before, after = (Twin(c.integer_module).accuracy(x, y) for c in (plain, trained))
    assert after >= before
    assert after > 0.8


def test_what_cannot_be_searched_is_said(model, split, studied, tmp_path):
    result, _ = studied
    compressed = dataclasses.replace(model, module=result.best.module)
    if get_stage(result.best.module) != "float":
        with pytest.raises(ModelError, match="compressed already"):
            run_search(compressed, split, SETTINGS, tmp_path / "a")
    empty = dataclasses.replace(split, validation=split.validation.take(slice(0, 0)))
    with pytest.raises(DataError, match="validation"):
        run_search(model, empty, SETTINGS, tmp_path / "b")
    assert not list(Path(tmp_path).iterdir())


def test_choice_prefers_accuracy_within_the_budget(studied):
    result, _ = studied
    template = result.refined[0]

    def refined(accuracy: float, ratio: float, reward: float):
        outcome = dataclasses.replace(template.result, accuracy=accuracy, ratio=ratio)
        return dataclasses.replace(template, result=outcome, reward=reward)

    slow, good, fast = refined(0.95, 0.7, 0.9), refined(0.9, 0.4, 0.1), refined(0.85, 0.5, 0.8)
    assert best_refined([slow, fast, good], 0.5) is good
    assert best_refined([slow, refined(0.9, 0.8, 0.2)], 0.5) is slow


def test_search_without_anything_to_prune(split, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    lone = Model.from_torch(network, (torch.zeros(1, 1, 8, 8),), class_names=CLASSES)
    with pytest.raises(SettingError, match="nothing to decide"):
        run_search(lone, split, dataclasses.replace(SETTINGS, agent="pruning"), tmp_path)
