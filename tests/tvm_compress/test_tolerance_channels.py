import numpy as np
import pytest
from tvm import relax

from tests.tvm_compress.twin_networks import Build, random_resnet8, resnet8_module
from tvm_compress.errors import DataError, SettingError
from tvm_compress.passes.groups import find_coupled_sets
from tvm_compress.passes.params import get_params
from tvm_compress.tolerance import channel_scores, logarithmic
from tvm_compress.tolerance.channels import gradient_norms


@pytest.fixture(scope="module")
def module():
    return resnet8_module(random_resnet8())


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    return rng.normal(size=(16, 1, 28, 28)).astype(np.float32), rng.integers(0, 10, 16)


@pytest.mark.parametrize("criterion", ["tolerance", "l1", "l2"])
def test_every_channel_of_every_set_has_a_score(module, data, criterion):
    scores = channel_scores(module, data[0], data[1], criterion)
    sets = {coupled.name: coupled.channels for coupled in find_coupled_sets(module)}
    assert {name: score.shape for name, score in scores.items()} == {k: (n,) for k, n in sets.items()}
    assert all(np.isfinite(score).all() and (score >= 0).all() for score in scores.values())
    again = channel_scores(module, data[0], data[1], criterion)
    assert all(np.array_equal(scores[name], again[name]) for name in scores)


def test_a_score_is_the_budget_from_which_tolerances_allow_the_channel_to_go(module, data):
    scores = channel_scores(module, *data)
    params, gradients = get_params(module), gradient_norms(module, data[0], data[1], 8)
    names = list(gradients)
    g = np.concatenate([gradients[name].ravel() for name in names])
    prunable_set = next(s for s in find_coupled_sets(module) if s.name == "layer2.0.conv1")
    channel = 5
    for factor, expected in ((1.001, True), (0.999, False)):
        tau = logarithmic(g, scores["layer2.0.conv1"][channel] * factor)
        split = np.split(tau, np.cumsum([gradients[name].size for name in names])[:-1])
        tolerances = {name: t.reshape(params[name].shape) for name, t in zip(names, split, strict=True)}
        within = [
            np.all(
                np.take(np.abs(params[c.parameter]), channel, c.axis)
                <= np.take(tolerances[c.parameter], channel, c.axis)
            )
            for c in prunable_set.cuts
            if c.parameter in tolerances
        ]
        assert all(within) is expected


def test_magnitudes(module, data):
    params = get_params(module)
    scores = channel_scores(module, data[0], data[1], "l1")
    expected = sum(
        np.abs(params[name]).reshape(32, -1).mean(1)
        for name in ("layer2.0.conv2.weight", "layer2.0.short.0.weight")
    )
    np.testing.assert_allclose(scores["layer2.0.conv2"], expected, rtol=1e-6)
    scores = channel_scores(module, data[0], data[1], "l2")
    np.testing.assert_allclose(
        scores["layer2.0.conv1"],
        np.square(params["layer2.0.conv1.weight"]).reshape(32, -1).mean(1),
        rtol=1e-6,
    )


def test_a_channel_that_nothing_reads_may_go_first():
    """Flatten gives each channel a block of the dense layer's inputs; the third's block is all zeros."""
    rng = np.random.default_rng(0)
    b = Build((1, 1, 6, 6))
    dense = rng.normal(size=(4, 5 * 4)).astype(np.float32)
    dense[:, 8:12] = 0

    def make():
        x = b.conv(b.nhwc(b.x), b.param("c.weight", rng.normal(size=(5, 1, 3, 3)).astype(np.float32)))
        x = b.emit(relax.op.nn.max_pool2d(b.emit(relax.op.nn.relu(x)), 2, 2, layout="NHWC"))
        x = b.emit(relax.op.nn.batch_flatten(b.emit(relax.op.permute_dims(x, [0, 3, 1, 2]))))
        return b.dense(x, b.param("d.weight", dense), b.param("d.bias", np.zeros(4, np.float32)))

    scores = channel_scores(
        b.finish(make), rng.normal(size=(8, 1, 6, 6)).astype(np.float32), rng.integers(0, 4, 8)
    )
    assert np.argmin(scores["c"]) == 2
    assert scores["c"][2] == 0.0


def test_bad_input(module, data):
    x, y = data
    with pytest.raises(SettingError, match="weight"):
        channel_scores(module, x, y, criterion="weight")
    with pytest.raises(DataError, match="no images"):
        channel_scores(module, x[:0], y[:0])
    with pytest.raises(DataError, match="NaN"):
        channel_scores(module, x * np.nan, y)
