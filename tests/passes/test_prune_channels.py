# ruff: noqa: N805 - functions in TVMScript's classes are not methods
# mypy: disable-error-code="valid-type, misc"
from dataclasses import replace

import numpy as np
import pytest
import torch
import tvm
from tvm.script import ir as I
from tvm.script import relax as R

from tests.passes.torch_networks import run
from tvm_compress.errors import ModelError, PolicyError
from tvm_compress.passes.canonicalize import Canonicalize
from tvm_compress.passes.groups import find_coupled_sets
from tvm_compress.passes.params import get_params, with_stage
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy, fingerprint
from tvm_compress.passes.prune_channels import PruneChannels, resolve_kept
from tvm_compress.passes.sites import find_sites

# What reads each coupled set's channels: (weight, positions per channel, first position).
READERS = {
    "sequential": {
        "features.0": [("features.3.weight", 1, 0)],
        "features.3": [("classifier.1.weight", 4, 0)],
        "classifier.1": [("classifier.3.weight", 1, 0)],
    },
    "residual": {
        "conv1": [(f"{name}.weight", 1, 0) for name in ("layer1.conv1", "layer2.conv1", "layer2.shortcut.0")],
        "layer1.conv1": [("layer1.conv2.weight", 1, 0)],
        "layer2.conv1": [("layer2.conv2.weight", 1, 0)],
        "layer2.conv2": [("fc.weight", 1, 0)],
    },
    "branches": {
        "stem": [("gate.weight", 1, 0), ("fc.weight", 1, 0), ("fc.weight", 1, 8)],
        "side": [("fc.weight", 1, 16)],
    },
}


def random_policy(module, seed):
    generator = np.random.default_rng(seed)
    sites = {}
    for coupled in find_coupled_sets(module):
        if coupled.prunable:
            count = int(generator.integers(1, coupled.channels))
            kept = np.sort(generator.choice(coupled.channels, count, replace=False))
            sites[coupled.producers[-1]] = SitePolicy(kept=tuple(kept.tolist()))
    return CompressionPolicy(sites=sites, model=fingerprint(find_sites(module)))


@pytest.mark.parametrize("name", list(READERS))
def test_equals_the_torch_network_with_masked_channels(name, request):
    made = request.getfixturevalue(name)
    policy = random_policy(made.module, seed=len(name))
    pruned = PruneChannels(policy)(made.module)
    state = {key: value.clone() for key, value in made.network.state_dict().items()}
    for coupled in find_coupled_sets(made.module):
        kept = policy[coupled.producers[-1]].kept
        if kept is None:
            continue
        gone = np.setdiff1d(np.arange(coupled.channels), kept)
        for weight, block, first in READERS[name][coupled.name]:
            for channel in gone:
                start = first + channel * block
                state[weight][:, start : start + block] = 0.0
    masked = torch.func.functional_call(made.network, state, torch.from_numpy(made.x)).detach().numpy()
    assert not np.allclose(masked, made.expected(), atol=1e-3)
    np.testing.assert_allclose(run(pruned, made.x), masked, rtol=1e-4, atol=1e-5)
    assert sum(v.size for v in get_params(pruned).values()) < sum(
        v.size for v in get_params(made.module).values()
    )
    tvm.ir.assert_structural_equal(Canonicalize()(pruned), pruned)


def test_depthwise_convolution_keeps_one_group_per_channel(branches):
    policy = CompressionPolicy({"gate": SitePolicy(kept=(1, 2, 7))})
    site = next(s for s in find_sites(PruneChannels(policy)(branches.module)) if s.name == "depthwise")
    assert (site.groups, site.in_channels, site.out_channels) == (3, 3, 3)


