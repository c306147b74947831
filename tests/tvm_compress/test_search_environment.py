"""The environment: what the three agents decide, what they see, and when the reward comes."""

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tvm_compress.search_doubles import FormulaEvaluator, conv, problem
from tvm_compress.errors import ModelError, SettingError
from tvm_compress.fastlc.curvature import estimate_curvature
from tvm_compress.model import Model
from tvm_compress.passes.groups import CoupledSet
from tvm_compress.passes.params import get_params, set_params
from tvm_compress.passes.policy import channels_after
from tvm_compress.search.environment import CompressionEnv, reward_of
from tvm_compress.search.observation import SiteObservation, curvature_statistics, tolerance_statistics
from tvm_compress.search.problem import PolicyDraft, SearchProblem
from tvm_compress.search.results import EpisodeResult


def environment(network: SearchProblem) -> CompressionEnv:
    return CompressionEnv(network, FormulaEvaluator(network), budget=0.5)


def play(env: CompressionEnv, actions) -> tuple[list[dict[str, float]], list[float], dict]:
    """Observations by name (the first included), rewards, and the last info."""
    names = list(SiteObservation.__dataclass_fields__)
    state, _ = env.reset()
    seen, rewards, done = [state], [], False
    info: dict = {}
    for action in actions:
        assert not done
        state, reward, done, truncated, info = env.step(np.asarray(action, np.float32))
        assert not truncated
        seen.append(state)
        rewards.append(reward)
    assert done
    return [dict(zip(names, s.tolist(), strict=True)) for s in seen], rewards, info


@pytest.mark.parametrize(
    ("agent", "actions", "steps"), [("pruning", 1, 3), ("quantization", 2, 5), ("joint", 3, 5)]
)
def test_an_episode_has_a_step_per_decision_and_one_reward(agent, actions, steps):
    env = environment(problem(agent))
    assert env.action_space.shape == (actions,)
    _, rewards, info = play(env, [[0.3] * actions] * steps)
    assert rewards[:-1] == [0.0] * (steps - 1)
    assert rewards[-1] == reward_of(info["result"], 0.5, -3.0)
    assert set(info["policy"].sites) == {"stem", "conv1", "conv2", "down", "fc"}


@pytest.mark.parametrize("agent", ["pruning", "quantization", "joint"])
def test_gymnasium_accepts_the_environment(agent):
    check_env(environment(problem(agent)), skip_render_check=True)


def test_other_sites_of_a_coupled_set_follow_its_first():
    network = problem("joint")
    actions = [[0.0, 0.3, 0.3], [0.5, 0.3, 0.3], [0.25, 0.3, 0.3], [0.9, 0.3, 0.3], [0.9, 0.3, 0.3]]
    seen, _, info = play(environment(network), actions)
    policy = info["policy"]
    # stem: untouched; conv1: floor(0.5 * 64) + 1 = 33 -> 40; conv2: 49 -> 56; the later actions at down and
    # fc do not count.
    assert [policy[n].channels for n in ("stem", "conv1", "conv2", "down", "fc")] == [None, 40, 56, 56, None]
    assert channels_after(network.sites, network.sets, policy)["fc"] == (56, 10)
    assert [s["decides_pruning"] for s in seen[:5]] == [1, 1, 1, 0, 0]
    assert seen[2]["input_kept"] == 40 / 64
    assert seen[3]["output_kept"] == 56 / 64
    assert seen[3]["previous_pruning"] == 0.25


def test_bitserial_follows_the_rule_of_the_pruned_shapes():
    network = problem("joint")
    actions = [[0.0, 1.0, 1.0], [0.5, 0.9, 0.9], [0.0, 0.9, 0.9], [0.0, 0.6, 0.9], [0.0, 0.9, 0.9]]
    _, _, info = play(environment(network), actions)
    policy = info["policy"]
    assert policy["stem"].scheme == "int8"  # one input channel
    assert "multiples of 32" in policy["stem"].note
    assert (policy["conv1"].scheme, policy["conv1"].weight_bits) == ("bitserial", 2)
    assert policy["conv2"].scheme == "int8"  # 40 input channels are left
    assert (policy["down"].activation_bits, policy["down"].weight_bits) == (5, 2)
    assert policy["fc"].scheme == "int8"  # 10 output channels


def test_rounding_to_32_keeps_bitserial_legal():
    network = problem("joint", rounding=32)
    _, _, info = play(environment(network), [[0.6, 0.9, 0.9]] * 5)
    schemes = {name: info["policy"][name].scheme for name in ("conv1", "conv2", "down")}
    assert set(schemes.values()) == {"bitserial"}


action_lists = st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=5, max_size=5)


