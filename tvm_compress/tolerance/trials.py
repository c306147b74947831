"""The directory of a TOCO run, which can be killed at any moment and goes on to the same result.

`toco.json`     settings, and which model and images they are for
`trials.jsonl`  one line per iteration, appended
`state.npz`     everything that the next iteration depends on, written after each

An iteration is finished when the state after it is written: a line without one is dropped and done again.
"""

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tvm_compress.errors import StudyError
from tvm_compress.files import replacing, write_text
from tvm_compress.tolerance.algorithm1 import Iteration, State
from tvm_compress.tolerance.compression_models import Compressed
from tvm_compress.tolerance.importance import Importance

_ANOTHER = "Give another directory, or remove this one."
_NUMBERS = ("loss", "loss_bound", "trust_radius", "gain", "rejected", "number")


class Trials:
    """An open directory; made where it is missing.

    Parameters
    ----------
    facts
        What must be the same when a run is resumed, as plain values.

    Raises
    ------
    StudyError
        If the directory is of another run, or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], facts: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._check(dict(facts))
        self.iterations: list[Iteration] = []

    def _check(self, facts: dict[str, Any]) -> None:
        file = self.path / "toco.json"
        if file.exists():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise StudyError(f"{file} cannot be read: {error}.", _ANOTHER) from error
            for name in sorted(set(found) | set(facts)):
                if found.get(name) != facts.get(name):
                    raise StudyError(
                        f"The run in {self.path} was started with {name} = {found.get(name)!r}, "
                        f"not {facts.get(name)!r}.",
                        _ANOTHER,
                    )
        elif (self.path / "trials.jsonl").exists():
            raise StudyError(f"{self.path} has trials but no toco.json.", _ANOTHER)
        write_text(file, json.dumps(facts, indent=1, sort_keys=True) + "\n")

    def load(self) -> State | None:
        """Return the state after the last finished iteration, without logits; None at the beginning."""
        file = self.path / "state.npz"
        if not file.exists():
            write_text(self.path / "trials.jsonl", "")
            return None
        try:
            # numpy leaves a file that is no archive open if it opened it itself.
            with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
                arrays = dict(archive)
            numbers = json.loads(str(arrays.pop("numbers")))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise StudyError(f"{file} is damaged: {error}.", _ANOTHER) from error
        parts: dict[str, dict[str, np.ndarray]] = {"weights": {}, "bits": {}, "importance": {}, "squares": {}}
        for key, value in arrays.items():
            part, name = key.split("/", 1)
            parts[part][name] = value
        self._load_lines(numbers["number"])
        return State(
            Compressed(parts["weights"], parts["bits"]),
            np.zeros(0),
            squares=parts["squares"],
            importance=Importance(parts["importance"], numbers["number"]),
            **numbers,
        )

    def _load_lines(self, finished: int) -> None:
        file = self.path / "trials.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()[:finished] if file.exists() else []
        try:
            self.iterations = [Iteration(**json.loads(line)) for line in lines]
        except (ValueError, TypeError) as error:
            raise StudyError(f"{file} is damaged: {error}.", _ANOTHER) from error
        if len(lines) < finished:
            raise StudyError(f"{file} lost iterations: it has {len(lines)} of {finished}.", _ANOTHER)
        write_text(file, "".join(line + "\n" for line in lines))

    def record(self, iteration: Iteration, state: State) -> None:
        """Append an iteration and save the state after it."""
        self.iterations.append(iteration)
        with (self.path / "trials.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(iteration.to_dict(), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        arrays: dict[str, Any] = {
            **{f"weights/{name}": value for name, value in state.compressed.weights.items()},
            **{f"bits/{name}": value for name, value in state.compressed.bits.items()},
            **{f"importance/{name}": value for name, value in state.importance.counts.items()},
            **{f"squares/{name}": value for name, value in state.squares.items()},
            "numbers": np.array(json.dumps({name: getattr(state, name) for name in _NUMBERS})),
        }
        with replacing(self.path / "state.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
