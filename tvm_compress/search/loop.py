"""The episodes of a search: act, evaluate, learn, record."""

import time
from typing import Any

import torch

from tvm_compress.search.agents import Agent, Transition
from tvm_compress.search.environment import CompressionEnv
from tvm_compress.search.results import Evaluator, Progress, ProgressEvent, Trial, best_of, no_progress
from tvm_compress.search.study import Study


def run_episode(env: CompressionEnv, agent: Agent, episode: int) -> Trial:
    """Let the agent decide a policy, and learn from its reward."""
    begin = time.perf_counter()
    state, _ = env.reset(options={"episode": episode})
    transitions: list[Transition] = []
    reward, done = 0.0, False
    info: dict[str, Any] = {}
    while not done:
        observation = torch.from_numpy(state)
        action = agent.act(observation, episode)
        state, reward, done, _, info = env.step(action.numpy())
        transitions.append(Transition(observation, action))
    agent.learn(transitions, reward, episode)
    return Trial(
        episode=episode,
        phase=agent.phase(episode),
        policy=info["policy"],
        actions=[[round(value, 6) for value in t.action.tolist()] for t in transitions],
        result=info["result"],
        reward=reward,
        seconds=round(time.perf_counter() - begin, 3),
    )


def run_episodes(
    study: Study, env: CompressionEnv, agent: Agent, evaluator: Evaluator, progress: Progress = no_progress
) -> list[Trial]:
    """Run the episodes that the study lacks; each is recorded with a checkpoint. Returns all trials."""
    if study.checkpoint is not None:
        agent.load_state_dict(study.checkpoint["agent"])
        evaluator.load_state_dict(study.checkpoint["evaluator"])
    total = study.settings.episodes
    for episode in range(len(study.trials), total):
        trial = run_episode(env, agent, episode)
        state: dict[str, Any] = {"agent": agent.state_dict(), "evaluator": evaluator.state_dict()}
        study.record(trial, state)
        progress(ProgressEvent("episode", episode + 1, total, trial, best_of(study.trials)))
    return list(study.trials)