@settings(max_examples=40, deadline=None)
@given(action_lists, st.sampled_from(["pruning", "quantization", "joint"]), st.sampled_from([1, 8, 32]))
def test_any_actions_give_a_legal_policy(actions, agent, rounding):
    network = problem(agent, rounding=rounding)
    env = environment(network)
    steps, size = len(network.decision_sites()), len(network.actions)
    seen, _, info = play(env, [a[:size] for a in actions[:steps]])
    policy = info["policy"]
    policy.check(network.sites)
    for group in network.sets:
        counts = {policy[name].channels or group.channels for name in group.producers}
        assert len(counts) == 1
        assert next(iter(counts)) % min(rounding, group.channels) == 0 or not group.prunable
    rules = type("Rules", (), {"bitserial_legal": staticmethod(network.bitserial_rule)})()
    assert policy.legalize(network.sites, rules, network.sets) == policy
    for names in seen:
        assert all(np.isfinite(list(names.values())))


def test_draft_counts_macs_and_bit_operations():
    network = problem("joint")
    draft, conv2 = PolicyDraft(network), network.sites[2]
    draft.decide(network.sites[1], {"pruning": 0.5, "activation": 0.0, "weight": 0.0})
    assert draft.macs(conv2) == conv2.macs * 40 / 64
    draft.decide(conv2, {"pruning": 0.0, "activation": 0.3, "weight": 0.0})
    assert draft.bops(conv2) == draft.macs(conv2) * 64


def test_depthwise_sites_lose_inputs_with_outputs():
    site = conv("dw", 1, 16, 8)
    site = type(site)(**{**site.__dict__, "in_shape": (1, 8, 8, 16), "groups": 16})
    group = CoupledSet("dw", 16, ("dw",), (), True)
    draft = PolicyDraft(problem("joint", sites=[site], sets=[group]))
    draft.decide(site, {"pruning": 0.55, "activation": 0.9, "weight": 0.9})
    assert (draft.in_channels(site), draft.out_channels(site)) == (8, 8)
    assert draft.macs(site) == site.macs / 2
    assert draft.precision(site).scheme == "int8"


def test_nothing_to_prune_is_said():
    network = problem("pruning")
    frozen = [
        type(g)(g.name, g.channels, g.producers, g.cuts, False, "a custom operator") for g in network.sets
    ]
    with pytest.raises(SettingError, match="custom operator"):
        environment(problem("pruning", sets=frozen))


def test_observation_names_sensitivity_and_tolerance():
    sensitivity = {
        "stem": {"weight": {2.0: 1e-1, 8.0: 1e-4}, "activation": {8.0: 1e-3}, "pruning": {0.5: 1e-2}}
    }
    tolerance = tolerance_statistics({"stem": np.array([1e-3, 1e-2, 1e-1])})
    env = environment(problem("joint", sensitivity=sensitivity, tolerance=tolerance))
    seen, _, _ = play(env, [[0.0] * 3] * 5)
    first = seen[0]
    assert first["omega_weight_2"] == pytest.approx(-1, abs=1e-3)
    assert first["omega_weight_8"] == pytest.approx(-4, abs=1e-3)
    assert first["omega_activation_2"] == pytest.approx(-3, abs=1e-3)
    assert first["omega_pruning_75"] == pytest.approx(-2, abs=1e-3)
    assert first["tolerance_mean"] == pytest.approx(-2)
    assert seen[1]["omega_weight_2"] == pytest.approx(-7)


def test_reward_is_highest_at_the_budget():
    def at(ratio: float) -> float:
        return reward_of(EpisodeResult(0.9, ratio, ratio, "measured", "seconds"), 0.5, -3.0)

    assert at(0.5) == 0.9
    assert at(0.4) == pytest.approx(at(0.6)) == pytest.approx(0.9 - 3 * 0.2)


def test_the_agent_sees_curvature_where_it_is_given():
    without = play(environment(problem("pruning")), [[0.5]] * 3)[0]
    assert all(state["curvature_loss"] == state["gradient_loss"] == 0 for state in without)
    values = {"conv1": {"curvature": -1.5, "gradient": -2.5}}
    seen = play(environment(problem("pruning", curvature=values)), [[0.5]] * 3)[0]
    assert [state["curvature_loss"] for state in seen[:3]] == [0, -1.5, 0]
    assert seen[1]["gradient_loss"] == -2.5


def test_curvature_statistics_are_sums_over_the_weights_of_a_site(tmp_path):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten(), torch.nn.Linear(64, 3))
    module = Model.from_torch(layers.eval(), [torch.zeros(1, 1, 6, 6)]).module
    x = np.random.default_rng(0).normal(size=(9, 1, 6, 6)).astype(np.float32)
    curvature = estimate_curvature(module, x, np.arange(9) % 3)
    found = curvature_statistics(module, curvature)
    weight = get_params(module)["0.weight"].astype(np.float64)
    assert 10 ** found["0"]["curvature"] == pytest.approx((curvature.diagonal["0"] * weight**2).sum() / 2)
    assert 10 ** found["0"]["gradient"] == pytest.approx(np.abs(curvature.gradient["0"] * weight).sum())
    other = set_params(module, {"0.weight": np.ones_like(get_params(module)["0.weight"])})
    with pytest.raises(ModelError, match="another model"):
        curvature_statistics(other, curvature)
