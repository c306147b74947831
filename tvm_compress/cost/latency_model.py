"""A latency model: xgboost on the logarithm of each kernel's time, summed up over a network and calibrated.

The model predicts how far a kernel is from an analytic bound (`features.analytic_cost`), so that a shape
unlike all that were measured still gets the right order of magnitude. With too few measured kernels it is the
bound alone, scaled to them, and says so (`trained` is False). One thread and a seed: the same rows give the
same model.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tvm_compress.cost.features import FEATURE_NAMES, Kernel, analytic_cost, kernel_vector
from tvm_compress.errors import StudyError
from tvm_compress.files import write_text

VERSION = 1

# Fewer distinct kernels than this cannot tell shapes from noise.
MIN_ROWS = 24

_PARAMETERS = {
    "objective": "reg:squarederror",
    "max_depth": 4,
    "eta": 0.15,
    "min_child_weight": 1.0,
    "lambda": 1.0,
    "subsample": 1.0,
    "tree_method": "exact",
    "nthread": 1,
    "verbosity": 0,
}
_ROUNDS = 120


@dataclass(frozen=True)
class KernelRow:
    """One measured kernel: its features [F], its analytic cost, and the time of one call."""

    vector: tuple[float, ...]
    bound: float
    value: float

    @classmethod
    def of(cls, kernel: Kernel, value: float) -> "KernelRow":
        """Row of a kernel whose call takes `value`."""
        return cls(tuple(float(v) for v in kernel_vector(kernel)), analytic_cost(kernel), float(value))


@dataclass
class LatencyModel:
    """Predicts latencies in `unit` ("seconds" or "estimated_cycles"); the two never mix in one model.

    `provenance` says on what and from what the rows were measured; it is saved with the model.
    """

    unit: str
    seed: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    scale: float = 1.0
    calibration: float = 1.0
    _booster: Any = None

    @property
    def trained(self) -> bool:
        """Whether there were enough rows for more than the analytic bound."""
        return self._booster is not None

    def fit(self, rows: Sequence[KernelRow]) -> "LatencyModel":
        """Fit to measured kernels, given in a fixed order. Returns the model itself.

        Rows without a positive finite time do not count.
        """
        usable = [row for row in rows if math.isfinite(row.value) and row.value > 0]
        self.rows = len(usable)
        self._booster = None
        if not usable:
            self.scale = 1.0
            return self
        target = np.log([row.value / row.bound for row in usable])
        self.scale = float(np.exp(np.median(target)))
        if self.rows >= MIN_ROWS:
            import xgboost

            data = xgboost.DMatrix(np.asarray([row.vector for row in usable], np.float32), target)
            base = {"seed": self.seed, "base_score": float(np.median(target))}
            self._booster = xgboost.train(_PARAMETERS | base, data, _ROUNDS)
        return self

    def calibrate(self, predicted: Sequence[float], measured: Sequence[float]) -> None:
        """Let whole networks correct the sum of their kernels: by the median of measured / predicted."""
        ratios = [m / p for p, m in zip(predicted, measured, strict=True) if p > 0 and m > 0]
        self.calibration = float(np.median(ratios)) if ratios else 1.0

    def predict_kernels(self, kernels: Sequence[Kernel]) -> list[float]:
        """Time of one call of each kernel."""
        bounds = np.asarray([analytic_cost(kernel) for kernel in kernels])
        if self._booster is None or not len(kernels):
            return [float(v) for v in bounds * self.scale]
        import xgboost

        vectors = np.stack([kernel_vector(kernel) for kernel in kernels])
        return [float(v) for v in bounds * np.exp(self._booster.predict(xgboost.DMatrix(vectors)))]

    def sum_kernels(self, kernels: Sequence[Kernel], known: Mapping[str, float] | None = None) -> float:
        """Time of all calls of a network's kernels; those in `known` (by key) count as measured."""
        known = known or {}
        predicted = self.predict_kernels(kernels)
        return sum(known.get(k.key, p) * k.count for k, p in zip(kernels, predicted, strict=True))

    def predict(self, kernels: Sequence[Kernel], known: Mapping[str, float] | None = None) -> float:
        """Latency of a network: the sum of its kernels, calibrated."""
        return self.sum_kernels(kernels, known) * self.calibration

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, with provenance and the version of xgboost."""
        import xgboost

        values = {
            "version": VERSION,
            "unit": self.unit,
            "seed": self.seed,
            "rows": self.rows,
            "scale": self.scale,
            "calibration": self.calibration,
            "features": list(FEATURE_NAMES),
            "provenance": self.provenance | {"xgboost": xgboost.__version__},
            "booster": json.loads(self._booster.save_raw("json")) if self._booster is not None else None,
        }
        write_text(path, json.dumps(values) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LatencyModel":
        """Read what `save` wrote.

        Raises
        ------
        StudyError
            If the file is no latency model, or one with other features.
        """
        hint = "Remove it; the search fits another from its measurements."
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            version, features = values["version"], values["features"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StudyError(f"The latency model {path} cannot be read: {error!r}.", hint) from error
        if version != VERSION or features != list(FEATURE_NAMES):
            raise StudyError(
                f"The latency model {path} is of another version ({version!r}) of this tool.", hint
            )
        model = cls(values["unit"], values["seed"], values["provenance"], values["rows"], values["scale"])
        model.calibration = values["calibration"]
        if values["booster"] is not None:
            import xgboost

            model._booster = xgboost.Booster({"nthread": 1})
            model._booster.load_model(bytearray(json.dumps(values["booster"]).encode()))
        return model
