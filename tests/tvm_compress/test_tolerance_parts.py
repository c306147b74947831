"""The parts that TOCO is made of: committee, bits, importance, groupings."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tvm_compress.twin_networks import random_resnet8, resnet8_module
from tvm_compress.errors import SettingError
from tvm_compress.passes.params import get_params
from tvm_compress.passes.sites import find_sites
from tvm_compress.tolerance.bits import MAX_BITS, bits_from_tolerances, quantize_uniform
from tvm_compress.tolerance.committee import Committee, distances_to_centres, divergence
from tvm_compress.tolerance.grouping import Grouping, needed_moves
from tvm_compress.tolerance.importance import Importance
from tvm_compress.twin import Twin


@pytest.fixture(scope="module")
def module():
    return resnet8_module(random_resnet8())


def softmax(logits):
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def test_divergence_is_kullback_leiblers():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 20, 5)) * 3
    p, q = softmax(a), softmax(b)
    np.testing.assert_allclose(divergence(a, b), (p * np.log(p / q)).sum(axis=1), rtol=1e-10)
    np.testing.assert_array_equal(divergence(a, a), 0)


def test_distances_are_to_the_standardised_centres():
    x = np.array([[0.0, 7.0], [2.0, 7.0], [10.0, 7.0], [12.0, 7.0]])
    deviation = np.std(x[:, 0])
    np.testing.assert_allclose(distances_to_centres(x, np.array([0, 0, 1, 1])), 1 / deviation, rtol=1e-6)


def test_the_committee_draws_typical_samples_on_which_it_disagrees():
    rng = np.random.default_rng(0)
    dense = np.tile([[2.0, 0.0]], (100, 1))
    compressed = dense.copy()
    # Ten samples disagree; five of them are outliers.
    compressed[:10] = [0.0, 2.0]
    embeddings = rng.normal(size=(100, 3)) * 0.1
    embeddings[:5] += 50.0
    committee = Committee(dense, embeddings, np.zeros(100, int))
    assert set(committee.query(compressed, 0.05, rng, 5)) == {5, 6, 7, 8, 9}
    assert set(committee.query(compressed, 0.01, rng, 10)) == set(range(10))
    # Where nobody disagrees, all are drawn from.
    drawn = [set(committee.query(dense, 0.01, np.random.default_rng(s), 5)) for s in range(20)]
    assert max(max(one) for one in drawn) > 50
    with pytest.raises(SettingError, match="share"):
        committee.query(compressed, 0.0, rng, 5)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 9999),
    group=st.sampled_from(["layer", "filter", "element", "simd-2", "block-2x3"]),
    scale=st.floats(1e-3, 1.0),
)
def test_no_weight_moves_further_than_it_tolerates(seed, group, scale):
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(5, 7))
    tolerances = scale * rng.uniform(0.01, 1.0, size=weights.shape)
    bits = bits_from_tolerances(tolerances, float(np.ptp(weights)), group)
    moved = np.abs(quantize_uniform(weights, bits) - weights)
    assert (moved <= tolerances * (1 + 1e-6)).all()
    # One bit fewer would be too few for at least one member of the group with the most bits.
    most = bits == bits.max()
    if bits.max() > 1:
        assert (np.ptp(weights) / (2 ** (bits.max() - 1) - 1) > 2 * tolerances[most].min()).all()


def test_bits_by_hand():
    tolerances = np.full((2, 2), 0.5)
    # Span 3, step 1: four levels.
    assert (bits_from_tolerances(tolerances, 3.0) == 2).all()
    tolerances[0, 0] = 0.1
    np.testing.assert_array_equal(bits_from_tolerances(tolerances, 3.0, "filter"), [[4, 4], [2, 2]])
    assert (bits_from_tolerances(tolerances, 3.0, "layer", 50.0) == 2).all()
    assert (bits_from_tolerances(np.zeros((2, 2)), 3.0) == MAX_BITS).all()
    with pytest.raises(SettingError, match="percentile"):
        bits_from_tolerances(tolerances, 3.0, "element", 10.0)
    with pytest.raises(SettingError, match="percentile"):
        bits_from_tolerances(tolerances, 3.0, "layer", 100.0)


def test_importance_is_one_for_what_went_first():
    importance = Importance()
    costs = [np.array(row) for row in ([4, 4, 4], [0, 4, 4], [0, 3, 4], [0, 0, 4], [0, 0, 4])]
    for before, after in itertools.pairwise(costs):
        importance.update({"w": before}, {"w": after})
    np.testing.assert_allclose(importance.values()["w"], [4 / 4, 4 / 3, np.inf])


class TestGrouping:
    def need(self, module, value=2.0):
        names = Twin(module).trainable()
        return {name: np.full(get_params(module)[name].shape, value) for name in names}

    def test_a_group_goes_only_as_a_whole(self, module):
        need = self.need(module)
        need["fc.weight"][3] = 1.0
        need["fc.weight"][5] = 0.5
        need["fc.weight"][5, 7] = 1.01
        masks = Grouping(module, "filter", tuple(need)).decide(need)
        np.testing.assert_array_equal(np.flatnonzero(~masks["fc.weight"].any(axis=1)), [3])
        assert masks["conv1.weight"].all()
        masks = Grouping(module, "element", tuple(need)).decide(need)
        assert (~masks["fc.weight"]).sum() == 2 * need["fc.weight"].shape[1] - 1

    def test_a_site_keeps_the_group_that_needs_to_stay_most(self, module):
        need = self.need(module, 0.1)
        need["fc.weight"][4, 4] = 0.2
        masks = Grouping(module, "filter", tuple(need)).decide(need)
        np.testing.assert_array_equal(np.flatnonzero(masks["fc.weight"].any(axis=1)), [4])

    def test_a_channel_goes_from_all_its_producers(self, module):
        need = self.need(module)
        grouping = Grouping(module, "channel", tuple(need))
        # layer2's output is made by its second convolution and by the shortcut.
        names = ["layer2.0.conv2.weight", "layer2.0.bn2.weight", "layer2.0.bn2.bias"]
        names += ["layer2.0.short.0.weight", "layer2.0.short.1.weight", "layer2.0.short.1.bias"]
        assert set(names) <= set(grouping.parameters)
        assert "fc.weight" not in grouping.parameters
        for name in names[:-1]:
            need[name][6] = 0.9
        assert grouping.kept_channels(grouping.decide(need)) == {}
        need[names[-1]][6] = 1.0
        masks = grouping.decide(need)
        assert all(not masks[name][6].any() for name in names)
        kept = grouping.kept_channels(masks)
        assert list(kept) == ["layer2.0.conv2"]
        assert kept["layer2.0.conv2"] == tuple(i for i in range(32) if i != 6)
        assert grouping.producers("layer2.0.conv2") == ("layer2.0.conv2", "layer2.0.short.0")

    def test_operations_of_a_weight_and_of_a_channel(self, module):
        trainable = tuple(self.need(module))
        sites = {site.weight: site for site in find_sites(module)}
        each = Grouping(module, "filter", trainable).operations()
        pixels = {name: site.macs / np.prod(site.weight_shape) for name, site in sites.items()}
        assert pixels["fc.weight"] == 1
        for name, share in each.items():
            assert share / each["fc.weight"] == pytest.approx(pixels[name])
        assert np.exp(np.mean(np.log(list(each.values())))) == pytest.approx(1)
        channels = Grouping(module, "channel", trainable).operations()

        def gone(makers, readers):
            made = sum(sites[name].macs / sites[name].weight_shape[0] for name in makers)
            return made + sum(sites[name].macs / sites[name].weight_shape[1] for name in readers)

        inner = gone(["layer2.0.conv1.weight"], ["layer2.0.conv2.weight"])
        readers = ["layer3.0.conv1.weight", "layer3.0.short.0.weight"]
        outer = gone(["layer2.0.conv2.weight", "layer2.0.short.0.weight"], readers)
        assert channels["layer2.0.bn1.bias"] == channels["layer2.0.conv1.weight"]
        ratio = channels["layer2.0.conv1.weight"] / channels["layer2.0.short.0.weight"]
        assert ratio == pytest.approx(inner / outer)

    def test_the_most_important_channels_come_back(self, module):
        need = self.need(module)
        grouping = Grouping(module, "channel", tuple(need))
        for name in ("layer2.0.conv1.weight", "layer2.0.bn1.weight", "layer2.0.bn1.bias"):
            need[name][[1, 3, 5, 7]] = 0.5
        masks = grouping.decide(need)
        importance = {name: np.ones(mask.shape) for name, mask in masks.items()}
        importance["layer2.0.conv1.weight"][5, 0, 0, 0] = 3.0
        importance["layer2.0.conv1.weight"][3] = 2.0
        total = len(masks["layer2.0.conv1.weight"])
        kept = grouping.kept_channels(masks, total - 2, importance)
        assert kept == {"layer2.0.conv1": tuple(i for i in range(total) if i not in (1, 7))}
        assert grouping.kept_channels(masks, total, importance) == {}

    def test_unknown(self, module):
        with pytest.raises(SettingError, match="rows"):
            Grouping(module, "rows", ())

    def test_needed_moves(self):
        weights = np.array([0.0, -2.0, 1.0, 1.0])
        np.testing.assert_array_equal(
            needed_moves(weights, np.array([0.0, 1.0, 2.0, 0.0])), [0, 2, 0.5, np.inf]
        )
