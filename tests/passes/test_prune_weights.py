# ruff: noqa: N805 - functions in TVMScript's classes are not methods
# mypy: disable-error-code="valid-type, misc"
import numpy as np
import pytest
import torch
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm.script import ir as I
from tvm.script import relax as R

from tests.passes.torch_networks import run
from tvm_compress.errors import ModelError, PolicyError
from tvm_compress.passes.params import get_params, with_stage
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.prune_weights import PruneWeights, find_masks
from tvm_compress.passes.sites import find_sites
from tvm_compress.passes.weight_groups import reduce_tiles, spread_tiles, tile_of, tile_sizes


def test_code_of_a_pruned_module():
    @I.ir_module(s_tir=True)
    class Before:
        @R.function
        def main(x: R.Tensor((1, 3), "float32"), w: R.Tensor((2, 3), "float32")):
            R.func_attr({"num_input": 1, "params": [], "tvm_compress.stage": "float"})
            with R.dataflow():
                t = R.permute_dims(w)
                y = R.matmul(x, t)
                R.output(y)
            return y

    value = np.arange(1.0, 7.0, dtype="float32").reshape(2, 3)
    main = Before["main"].with_attr("params", [tvm.runtime.tensor(value)])
    before = tvm.IRModule({"main": main})
    mask = np.array([[True, False, True], [False, True, True]])
    after = PruneWeights({"w": mask})(before)
    expected = Before["main"].with_attr("params", [tvm.runtime.tensor(np.where(mask, value, 0))])
    strip = [one.without_attr("params") for one in (after["main"], expected)]
    tvm.ir.assert_structural_equal(*strip, map_free_vars=True)
    np.testing.assert_array_equal(get_params(after)["w"], [[1, 0, 3], [0, 5, 6]])
    np.testing.assert_array_equal(get_params(before)["w"], value)
    # Nothing to do: nothing changes.
    tvm.ir.assert_structural_equal(PruneWeights({})(before), before)


@pytest.mark.parametrize("group", ["element", "simd-4", "filter", "block-2x3"])
def test_equals_the_torch_network_with_zeros(sequential, group):
    policy = CompressionPolicy(
        {s.name: SitePolicy(weight_pruning_ratio=0.4, group=group) for s in find_sites(sequential.module)}
    )
    masks = find_masks(sequential.module, policy)
    pruned = PruneWeights(masks)(sequential.module)
    state = {name: value.clone() for name, value in sequential.network.state_dict().items()}
    for name, mask in masks.items():
        assert 0.2 < 1 - mask.mean() <= 0.4 + 1e-9
        state[name] *= torch.from_numpy(mask)
    expected = torch.func.functional_call(sequential.network, state, torch.from_numpy(sequential.x)).detach()
    np.testing.assert_allclose(run(pruned, sequential.x), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(expected, sequential.expected(), atol=1e-3)
    assert find_sites(pruned) == find_sites(sequential.module)


def test_the_lowest_scores_go_and_ties_go_to_the_first(residual):
    scores = {"fc.weight": np.ones((10, 16), np.float32)}
    scores["fc.weight"][3] = 0.5
    policy = CompressionPolicy({"fc": SitePolicy(weight_pruning_ratio=0.25, group="filter")})
    mask = find_masks(residual.module, policy, scores)["fc.weight"]
    np.testing.assert_array_equal(np.flatnonzero(~mask.any(axis=1)), [0, 3])
    assert set(find_masks(residual.module, policy)) == {"fc.weight"}


@settings(max_examples=50, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
        st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    ),
    group=st.sampled_from(["element", "simd-2", "simd-4", "filter", "block-2x3", "block-4x1", "block-3x16"]),
    seed=st.integers(0, 99),
)
def test_groups_tile_the_weight(shape, group, seed):
    values = np.random.default_rng(seed).normal(size=shape)
    largest = reduce_tiles(values, group)
    numbers = spread_tiles(np.arange(largest.size).reshape(largest.shape), group, shape)
    for number, value in enumerate(largest.ravel()):
        assert values[numbers == number].max() == value
    np.testing.assert_array_equal(tile_sizes(group, shape).ravel(), np.bincount(numbers.ravel()))
    rows, columns = tile_of(group, shape)
    matrix = numbers.reshape(shape[0], -1)
    assert (matrix[:rows, :columns] == 0).all()


def test_simd_groups_stand_along_the_output_channels():
    numbers = spread_tiles(np.arange(6).reshape(2, 3), "simd-2", (4, 3))
    np.testing.assert_array_equal(numbers, [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]])


def test_ratio_counted_on_a_mask_gives_it_again(residual):
    rng = np.random.default_rng(0)
    scores = {"layer2.conv1.weight": rng.random((16, 8, 3, 3))}
    for ratio in rng.random(20):
        policy = CompressionPolicy({"layer2.conv1": SitePolicy(weight_pruning_ratio=float(ratio))})
        mask = find_masks(residual.module, policy, scores)["layer2.conv1.weight"]
        counted = float(1 - np.count_nonzero(mask) / mask.size)
        policy = CompressionPolicy({"layer2.conv1": SitePolicy(weight_pruning_ratio=counted)})
        again = find_masks(residual.module, policy, scores)["layer2.conv1.weight"]
        np.testing.assert_array_equal(again, mask)


def test_bad_input(residual):
    with pytest.raises(PolicyError, match=r"'conv9\.weight'"):
        PruneWeights({"conv9.weight": np.ones(3, bool)})(residual.module)
    with pytest.raises(PolicyError, match=r"'fc\.weight' must be bool"):
        PruneWeights({"fc.weight": np.ones((10, 3), bool)})(residual.module)
    with pytest.raises(ModelError, match="PruneWeights takes"):
        PruneWeights({})(with_stage(residual.module, "qdq"))
    policy = CompressionPolicy({"fc": SitePolicy(weight_pruning_ratio=0.5)})
    with pytest.raises(PolicyError, match="Site 'fc' needs finite scores"):
        find_masks(residual.module, policy, {"fc.weight": np.ones(3)})
    with pytest.raises(PolicyError, match="channel"):
        tile_of("channel", (3, 3))