def test_code_of_a_pruned_module():
    @I.ir_module(s_tir=True)
    class Before:
        @R.function
        def main(
            x: R.Tensor((1, 3, 4, 4), "float32"),
            a: R.Tensor((4, 3, 1, 1), "float32"),
            ab: R.Tensor((4,), "float32"),
            b: R.Tensor((5, 64), "float32"),
        ):
            R.func_attr({"num_input": 1, "params": []})
            with R.dataflow():
                p = R.permute_dims(x, [0, 2, 3, 1])
                q = R.nn.conv2d(p, a, data_layout="NHWC")
                r = R.add(q, ab)
                s = R.permute_dims(r, [0, 3, 1, 2])
                t = R.nn.batch_flatten(s)
                u = R.permute_dims(b)
                v = R.matmul(t, u)
                R.output(v)
            return v

    @I.ir_module(s_tir=True)
    class Expected:
        @R.function
        def main(
            x: R.Tensor((1, 3, 4, 4), "float32"),
            a: R.Tensor((2, 3, 1, 1), "float32"),
            ab: R.Tensor((2,), "float32"),
            b: R.Tensor((5, 32), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                p = R.permute_dims(x, [0, 2, 3, 1])
                q = R.nn.conv2d(p, a, data_layout="NHWC")
                r = R.add(q, ab)
                s = R.permute_dims(r, [0, 3, 1, 2])
                t = R.nn.batch_flatten(s)
                u = R.permute_dims(b)
                v = R.matmul(t, u)
                R.output(v)
            return v

    values = [np.arange(12.0).reshape(4, 3, 1, 1), np.arange(4.0), np.arange(320.0).reshape(5, 64)]
    main = Before["main"].with_attr("params", [tvm.runtime.tensor(v.astype("float32")) for v in values])
    module = PruneChannels(CompressionPolicy({"a": SitePolicy(kept=(1, 3))}))(
        with_stage(tvm.IRModule({"main": main}), "float")
    )
    main = module["main"].without_attr("params").without_attr("tvm_compress.stage")
    tvm.ir.assert_structural_equal(main, Expected["main"], map_free_vars=True)
    params = get_params(module)
    np.testing.assert_array_equal(params["a"], values[0][[1, 3]])
    np.testing.assert_array_equal(params["ab"], [1, 3])
    np.testing.assert_array_equal(
        params["b"], np.concatenate([values[2][:, 16:32], values[2][:, 48:]], axis=1)
    )


def test_nothing_to_prune_changes_nothing(residual):
    policy = CompressionPolicy({"conv1": SitePolicy(channels=8), "fc": SitePolicy(channels=10)})
    assert PruneChannels(policy)(residual.module).same_as(residual.module)
    assert resolve_kept(residual.module, policy)["conv1"] == SitePolicy()


def test_scores_choose_and_ties_go_to_the_lower_index(residual):
    scores = {"layer1.conv1": np.array([1, 5, 3, 3, 0, 3, 5, 2])}
    policy = CompressionPolicy({"layer1.conv1": SitePolicy(channels=3)})
    assert resolve_kept(residual.module, policy, scores)["layer1.conv1"].kept == (1, 2, 6)
    rounded = replace(policy, rounding=4)
    assert resolve_kept(residual.module, rounded, scores)["layer1.conv1"].kept == (1, 2, 3, 6)


@pytest.mark.parametrize(("criterion", "power"), [("l1", 1), ("l2", 2)])
def test_norms_are_summed_over_the_producers(residual, criterion, power):
    params = get_params(residual.module)
    norms = sum(
        (np.abs(params[name].astype("float64")) ** power).reshape(8, -1).sum(1)
        for name in ("conv1.weight", "layer1.conv2.weight")
    )
    policy = CompressionPolicy({"layer1.conv2": SitePolicy(channels=5)}, criterion=criterion)
    resolved = resolve_kept(residual.module, policy)
    assert resolved["conv1"].kept == tuple(sorted(np.argsort(-norms)[:5].tolist()))
    assert resolved["layer1.conv2"].kept == resolved["conv1"].kept


def test_resolved_policy_gives_the_same_module_without_scores(residual):
    scores = {s.name: np.random.default_rng(1).random(s.channels) for s in find_coupled_sets(residual.module)}
    int8 = SitePolicy(channels=6, scheme="int8", weight_bits=8, activation_bits=8)
    policy = CompressionPolicy({"conv1": int8, "layer2.conv1": SitePolicy(channels=5)})
    resolved = resolve_kept(residual.module, policy, scores)
    assert (resolved["conv1"].scheme, resolved["layer1.conv2"].scheme) == ("int8", "fp32")
    by_scores, by_kept = (
        PruneChannels(policy, scores)(residual.module),
        PruneChannels(resolved)(residual.module),
    )
    tvm.ir.assert_structural_equal(by_scores, by_kept)
    assert tvm.ir.save_json(by_scores) == tvm.ir.save_json(by_kept)
    assert resolve_kept(residual.module, resolved) == resolved


@pytest.mark.parametrize(
    ("sites", "said"),
    [
        ({"fc": SitePolicy(channels=5)}, "Site 'fc' cannot lose channels .*outputs"),
        ({"conv1": SitePolicy(channels=5)}, "Site 'conv1' says how many .*needs scores"),
        (
            {"conv1": SitePolicy(channels=5), "layer1.conv2": SitePolicy(channels=4)},
            "'conv1' and 'layer1.conv2' share their channels but want different ones: 5 and 4",
        ),
        (
            {"conv1": SitePolicy(kept=(1, 2)), "layer1.conv2": SitePolicy(kept=(1, 3))},
            "'conv1' and 'layer1.conv2' share",
        ),
        ({"conv1": SitePolicy(channels=9)}, "Site 'conv1' has 8 output channels"),
        ({"conv9": SitePolicy(channels=1)}, "names site 'conv9'"),
    ],
)
def test_policies_that_do_not_fit(residual, sites, said):
    with pytest.raises(PolicyError, match=said):
        PruneChannels(CompressionPolicy(sites))(residual.module)


@pytest.mark.parametrize("scores", [np.ones(7), np.full(8, np.nan)])
def test_scores_must_fit(residual, scores):
    policy = CompressionPolicy({"conv1": SitePolicy(channels=5)})
    with pytest.raises(PolicyError, match="Site 'conv1' needs 8 finite scores"):
        PruneChannels(policy, {"conv1": scores})(residual.module)


def test_policy_for_the_unpruned_model_does_not_fit_the_pruned_one(residual):
    policy = random_policy(residual.module, seed=1)
    pruned = PruneChannels(policy)(residual.module)
    with pytest.raises(PolicyError, match="another model"):
        PruneChannels(policy)(pruned)


def test_other_stages_are_refused(residual):
    with pytest.raises(ModelError, match="PruneChannels takes a module of stage 'float', not 'qdq'"):
        PruneChannels(CompressionPolicy())(with_stage(residual.module, "qdq"))
