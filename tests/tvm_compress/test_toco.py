"""TOCO on a small trained network: Algorithm 1, resuming, the policies, bad input, the baselines."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from tests.tvm_compress.twin_networks import Build
from tvm_compress.data.dataset import Dataset, Split
from tvm_compress.errors import DataError, ModelError, SettingError, StudyError
from tvm_compress.passes.params import get_params, set_params, with_stage
from tvm_compress.passes.pipeline import build
from tvm_compress.passes.sites import find_sites
from tvm_compress.tolerance.algorithm1 import Iteration, shrink_to_filters
from tvm_compress.tolerance.baselines import BaselineSettings, baseline
from tvm_compress.tolerance.compress import toco
from tvm_compress.tolerance.settings import TocoSettings
from tvm_compress.twin import Twin

QUICK = TocoSettings(loss_bound=1.5, sigma=1.1, iterations=25, images=0, batches=2)


def small_network(rng: np.random.Generator) -> tvm.IRModule:
    """Convolution with batch norm, convolution, mean, dense: images [1, 2, 4, 4] to 3 classes."""
    b = Build((1, 2, 4, 4))

    def normal(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)

    def make():
        norm = torch.nn.BatchNorm2d(16)
        x = b.conv(b.nhwc(b.x), b.param("a.weight", normal(16, 2, 3, 3)), padding=1)
        x = b.emit(relax.op.nn.relu(b.batch_norm(x, "bn", norm)))
        x = b.conv(x, b.param("b.weight", normal(12, 16, 3, 3)), padding=1)
        x = b.emit(relax.op.nn.relu(b.emit(relax.op.add(x, b.param("b.bias", np.zeros(12, np.float32))))))
        x = b.emit(relax.op.mean(x, [1, 2]))
        return b.dense(x, b.param("c.weight", normal(3, 12)), b.param("c.bias", np.zeros(3, np.float32)))

    return b.finish(make)


@pytest.fixture(scope="module")
def split() -> Split:
    rng = np.random.default_rng(0)
    y = np.arange(300) % 3
    x = rng.normal(size=(300, 2, 4, 4)).astype(np.float32)
    for label in range(3):
        x[y == label, label % 2, label : label + 2] += 1.5
    parts = [Dataset(x[i::3][:], y[i::3].astype(np.int64), ("p", "q", "r")) for i in range(3)]
    # Every third image is of one class: mix them.
    order = rng.permutation(300)
    parts = [Dataset(x[order[i::3]], y[order[i::3]].astype(np.int64), ("p", "q", "r")) for i in range(3)]
    train, validation, test = parts
    return Split(train, validation, test)


@pytest.fixture(scope="module")
def module(split: Split) -> tvm.IRModule:
    twin = Twin(small_network(np.random.default_rng(1)))
    parameters = list(twin.trainable().values())
    x, y = torch.from_numpy(split.train.normalized()), torch.from_numpy(split.train.y)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(twin(x), y)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= 0.1 * gradient
    assert 0.01 < float(loss.detach()) < 0.6
    return twin.to_module()


def loss_of(module: tvm.IRModule, data: Dataset) -> float:
    return Twin(module).loss(data.normalized(), data.y)


@pytest.mark.parametrize("group", ["element", "simd-4", "filter", "channel", "block-2x3"])
def test_pruning_stays_within_the_loss_bound(module, split, group):
    result = toco(module, split, replace(QUICK, group=group, rounding=1 if group == "channel" else None))
    before, after = loss_of(module, split.train), loss_of(result.module, split.train)
    assert after <= 1.5 * before * (1 + 1e-5)
    assert result.summary["loss_after"] == pytest.approx(after, rel=1e-4)
    assert result.summary["sparsity"] > 0.05
    params, dense = get_params(result.module), get_params(module)
    for site in find_sites(module):
        wanted = result.policy[site.name]
        if group == "channel":
            assert len(params[site.weight]) == (wanted.channels or site.out_channels)
            continue
        zero = params[site.weight] == 0
        assert wanted.weight_pruning_ratio == pytest.approx(zero.mean())
        np.testing.assert_array_equal(params[site.weight][~zero], dense[site.weight][~zero])
    compiled = build(result.module, "host")
    vm = relax.VirtualMachine(compiled.executable, tvm.cpu())
    image = split.test.normalized(slice(0, 1))
    logits = vm["main"](tvm.runtime.tensor(image)).numpy()
    np.testing.assert_allclose(logits, Twin(result.module).predict(image), rtol=1e-3, atol=1e-4)


def test_kept_channels_are_rounded_up(module, split):
    exact = toco(module, split, replace(QUICK, group="channel", rounding=1))
    rounded = toco(module, split, replace(QUICK, group="channel", rounding=5))
    assert exact.summary["sparsity"] > rounded.summary["sparsity"] > 0
    for site in find_sites(module)[:-1]:
        everything = tuple(range(site.out_channels))
        few, more = (result.policy[site.name].kept or everything for result in (exact, rounded))
        assert len(more) == min(site.out_channels, -(-len(few) // 5) * 5)
        assert set(few) <= set(more)
    # The loss that is told is the rounded network's.
    assert rounded.summary["loss_after"] == pytest.approx(loss_of(rounded.module, split.train), rel=1e-4)
    assert (exact.policy.rounding, rounded.policy.rounding) == (1, 5)
    assert replace(QUICK, group="channel").rounding == 8


def test_worth_of_operations_takes_what_is_multiplied_often(module, split):
    def left(worth):
        result = toco(module, split, replace(QUICK, worth=worth))
        params = get_params(result.module)
        shares = {
            s.name: np.count_nonzero(params[s.weight]) / params[s.weight].size for s in find_sites(module)
        }
        return shares

    alike, counted = left("weights"), left("operations")
    first, last = find_sites(module)[0].name, find_sites(module)[-1].name
    assert counted[first] / counted[last] < alike[first] / alike[last]


def test_whole_groups_go(module, split):
    weights = get_params(toco(module, split, replace(QUICK, group="simd-4")).module)["b.weight"]
    zeros = (weights == 0).reshape(3, 4, -1).sum(axis=1)
    assert set(np.unique(zeros)) == {0, 4}
    rows = (get_params(toco(module, split, replace(QUICK, group="filter")).module)["b.weight"] == 0).reshape(
        12, -1
    )
    assert all(row.all() or not row.any() for row in rows)


@pytest.mark.parametrize("sampling", ["active", "random", "all"])
def test_same_seed_same_result(module, split, sampling):
    settings = replace(QUICK, sampling=sampling, iterations=8)
    first, second = (toco(module, split, settings) for _ in range(2))
    assert first.policy.to_json() == second.policy.to_json()
    for name, value in get_params(first.module).items():
        np.testing.assert_array_equal(value, get_params(second.module)[name])


@pytest.mark.parametrize("objective", ["prune", "quantize"])
def test_a_run_that_is_killed_goes_on_to_the_same_result(module, split, tmp_path: Path, objective):
    settings = replace(QUICK, objective=objective, group="")
    whole = toco(module, split, settings, tmp_path / "whole")

    class KilledError(Exception):
        pass

    def kill(iteration):
        if iteration.number == 6:
            raise KilledError

    with pytest.raises(KilledError):
        toco(module, split, settings, tmp_path / "cut", progress=kill)
    # A line whose state was never written, and half a line.
    with (tmp_path / "cut" / "trials.jsonl").open("a") as file:
        file.write('{"number": 7}\n{"num')
    resumed = toco(module, split, settings, tmp_path / "cut")
    texts = [(tmp_path / name / "trials.jsonl").read_text() for name in ("whole", "cut")]
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == whole.summary["iterations"]
    assert resumed.policy.to_json() == whole.policy.to_json()
    for name, value in get_params(whole.module).items():
        np.testing.assert_array_equal(value, get_params(resumed.module)[name])
    assert resumed.summary | {"seconds": 0} == whole.summary | {"seconds": 0}


def test_a_directory_of_another_run_is_refused(module, split, tmp_path: Path):
    toco(module, split, replace(QUICK, iterations=2), tmp_path)
    with pytest.raises(StudyError, match="seed"):
        toco(module, split, replace(QUICK, iterations=2, seed=1), tmp_path)
    (tmp_path / "state.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(StudyError, match="damaged"):
        toco(module, split, replace(QUICK, iterations=2), tmp_path)


@pytest.mark.parametrize("group", ["layer", "element"])
def test_quantization(module, split, group):
    settings = replace(QUICK, objective="quantize", group=group, loss_bound=2.0, sigma=1.2, iterations=40)
    result = toco(module, split, settings)
    assert loss_of(result.module, split.train) <= 2.0 * loss_of(module, split.train)
    assert 1 <= result.summary["bits_per_weight"] < 10
    assert result.summary["bits_from"] == "minimum"
    params = get_params(result.module)
    coded = [site for site in find_sites(module) if result.policy[site.name].codebook_bits]
    assert coded
    for site in coded:
        bits = result.policy[site.name].codebook_bits
        assert 2 ** (bits - 1) < len(np.unique(params[site.weight])) <= 2**bits
    build(result.module, "host")


def test_finetuning_keeps_what_compression_fixed(module, split):
    settings = replace(QUICK, iterations=10, finetune_epochs=1)
    pruned = toco(module, split, replace(settings, finetune_epochs=0))
    trained = toco(module, split, settings)
    for site in find_sites(module):
        before, after = (get_params(one.module)[site.weight] for one in (pruned, trained))
        np.testing.assert_array_equal(before == 0, after == 0)
        assert not np.array_equal(before, after)
    quantize = replace(settings, objective="quantize", group="layer", iterations=30, loss_bound=3, sigma=1.3)
    result = toco(module, split, quantize)
    for site in find_sites(module):
        bits = result.policy[site.name].codebook_bits
        assert not bits or len(np.unique(get_params(result.module)[site.weight])) <= 2**bits


def test_labels_of_the_models_own(module, split):
    unlabelled = replace(split, train=replace(split.train, y=np.zeros_like(split.train.y)))
    result = toco(module, unlabelled, replace(QUICK, labels="model", iterations=5))
    assert result.summary["loss_labels"] == "model"
    given = replace(split, train=replace(split.train, y=Twin(module).predict(split.train.x).argmax(1)))
    assert result.policy == toco(module, given, replace(QUICK, iterations=5)).policy


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"loss_bound": 0.9}, "loss_bound is 0.9, but must be above 1"),
        ({"loss_bound": float("nan")}, "loss_bound"),
        ({"sigma": 1.0}, "sigma"),
        ({"group": "simd-0"}, "simd-0"),
        ({"group": "layer"}, "layer"),
        ({"objective": "quantize", "group": "channel"}, "channel"),
        ({"group": "filter", "rounding": 8}, "rounding is 8 with group 'filter'"),
        ({"group": "channel", "rounding": 0}, "rounding is 0"),
        ({"worth": "time"}, "worth is 'time'"),
        ({"objective": "quantize", "worth": "operations"}, "goes with objective prune"),
        ({"objective": "shrink"}, "shrink"),
        ({"sampling": "some"}, "some"),
        ({"percentile": 5.0}, "percentile"),
        ({"share": 0.0}, "share"),
        ({"memory": 1.0}, "memory"),
        ({"iterations": 0}, "iterations"),
        ({"step": 0.0}, "step"),
        ({"sensitivity": "layer"}, "sensitivity"),
    ],
)
def test_impossible_settings(values, said):
    with pytest.raises(SettingError, match=said):
        TocoSettings(**values)


def test_models_that_tell_nothing(module, split):
    params = get_params(module)
    dead = set_params(module, {"c.weight": np.zeros_like(params["c.weight"])})
    silent = set_params(dead, {"b.bias": np.full(12, -1e6, np.float32)})
    with pytest.raises(DataError, match="gradients of all weights are zero"):
        toco(silent, split, QUICK)
    sure = set_params(dead, {"c.bias": np.array([1e4, 0, 0], np.float32), "b.weight": 0 * params["b.weight"]})
    only = replace(split, train=replace(split.train, y=np.zeros_like(split.train.y)))
    with pytest.raises(DataError, match=r"loss on 100 images is 0\.0"):
        toco(sure, only, QUICK)
    with pytest.raises(ModelError, match="stage 'qdq'"):
        toco(with_stage(module, "qdq"), split, QUICK)


@pytest.mark.parametrize("method", ["magnitude", "obd", "random"])
def test_pruning_baselines(module, split, method):
    result = baseline(module, split, BaselineSettings(method=method, sparsity=0.6))
    assert result.summary["sparsity"] == pytest.approx(0.6, abs=0.01)
    params, dense = get_params(result.module), get_params(module)
    weights = [(dense[s.weight], params[s.weight]) for s in find_sites(module)]
    gone = np.concatenate([old[new == 0] for old, new in weights])
    kept = np.concatenate([old[new != 0] for old, new in weights])
    if method == "magnitude":
        assert np.abs(gone).max() <= np.abs(kept).min()
    grouped = baseline(module, split, BaselineSettings(method=method, sparsity=0.6, group="filter"))
    rows = (get_params(grouped.module)["b.weight"] == 0).reshape(12, -1)
    assert all(row.all() or not row.any() for row in rows)
    ratios = [grouped.policy[s.name].weight_pruning_ratio for s in find_sites(module)]
    assert max(ratios) > 0
    assert max(ratios) < 1


def test_optimal_brain_damage_loses_less_than_random(module, split):
    losses = {
        method: loss_of(
            baseline(module, split, BaselineSettings(method=method, sparsity=0.5)).module, split.train
        )
        for method in ("obd", "random")
    }
    assert losses["obd"] < losses["random"]


def test_uniform_bits(module, split):
    result = baseline(module, split, BaselineSettings(method="uniform-bits", bits=3))
    for site in find_sites(module):
        assert len(np.unique(get_params(result.module)[site.weight])) <= 8
        assert result.policy[site.name].codebook_bits == 3
    with pytest.raises(SettingError):
        BaselineSettings(method="guess")


def test_iterations_are_written_as_they_come(module, split, tmp_path: Path):
    seen: list[Iteration] = []
    toco(module, split, replace(QUICK, iterations=4), tmp_path, progress=seen.append)
    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert lines == [iteration.to_dict() for iteration in seen]
    # The first bound is the dense loss: nothing can be spent.
    assert lines[0]["loss"] == pytest.approx(lines[0]["loss_bound"])
    assert lines[1]["loss_bound"] == pytest.approx(1.1 * lines[0]["loss_bound"])


def test_a_step_bounds_what_one_iteration_prunes(module, split):
    settings = replace(QUICK, loss_bound=3.0, sigma=1.2, iterations=40)
    for step, group in ((0.05, "element"), (0.2, "element")):
        seen: list[Iteration] = []
        toco(module, split, replace(settings, step=step, group=group), progress=seen.append)
        sizes = np.array([1.0, *(iteration.size for iteration in seen)])
        bounded = np.array([iteration.gain > 1 for iteration in seen])
        assert bounded.any()
        assert (sizes[1:] / sizes[:-1])[bounded].min() >= 1 - step
    # A filter of 12 is more than the step, and goes all the same.
    assert toco(module, split, replace(settings, step=0.01, group="filter")).summary["sparsity"] > 0


def test_a_filters_sensitivity_is_between_its_own_and_the_networks():
    gradients = {"a": np.array([[1.0, 3.0], [8.0, 8.0]]), "b": np.full((1, 4), 1.0)}
    shrunk = shrink_to_filters(gradients)
    everything = (1 + 3 + 8 + 8 + 4) / 8
    np.testing.assert_allclose(shrunk["a"], np.sqrt(everything * np.array([[2.0, 2.0], [8.0, 8.0]])))
    np.testing.assert_allclose(shrunk["b"], np.full((1, 4), np.sqrt(everything)))
    assert TocoSettings().sensitivity == "filter"
    assert TocoSettings(objective="quantize").sensitivity == "weight"
