# ruff: noqa: N805 - functions in TVMScript's classes are not methods
# mypy: disable-error-code="valid-type, misc"
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.script import ir as I
from tvm.script import relax as R

from tvm_compress.passes.groups import Cut, find_coupled_sets, round_channels
from tvm_compress.passes.params import get_params
from tvm_compress.passes.sites import find_sites


def by_name(module):
    return {coupled.name: coupled for coupled in find_coupled_sets(module)}


def test_sequential_network(sequential):
    sets = by_name(sequential.module)
    assert list(sets) == ["features.0", "features.3", "classifier.1", "classifier.3"]
    assert sets["features.0"].cuts == (
        Cut("features.0.weight", 0),
        Cut("features.0.bias", 0),
        Cut("features.3.weight", 1),
    )
    norm = {f"features.4.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert {cut.parameter for cut in sets["features.3"].cuts} >= norm
    # 2 x 2 positions of each channel, one after the other: flatten is in NCHW order.
    assert Cut("classifier.1.weight", 1, repeat=4) in sets["features.3"].cuts
    assert [coupled.prunable for coupled in sets.values()] == [True, True, True, False]
    assert "outputs" in sets["classifier.3"].reason


def test_residual_network(residual):
    sets = by_name(residual.module)
    producers = {name: coupled.producers for name, coupled in sets.items()}
    assert producers == {
        "conv1": ("conv1", "layer1.conv2"),
        "layer1.conv1": ("layer1.conv1",),
        "layer2.conv1": ("layer2.conv1",),
        "layer2.conv2": ("layer2.conv2", "layer2.shortcut.0"),
        "fc": ("fc",),
    }
    consumers = {cut.parameter for cut in sets["conv1"].cuts if cut.axis == 1}
    assert consumers == {"layer1.conv1.weight", "layer2.conv1.weight", "layer2.shortcut.0.weight"}
    assert Cut("fc.weight", 1) in sets["layer2.conv2"].cuts


def test_depthwise_gate_and_concatenation(branches):
    sets = by_name(branches.module)
    assert sets["stem"].producers == ("stem", "depthwise", "gate")
    assert {Cut("gate.weight", 0), Cut("gate.weight", 1), Cut("depthwise.weight", 0)} <= set(
        sets["stem"].cuts
    )
    assert {Cut("fc.weight", 1), Cut("fc.weight", 1, offset=8)} <= set(sets["stem"].cuts)
    assert Cut("depthwise.weight", 1) not in sets["stem"].cuts
    assert Cut("fc.weight", 1, offset=16) in sets["side"].cuts
    assert not sets["fc"].prunable


@pytest.mark.parametrize("name", ["sequential", "residual", "branches"])
def test_every_site_has_one_set_and_every_cut_fits(name, request):
    module = request.getfixturevalue(name).module
    sets, params = find_coupled_sets(module), get_params(module)
    producers = [producer for coupled in sets for producer in coupled.producers]
    assert sorted(producers) == sorted(site.name for site in find_sites(module))
    covered = dict.fromkeys(params, 0)
    for coupled in sets:
        assert coupled.prunable == (not coupled.reason)
        for cut in coupled.cuts:
            extent = params[cut.parameter].shape[cut.axis]
            assert cut.offset + coupled.channels * cut.repeat <= extent
            covered[cut.parameter] += 1
    assert all(covered.values())


@I.ir_module(s_tir=True)
class Grouped:
    @R.function
    def main(
        x: R.Tensor((1, 8, 8, 4), "float32"),
        a: R.Tensor((8, 4, 3, 3), "float32"),
        b: R.Tensor((8, 4, 3, 3), "float32"),
        c: R.Tensor((6, 8, 1, 1), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            p = R.nn.conv2d(x, a, data_layout="NHWC")
            q = R.nn.conv2d(p, b, groups=2, data_layout="NHWC")
            r = R.nn.conv2d(q, c, data_layout="NHWC")
            s = R.mean(r, axis=[1, 2])
            R.output(s)
        return s


@I.ir_module(s_tir=True)
class Unfollowed:
    @R.function
    def main(
        x: R.Tensor((1, 4, 4, 4), "float32"),
        a: R.Tensor((4, 4, 1, 1), "float32"),
        b: R.Tensor((4, 4, 1, 1), "float32"),
        c: R.Tensor((4, 4, 1, 1), "float32"),
        d: R.Tensor((4, 64), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            n = R.permute_dims(x, [0, 2, 3, 1])
            p = R.nn.conv2d(n, a, data_layout="NHWC")
            q = R.add(p, n)
            r = R.nn.conv2d(q, b, data_layout="NHWC")
            s = R.nn.softmax(r, axis=3)
            t = R.nn.conv2d(s, c, data_layout="NHWC")
            # Not in NCHW order: each channel's positions lie scattered.
            u = R.nn.batch_flatten(t)
            v = R.matmul(u, R.permute_dims(d))
            R.output(v)
        return v


def test_what_cannot_be_followed_is_frozen_with_the_reason():
    grouped = by_name(Grouped)
    assert {name: coupled.prunable for name, coupled in grouped.items()} == dict.fromkeys("abc", False)
    assert grouped["a"].reason == "b is a grouped convolution"
    sets = by_name(Unfollowed)
    assert sets["a"].reason == "these are the network's inputs"
    assert "softmax cannot be followed" in sets["b"].reason
    assert "batch_flatten" in sets["c"].reason


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 2000), st.integers(1, 1024), st.integers(1, 64))
def test_rounding(wanted, total, multiple):
    rounded = round_channels(wanted, total, multiple)
    assert 1 <= rounded <= total
    assert rounded == total or (rounded % multiple == 0 and wanted <= rounded < max(wanted, 1) + multiple)


@pytest.mark.parametrize("values", [(1, 0, 1), (1, 1, 0), (math.nan, 4, 1), (math.inf, 4, 1)])
def test_rounding_refuses_nonsense(values):
    with pytest.raises(ValueError, match="cannot round"):
        round_channels(*values)
