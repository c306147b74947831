"""A study: the directory of a search, which can be killed at any moment and goes on to the same result.

`study.json`         settings, fingerprints and versions; never changes but for the settings that may
`trials.jsonl`       one line per episode, appended
`checkpoint.pt`      agent, replay buffer, random states and the evaluator's state after the last finished
episode `sensitivity.json`   the sensitivity analysis
`measurements.sqlite` every latency that was measured

An episode is finished when its checkpoint is written: a trial without one is dropped and done again, from the
same state.
"""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from tvm_compress.errors import PolicyError, StudyError
from tvm_compress.files import replacing, write_text
from tvm_compress.search.results import Trial
from tvm_compress.search.settings import RESUMABLE, SearchSettings

VERSION = 2


class Study:
    """An open study; a context manager that holds the study's lock.

    Parameters
    ----------
    path
        Directory of the study; made where it is missing.
    settings
        Of the search.
    facts
        What else must be the same when the study is resumed: fingerprints of the model and the data,
        versions.

    Raises
    ------
    StudyError
        If another process has the study open, it is damaged, or it was started with other settings.
    """

    def __init__(
        self, path: str | os.PathLike[str], settings: SearchSettings, facts: Mapping[str, str]
    ) -> None:
        self.path = Path(path)
        self.settings = settings
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise StudyError(
                f"The study {self.path} is being written by another process.",
                "Wait for it, or give this search another name with --study.",
            ) from error
        try:
            self._open_settings(dict(facts))
            self.checkpoint = self._load_checkpoint()
            self.trials = self._load_trials()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Study":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up the lock."""
        self._lock.release()

    @property
    def measurements(self) -> Path:
        """Path of the store of measurements."""
        return self.path / "measurements.sqlite"

    def record(self, trial: Trial, state: Mapping[str, Any]) -> None:
        """Append a finished episode and save the state after it.

        Parameters
        ----------
        trial
            Its `episode` is the number of trials so far.
        state
            Tensors and plain values only.
        """
        assert trial.episode == len(self.trials), (trial.episode, len(self.trials))
        line = json.dumps(trial.to_dict(), allow_nan=False)
        with (self.path / "trials.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.trials.append(trial)
        self.checkpoint = {"episodes": len(self.trials), **state}
        with replacing(self.path / "checkpoint.pt") as temporary:
            torch.save(self.checkpoint, temporary)

    def read_json(self, name: str) -> Any:
        """Value of a JSON file of the study, or None where there is none (or it cannot be read)."""
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the study at once."""
        write_text(self.path / name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def _open_settings(self, facts: dict[str, str]) -> None:
        wanted = {"version": VERSION, "settings": self.settings.to_dict(), "facts": facts}
        path = self.path / "study.json"
        if path.exists():
            self._compare(_read_study(path), wanted)
        elif (self.path / "trials.jsonl").exists():
            raise StudyError(f"The study {self.path} has trials but no study.json.", _ANOTHER)
        write_text(path, json.dumps(wanted, indent=1, sort_keys=True) + "\n")

    def _compare(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        for part in ("settings", "facts"):
            old, new = found[part], wanted[part]
            for name in sorted(set(old) | set(new)):
                if name not in RESUMABLE and old.get(name) != new.get(name):
                    raise StudyError(
                        f"The study {self.path} was started with {name} = {old.get(name)!r}, "
                        f"not {new.get(name)!r}.",
                        _ANOTHER,
                    )

    def _load_checkpoint(self) -> dict[str, Any] | None:
        path = self.path / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            return torch.load(path, weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise StudyError(f"The checkpoint {path} is damaged: {error}.", _ANOTHER) from error

    def _load_trials(self) -> list[Trial]:
        trials = read_trials(self.path)
        finished = int(self.checkpoint["episodes"]) if self.checkpoint else 0
        if len(trials) < finished:
            raise StudyError(
                f"The study {self.path} lost trials: {len(trials)} of {finished} are in trials.jsonl.",
                _ANOTHER,
            )
        lines = [json.dumps(trial.to_dict(), allow_nan=False) + "\n" for trial in trials[:finished]]
        if (self.path / "trials.jsonl").exists():
            write_text(self.path / "trials.jsonl", "".join(lines))
        return trials[:finished]


_ANOTHER = "Give this search another name with --study, or remove that directory."


def read_trials(path: Path) -> list[Trial]:
    """Trials of a study's directory; a last line that was cut off does not count.

    Raises
    ------
    StudyError
        If any other line cannot be read.
    """
    file = path / "trials.jsonl"
    if not file.exists():
        return []
    trials: list[Trial] = []
    *lines, rest = file.read_text(encoding="utf-8").split("\n")
    del rest  # empty, or the beginning of a line that was never finished
    for number, line in enumerate(lines):
        try:
            trials.append(Trial.from_dict(json.loads(line)))
        except (ValueError, KeyError, TypeError, PolicyError) as error:
            raise StudyError(f"Line {number + 1} of {file} is damaged: {error!r}.", _ANOTHER) from error
    return trials


def read_settings(path: Path) -> SearchSettings:
    """Settings of a study's directory, without opening it for writing."""
    return SearchSettings.from_dict(_read_study(path / "study.json")["settings"])


def _read_study(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} cannot be read: {error}.", _ANOTHER) from error
    if not isinstance(values, dict) or values.get("version") != VERSION:
        raise StudyError(f"{path} is not a study of version {VERSION}.", _ANOTHER)
    return values
