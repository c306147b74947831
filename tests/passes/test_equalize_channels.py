import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from tests.passes.numpy_interpreter import run
from tests.passes.quantized_networks import Net, residual, sequential
from tvm_compress.calibration import calibrate
from tvm_compress.errors import ModelError
from tvm_compress.passes.equalize_channels import EqualizeChannels, find_pairs
from tvm_compress.passes.params import get_params, set_params, with_stage
from tvm_compress.twin import Twin


def spread(values, by=3.0, seed=7):
    """Multiply rows (axis 0) by factors over several powers of ten."""
    factors = 10 ** np.random.default_rng(seed).uniform(-by / 2, by / 2, len(values))
    return (values * factors.reshape(-1, *[1] * (values.ndim - 1))).astype(np.float32)


def unequal(module):
    """Give the module with weights of very unequal channels; a batch norm's are in its gamma."""
    params = get_params(module)
    changed = {n: spread(v) for n, v in params.items() if n.endswith(".weight")}
    return set_params(module, changed)


def depthwise_chain(activation=relax.op.nn.relu, seed=0):
    def build(net, x):
        x = net.emit(activation(net.batch_norm(net.conv(x, "expand", 12, kernel=1, padding=0), "bn1")))
        x = net.emit(activation(net.batch_norm(net.conv(x, "depthwise", 12, groups=12), "bn2")))
        x = net.batch_norm(net.conv(x, "project", 6, kernel=1, padding=0), "bn3")
        return net.dense(net.emit(relax.op.mean(x, axis=[1, 2])), "fc", 5)

    return Net((1, 4, 6, 6), seed).module(build)


def check_same_function(before, after, shape):
    x = np.random.default_rng(0).normal(size=(3, *shape))
    wanted, found = run(before, x), run(after, x)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("make", "shape", "chains"),
    [
        (sequential, (3, 8, 8), [("conv1", "conv2"), ("conv2", "fc1"), ("fc1", "fc2")]),
        (residual, (3, 8, 8), [("a.conv1", "a.conv2"), ("b.conv1", "b.conv2")]),
        (depthwise_chain, (4, 6, 6), [("expand", "depthwise"), ("depthwise", "project"), ("project", "fc")]),
    ],
)
def test_the_function_stays_and_the_ranges_become_equal(make, shape, chains):
    before = unequal(make())
    after = EqualizeChannels()(before)
    check_same_function(before, after, shape)
    pairs, ranges = find_pairs(after, get_params(after))
    assert [(p.first.removesuffix(".weight"), p.second.removesuffix(".weight")) for p in pairs] == chains
    old = find_pairs(before, get_params(before))[1]
    for pair in pairs:
        mine = ranges[pair.first].max(axis=1)
        grouped = ranges[pair.second].reshape(pair.groups, -1, ranges[pair.second].shape[1])
        theirs = np.zeros(len(mine))
        np.maximum.at(theirs, pair.channels, grouped.max(axis=1).reshape(-1))
        np.testing.assert_allclose(mine, theirs, rtol=1e-3)
        assert mine.max() / mine.min() < old[pair.first].max(axis=1).max() / old[pair.first].max(axis=1).min()


def test_the_other_tensors_of_a_resnet_keep_their_ranges():
    """Only what stands inside of the pairs is scaled, channel by channel by what the batch norm says."""
    before = unequal(residual())
    after = EqualizeChannels()(before)
    x = np.random.default_rng(1).normal(size=(16, 3, 8, 8)).astype(np.float32)
    old, new = (Twin(module).site_inputs(x) for module in (before, after))
    params, changed = get_params(before), get_params(after)
    inside = {"a.conv2": "a.bn1", "b.conv2": "b.bn1"}
    for site, norm in inside.items():
        factor = changed[f"{norm}.weight"] / params[f"{norm}.weight"]
        assert not np.allclose(factor, 1, rtol=0.1)
        np.testing.assert_allclose(new[site], old[site] * factor, rtol=1e-4, atol=1e-5 * new[site].max())
    ranges = [calibrate(module, x, "minmax") for module in (before, after)]
    for site in set(old) - set(inside):
        np.testing.assert_allclose(ranges[1].range(site, 8), ranges[0].range(site, 8), rtol=1e-4)


def test_only_what_must_change_changes():
    before = unequal(depthwise_chain())
    params, after = get_params(before), get_params(EqualizeChannels()(before))
    assert list(params) == list(after)
    changed = {name for name in params if not np.array_equal(params[name], after[name])}
    norms = {f"bn{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")}
    assert changed == norms | {"depthwise.weight", "project.weight", "fc.weight"}


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 100), groups=st.sampled_from([1, 2, 4]), bias=st.booleans())
def test_grouped_layers_and_flattened_features(seed, groups, bias):
    def build(net, x):
        x = net.emit(relax.op.nn.relu(net.conv(x, "a", 8, bias=bias)))
        x = net.emit(relax.op.nn.max_pool2d(x, [2, 2], [2, 2], layout="NHWC"))
        x = net.emit(relax.op.nn.relu(net.conv(x, "b", 4, groups=groups, bias=bias)))
        return net.dense(net.emit(relax.op.nn.batch_flatten(x)), "c", 3, bias=bias)

    before = unequal(Net((1, 3, 6, 6), seed).module(build))
    after = EqualizeChannels()(before)
    assert len(find_pairs(after, get_params(after))[0]) == 2
    check_same_function(before, after, (3, 6, 6))


def test_dead_channels_stay_as_they_are():
    module = unequal(sequential())
    params = get_params(module)
    first, second = params["conv2.weight"].copy(), params["fc2.weight"].copy()
    first[2], second[:, 5] = 0, 0
    before = set_params(module, {"conv2.weight": first, "fc2.weight": second})
    after = EqualizeChannels()(before)
    check_same_function(before, after, (3, 8, 8))
    new = get_params(after)
    assert not new["conv2.weight"][2].any()
    assert all(np.isfinite(value).all() for value in new.values())
    assert new["conv2.bias"][2] == params["conv2.bias"][2]


def relu6(x):
    return relax.op.clip(x, 0, 6)


@pytest.mark.parametrize("activation", [relu6, relax.op.sigmoid])
def test_what_is_not_homogeneous_ends_a_chain(activation):
    before = depthwise_chain(activation)
    pairs, _ = find_pairs(before, get_params(before))
    assert [pair.first for pair in pairs] == ["project.weight"]
    check_same_function(before, EqualizeChannels()(before), (4, 6, 6))


def test_nothing_to_pair_gives_the_same_module():
    module = Net((1, 3, 4, 4)).module(lambda net, x: net.conv(x, "a", 4))
    after = EqualizeChannels()(module)
    assert all(np.array_equal(v, get_params(after)[k]) for k, v in get_params(module).items())


def test_twice_is_once():
    once = EqualizeChannels()(unequal(residual()))
    twice = get_params(EqualizeChannels()(once))
    for name, value in get_params(once).items():
        np.testing.assert_allclose(twice[name], value, rtol=1e-3)


def test_other_stages_are_refused():
    with pytest.raises(ModelError, match="EqualizeChannels"):
        EqualizeChannels()(with_stage(sequential(), "qdq"))
