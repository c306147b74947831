"""The tuning database: which choices were measured to be the fastest for layers, by target and versions."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import tvm
from tvm.target import Target

from tvm_compress.errors import TuningError
from tvm_compress.schedules.choices import Choice, Choices
from tvm_compress.schedules.kernel_key import SCHEDULES_VERSION, target_digest

FORMAT_VERSION = 1
_HINT = "`tvm-compress tune MODEL -o FILE` makes a new one."


class TuningWarning(UserWarning):
    """A tuning database that says nothing of what is built, or only of other versions."""


@dataclass(frozen=True)
class TunedLayer:
    """What was found for a layer.

    Attributes
    ----------
    layer
        See choices.layer_key.
    target, tvm, schedules
        What it holds for: kernel_key.target_digest, TVM's version, SCHEDULES_VERSION.
    choice, default
        The fastest, and what the schedules choose by themselves; they may be the same.
    value, default_value
        What their kernels took in the last, common measurement, in `unit`, times their calls in the model.
    kernels
        Keys of the chosen kernels (kernel_key.kernel_key).
    device, unit, threads
        What measured.
    tried
        How many choices were measured, with the default.
    """

    layer: str
    target: str
    tvm: str
    schedules: int
    choice: Choice
    default: Choice
    value: float
    default_value: float
    kernels: tuple[str, ...]
    device: str
    unit: str
    threads: int
    tried: int

    @property
    def versions(self) -> tuple[str, int]:
        """What else it holds for."""
        return self.tvm, self.schedules


@dataclass(frozen=True)
class Tuning:
    """A tuning database.

    Attributes
    ----------
    layers
        At most one for each layer, target and versions.
    source
        Where it was read from, for messages.
    """

    layers: tuple[TunedLayer, ...] = ()
    source: str = field(default="the tuning database", compare=False)

    @staticmethod
    def load(path: str | Path) -> "Tuning":
        """Read a database.

        Raises
        ------
        TuningError
            Where it is missing, damaged or of another format.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise TuningError(
                f"The tuning database {path} cannot be read: {error.strerror}.", _HINT
            ) from error
        except ValueError as error:
            raise TuningError(f"The tuning database {path} is not JSON: {error}.", _HINT) from error
        version = content.get("version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise TuningError(
                f"{path} is no tuning database of version {FORMAT_VERSION}: its version is {version!r}.",
                _HINT,
            )
        try:
            layers = tuple(_read_layer(row) for row in content["layers"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TuningError(
                f"The tuning database {path} holds a damaged entry: {type(error).__name__} {error}.", _HINT
            ) from error
        return Tuning(layers, str(path))

    def to_json(self) -> str:
        """Return the database as JSON text, its entries in a fixed order."""
        ordered = sorted(self.layers, key=lambda one: (one.target, one.versions, one.layer))
        return (
            json.dumps({"version": FORMAT_VERSION, "layers": [asdict(one) for one in ordered]}, indent=1)
            + "\n"
        )

    def merged(self, found: Sequence[TunedLayer]) -> "Tuning":
        """Return the database with entries added, in place of those for the same."""

        def identity(one: TunedLayer) -> tuple[Any, ...]:
            return one.layer, one.target, one.versions

        return Tuning(tuple({identity(one): one for one in (*self.layers, *found)}.values()), self.source)

    def for_target(self, target: Target) -> dict[str, TunedLayer]:
        """Return what holds for a target and these versions, by layer."""
        digest = target_digest(target)
        here = (tvm.__version__, SCHEDULES_VERSION)
        return {one.layer: one for one in self.layers if one.target == digest and one.versions == here}

    def choices(self, target: Target) -> Choices:
        """Return the choices for a target; warns where there are none, or some of other versions only."""
        found = self.for_target(target)
        digest = target_digest(target)
        stale = {one.layer for one in self.layers if one.target == digest} - set(found)
        if stale:
            warnings.warn(
                f"{self.source} has {len(stale)} layers that were tuned with other versions of the schedules "
                "or of TVM: they are ignored. Tune again.",
                TuningWarning,
                stacklevel=2,
            )
        elif not found:
            warnings.warn(
                f"{self.source} has nothing for the target {target}. Tune for this target.",
                TuningWarning,
                stacklevel=2,
            )
        return Choices.of({layer: one.choice for layer, one in found.items()})


def _read_layer(row: dict[str, Any]) -> TunedLayer:
    unknown = set(row) ^ {one.name for one in fields(TunedLayer)}
    if unknown:
        raise ValueError(f"unknown or missing: {', '.join(sorted(unknown))}")
    texts = ("layer", "target", "tvm", "device", "unit")
    if not all(isinstance(row[name], str) for name in texts):
        raise TypeError(f"{', '.join(texts)} must be texts")
    values: dict[str, Any] = {name: row[name] for name in texts}
    values |= {name: int(row[name]) for name in ("schedules", "threads", "tried")}
    values |= {name: float(row[name]) for name in ("value", "default_value")}
    values |= {name: _read_choice(row[name]) for name in ("choice", "default")}
    return TunedLayer(**values, kernels=tuple(str(key) for key in row["kernels"]))


def _read_choice(row: dict[str, Any]) -> Choice:
    return Choice(str(row["kernel"]), tuple(int(number) for number in row["cut"]))
