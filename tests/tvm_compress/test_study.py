"""Studies: killed at any moment they go on to the same result, and never mix settings."""

import json
import shutil
from pathlib import Path

import pytest

from tests.tvm_compress.search_doubles import FormulaEvaluator, problem
from tvm_compress.errors import SettingError, StudyError
from tvm_compress.search.agents import make_agent
from tvm_compress.search.environment import CompressionEnv
from tvm_compress.search.loop import run_episodes
from tvm_compress.search.observation import SiteObservation
from tvm_compress.search.results import ProgressEvent, Trial, best_of, pareto_front
from tvm_compress.search.settings import SearchSettings
from tvm_compress.search.study import Study, read_settings, read_trials

SETTINGS = SearchSettings(agent="joint", episodes=8, warmup=3, seed=5)
FACTS = {"model": "abc", "data": "def"}


def search(
    path: Path, settings: SearchSettings = SETTINGS, fail_at: int | None = None, events=None
) -> list[Trial]:
    network = problem(settings.agent)
    evaluator = FormulaEvaluator(network)
    evaluator.fail_at = fail_at
    env = CompressionEnv(network, evaluator, settings.budget, settings.beta)
    agent = make_agent(settings, SiteObservation.size(), len(network.actions))
    with Study(path, settings, FACTS) as study:
        trials = run_episodes(
            study, env, agent, evaluator, events.append if events is not None else lambda _: None
        )
    assert evaluator.calls == settings.episodes
    return trials


def essence(trials: list[Trial]) -> list[dict]:
    return [trial.to_dict() | {"seconds": 0} for trial in trials]


def test_an_interrupted_study_goes_on_to_the_same_result(tmp_path):
    whole = search(tmp_path / "whole")
    for stop in (0, 2, 5):
        with pytest.raises(KeyboardInterrupt):
            search(tmp_path / f"cut{stop}", fail_at=stop)
        assert len(read_trials(tmp_path / f"cut{stop}")) == stop
        assert essence(search(tmp_path / f"cut{stop}")) == essence(whole)


def test_a_trial_without_checkpoint_is_done_again(tmp_path):
    whole = search(tmp_path / "study")
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "killed", fail_at=4)
    lines = (tmp_path / "study" / "trials.jsonl").read_text().splitlines(keepends=True)
    # Killed between a trial's line and its checkpoint, and in the middle of the next line.
    (tmp_path / "killed" / "trials.jsonl").write_text("".join(lines[:5]) + lines[5][:40])
    assert essence(search(tmp_path / "killed")) == essence(whole)
    assert essence(read_trials(tmp_path / "killed")) == essence(whole)


def test_a_study_can_be_made_longer(tmp_path):
    whole = search(tmp_path / "whole")
    search(tmp_path / "grown", SearchSettings(agent="joint", episodes=4, warmup=3, seed=5))
    assert essence(search(tmp_path / "grown")) == essence(whole)


def test_progress_tells_each_episode_and_the_best(tmp_path):
    events: list[ProgressEvent] = []
    trials = search(tmp_path / "study", events=events)
    assert [(e.stage, e.done, e.total) for e in events] == [("episode", n, 8) for n in range(1, 9)]
    assert events[-1].best == best_of(trials)
    assert best_of([]) is None


def test_trials_come_back_from_their_lines(tmp_path):
    trials = search(tmp_path / "study")
    assert essence(read_trials(tmp_path / "study")) == essence(trials)
    assert {t.phase for t in trials} == {"warmup", "search"}
    assert read_settings(tmp_path / "study") == SETTINGS


def test_other_settings_are_refused_by_name(tmp_path):
    with Study(tmp_path, SETTINGS, FACTS):
        pass
    with pytest.raises(StudyError, match=r"budget = 0.5, not 0.4.*--study"):
        Study(tmp_path, SearchSettings(agent="joint", episodes=8, warmup=3, seed=5, budget=0.4), FACTS)
    with pytest.raises(StudyError, match=r"model = 'abc', not 'xyz'"):
        Study(tmp_path, SETTINGS, {**FACTS, "model": "xyz"})
    with Study(tmp_path, SETTINGS, FACTS):  # the refused ones left no lock and no change behind
        pass


def test_two_processes_cannot_write_one_study(tmp_path):
    with Study(tmp_path, SETTINGS, FACTS), pytest.raises(StudyError, match="another process"):
        Study(tmp_path, SETTINGS, FACTS)


def test_damage_is_told(tmp_path):
    search(tmp_path / "study")
    lines = (tmp_path / "study" / "trials.jsonl").read_text().splitlines(keepends=True)

    def damaged(name: str, file: str, content: str | bytes) -> Path:
        path = tmp_path / name
        shutil.copytree(tmp_path / "study", path)
        (path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    with pytest.raises(StudyError, match="lost trials"):
        Study(damaged("lost", "trials.jsonl", "".join(lines[:3])), SETTINGS, FACTS)
    with pytest.raises(StudyError, match="Line 2"):
        Study(damaged("line", "trials.jsonl", lines[0] + "{}\n" + lines[2]), SETTINGS, FACTS)
    with pytest.raises(StudyError, match="checkpoint"):
        Study(damaged("checkpoint", "checkpoint.pt", b"nothing"), SETTINGS, FACTS)
    with pytest.raises(StudyError, match="not a study of version"):
        Study(damaged("version", "study.json", json.dumps({"version": 99})), SETTINGS, FACTS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budget", 0.0),
        ("budget", 1.5),
        ("budget", float("nan")),
        ("agent", "all"),
        ("episodes", 0),
        ("rounding", 7),
        ("max_bits", 8),
        ("beta", 1.0),
        ("device", "moon"),
        ("latency", "guess"),
        ("warmup", True),
    ],
)
def test_impossible_settings_name_themselves(name, value):
    with pytest.raises(SettingError, match=name):
        SearchSettings(**{name: value})


def test_settings_come_back_and_unknown_ones_are_refused():
    assert SearchSettings.from_dict(SETTINGS.to_dict()) == SETTINGS
    with pytest.raises(SettingError, match="colour"):
        SearchSettings.from_dict({"colour": "red"})
    assert SearchSettings(device="emulated-a72").build_target == "raspberry-pi/4b-aarch64"
    assert SearchSettings(target="llvm -mcpu=znver3").build_target == "llvm -mcpu=znver3"


def test_pareto_front_holds_what_nothing_beats(tmp_path):
    trials = search(tmp_path / "study")
    front = pareto_front(trials)
    assert front
    for trial in trials:
        beaten = any(
            o.result.accuracy >= trial.result.accuracy and o.result.latency <= trial.result.latency
            for o in trials
            if o is not trial
        )
        assert (trial in front) or beaten
    points = [(t.result.latency, t.result.accuracy) for t in front]
    assert points == sorted(points)
    assert [p[1] for p in points] == sorted(p[1] for p in points)
