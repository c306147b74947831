"""The learner: noise, replay, terminal states, determinism, and that it learns."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_compress.search.agents import DDPGAgent, FixedAgent, RandomAgent, Transition, make_agent
from tvm_compress.search.ddpg import DDPG, DDPGSettings
from tvm_compress.search.noise import NoiseSchedule, truncated_normal, warmup_levels
from tvm_compress.search.normalize import MovingNormalizer, RunningStandardizer
from tvm_compress.search.replay import Batch, ReplayBuffer
from tvm_compress.search.settings import SearchSettings


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(state) -> list:
    """Tensors and values of nested state dicts, in order."""
    if isinstance(state, dict):
        return [leaf for key in state for leaf in flat(state[key])]
    if isinstance(state, list | tuple):
        return [leaf for value in state for leaf in flat(value)]
    return [state]


def same(a, b) -> bool:
    pairs = zip(flat(a), flat(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.floats(0.01, 2.0))
def test_noise_stays_in_the_unit_interval(mean, sigma):
    sample = truncated_normal(torch.full((64,), mean), sigma, generator())
    assert torch.isfinite(sample).all()
    assert sample.min() >= 0
    assert sample.max() <= 1


def test_noise_has_the_moments_of_the_truncated_normal():
    sample = truncated_normal(torch.full((200_000,), 0.2, dtype=torch.float64), 0.5, generator())
    # Mean and variance of N(0.2, 0.25) truncated to [0, 1], from the closed forms.
    low, high = -0.4, 1.6
    density = [math.exp(-0.5 * v * v) / math.sqrt(2 * math.pi) for v in (low, high)]
    mass = 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
    shift = (density[0] - density[1]) / mass
    mean = 0.2 + 0.5 * shift
    variance = 0.25 * (1 + (low * density[0] - high * density[1]) / mass - shift**2)
    assert float(sample.mean()) == pytest.approx(mean, abs=3e-3)
    assert float(sample.var()) == pytest.approx(variance, abs=2e-3)


def test_noise_of_no_deviation_is_the_mean_and_decays():
    mean = torch.tensor([0.0, 0.3, 1.0])
    assert torch.equal(truncated_normal(mean, 0.0, generator()), mean)
    assert [NoiseSchedule().sigma(k) for k in (0, 1, 2)] == pytest.approx([0.5, 0.475, 0.45125])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 3))
def test_warmup_covers_the_range_of_every_action(episodes, actions):
    levels = warmup_levels(episodes, actions, generator())
    bins = (levels * episodes).floor().long().sort(dim=0).values
    assert torch.equal(bins, torch.arange(episodes)[:, None].expand(-1, actions))


def test_replay_forgets_the_oldest_and_samples_without_repeats():
    buffer = ReplayBuffer(4, 1, 1)
    for index in range(6):
        value = torch.tensor([float(index)])
        buffer.add(value, value, float(index), value + 1, index == 5)
    batch = buffer.sample(10, generator())
    assert sorted(batch.rewards.tolist()) == [2.0, 3.0, 4.0, 5.0]
    assert len(set(buffer.sample(3, generator()).rewards.tolist())) == 3
    assert batch.dones.sum() == 1
    assert torch.equal(batch.next_observations, batch.observations + 1)


def test_standardizer_follows_mean_and_deviation():
    data = torch.randn(50, 3, generator=generator(), dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.0]) + 5
    running = RunningStandardizer(3)
    for row in data:
        running.update(row.float())
    scaled = running.apply(data.float())
    expected = (data - data.mean(0)) / data.std(0, unbiased=False)
    assert torch.allclose(scaled[:, :2].double(), expected[:, :2], atol=1e-4)
    assert torch.equal(scaled[:, 2], torch.zeros(50))


def test_rewards_are_normalised_by_moving_averages():
    moving = MovingNormalizer(0.5)
    rewards = torch.tensor([1.0, 3.0])
    assert torch.equal(moving.apply(rewards), rewards)
    moving.update(rewards)
    assert torch.allclose(moving.apply(rewards), torch.tensor([-1.0, 1.0]))
    moving.update(rewards + 2)
    assert torch.allclose(moving.apply(torch.tensor([3.0])), torch.tensor([0.0]))


def test_targets_do_not_look_past_the_end_of_an_episode():
    learner = DDPG(2, 1, seed=0)
    with torch.no_grad():
        learner._target_critic.last.bias.fill_(100.0)  # any bootstrapping would show
    ones = torch.ones(2, 2)
    batch = Batch(ones, torch.ones(2, 1), torch.tensor([1.0, 1.0]), ones, torch.tensor([0.0, 1.0]))
    running, terminal = learner.targets(batch).tolist()
    assert terminal == 1.0
    assert running == pytest.approx(1.0 + 0.99 * 100.0, rel=1e-2)


def test_targets_follow_slowly():
    learner = DDPG(2, 1, seed=0)
    before = learner._target_actor.last.weight.clone()
    observation = torch.tensor([0.5, -0.5])
    learner.observe(observation)
    learner.observe(-observation)
    for reward in (0.0, 1.0):
        learner.buffer.add(observation, torch.tensor([reward]), reward, observation, True)
    learner.update(1)
    expected = before + 0.001 * (learner.actor.last.weight - before)
    assert torch.allclose(learner._target_actor.last.weight, expected)


def play(agent: DDPGAgent, begin: int, end: int, task: torch.Generator) -> list[float]:
    """A task of 4 steps whose best action is the first entry of the observation."""
    rewards = []
    for episode in range(begin, end):
        states = torch.rand(4, 3, generator=task)
        actions = [agent.act(state, episode) for state in states]
        reward = 1.0 - sum(float((a[0] - s[0]).abs()) for a, s in zip(actions, states, strict=True))
        agent.learn([Transition(s, a) for s, a in zip(states, actions, strict=True)], reward, episode)
        rewards.append(reward)
    return rewards


def test_agent_learns():
    agent = DDPGAgent(3, 1, warmup=20, seed=0, settings=DDPGSettings(hidden=(64, 48), actor_rate=1e-3))
    rewards = play(agent, 0, 250, generator(1))
    assert sum(rewards[-40:]) / 40 > sum(rewards[:40]) / 40 + 0.4


def test_one_seed_gives_one_result_and_another_another():
    first, second, other = (play(DDPGAgent(3, 1, 5, seed), 0, 12, generator(1)) for seed in (3, 3, 4))
    assert first == second
    assert first != other


def test_learner_goes_on_to_the_bit_from_its_state(tmp_path):
    whole, half = (DDPGAgent(3, 2, warmup=3, seed=7) for _ in range(2))
    task_whole, task_half = generator(2), generator(2)
    play(whole, 0, 12, task_whole)
    play(half, 0, 6, task_half)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    resumed = DDPGAgent(3, 2, warmup=3, seed=7)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    play(resumed, 6, 12, task_half)
    assert same(whole.state_dict(), resumed.state_dict())


def test_no_global_random_state_is_used():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    play(DDPGAgent(3, 1, 2, seed=0), 0, 4, generator(1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("updates", [1, 3])
def test_steps_are_taken_for_each_transition_from_the_end_of_the_warmup(updates):
    agent = DDPGAgent(3, 1, warmup=2, seed=0, updates=updates)
    taken: list[int] = []
    agent.learner.update = taken.append  # type: ignore[method-assign, assignment]
    play(agent, 0, 4, generator())
    assert taken == [4 * updates] * 3


def test_baselines():
    state = torch.zeros(3)
    assert FixedAgent([0.2, 0.4]).act(state, 0).tolist() == pytest.approx([0.2, 0.4])
    random = make_agent(SearchSettings(strategy="random"), 3, 2)
    assert isinstance(random, RandomAgent)
    first = random.act(state, 0)
    saved = random.state_dict()
    following = random.act(state, 1)
    random.load_state_dict(saved)
    assert torch.equal(random.act(state, 1), following)
    assert not torch.equal(first, following)
    assert isinstance(make_agent(SearchSettings(), 3, 2), DDPGAgent)
