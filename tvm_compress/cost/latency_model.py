"""A latency model: xgboost and a Gaussian process on the logarithm of each kernel's time.

The model predicts how far a kernel is from an analytic cost (`features.analytic_cost`), so that a shape
unlike all that were measured still gets the right order of magnitude. Several boosters, each fitted to
another part of the rows, and the process give a mean and an error: how far they are apart, scaled by how far
they were off on rows that they had not seen. With too few measured kernels the model is the analytic cost
alone, scaled to them, and says so (`trained` is False). A model that was fitted before may take the analytic
cost's place: then only what differs from it is learned. One thread and a seed: the same rows give the same
model.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tvm_compress.cost import gaussian_process
from tvm_compress.cost.features import FEATURE_NAMES, Kernel, analytic_cost, kernel_vector
from tvm_compress.cost.gaussian_process import GaussianProcess
from tvm_compress.errors import StudyError
from tvm_compress.files import write_text

VERSION = 5

# Fewer distinct kernels than this cannot tell shapes from noise.
MIN_ROWS = 24
# Boosters; each is fitted without one part of the rows.
FOLDS = 5
# The relative error of a model that is not trained.
UNTRAINED_ERROR = 1.0
# Relative errors below this are not believed.
LEAST_ERROR = 0.01

_PARAMETERS = {
    "objective": "reg:squarederror",
    "max_depth": 6,
    "eta": 0.1,
    "min_child_weight": 2.0,
    "lambda": 1.0,
    "subsample": 0.8,
    "colsample_bytree": 0.6,
    "tree_method": "hist",
    "nthread": 1,
    "verbosity": 0,
}
_ROUNDS = 300
# What a file holds of a model besides its boosters and its prior.
_STORED = ("unit", "seed", "provenance", "rows", "scale", "error_scale")


@dataclass(frozen=True)
class KernelRow:
    """One measured kernel: its features [F], its expected time without a fit, and the time of one call."""

    vector: tuple[float, ...]
    bound: float
    value: float


@dataclass
class LatencyModel:
    """Predicts latencies in `unit` ("seconds" or "estimated_cycles"); the two never mix in one model.

    `provenance` says on what and from what the rows were measured; it is saved with the model, as is `prior`,
    the model that stands in for the analytic cost.
    """

    unit: str
    seed: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)
    rows: int = 0
    scale: float = 1.0
    #: Factor from the boosters' disagreement to the error on rows that they had not seen.
    error_scale: float = 1.0
    prior: "LatencyModel | None" = None
    _boosters: list[Any] = field(default_factory=list)
    _process: GaussianProcess | None = None

    @property
    def trained(self) -> bool:
        """Whether there were enough rows for more than the analytic cost."""
        return bool(self._boosters)

    def rows_of(self, kernels: Sequence[Kernel], values: Sequence[float]) -> list[KernelRow]:
        """Rows to fit to, of kernels whose calls take `values`."""
        bounds = self._expected(kernels)[0]
        return [
            KernelRow(tuple(float(v) for v in kernel_vector(kernel)), float(bound), float(value))
            for kernel, bound, value in zip(kernels, bounds, values, strict=True)
        ]

    def _expected(self, kernels: Sequence[Kernel]) -> tuple[np.ndarray, np.ndarray]:
        """Times of kernels as they are expected without a fit, up to a common factor, and their errors."""
        if self.prior is None:
            return np.asarray([analytic_cost(k) for k in kernels]), np.full(len(kernels), UNTRAINED_ERROR)
        found = np.asarray(self.prior.predict_with_errors(kernels)).reshape(-1, 2)
        return found[:, 0], found[:, 1]

    def fit(self, rows: Sequence[KernelRow]) -> "LatencyModel":
        """Fit to measured kernels, given in a fixed order. Returns the model itself.

        Rows without a positive finite time do not count.
        """
        usable = [row for row in rows if math.isfinite(row.value) and row.value > 0]
        self.rows = len(usable)
        self._boosters, self._process = [], None
        if not usable:
            self.scale = 1.0
            return self
        target = np.log([row.value / row.bound for row in usable])
        self.scale = float(np.exp(np.median(target)))
        if self.rows >= MIN_ROWS:
            self._fit_boosters(np.asarray([row.vector for row in usable], np.float32), target)
        return self

    def _fit_boosters(self, vectors: np.ndarray, target: np.ndarray) -> None:
        import xgboost

        base = {"seed": self.seed, "base_score": float(np.median(target))}
        fold = np.random.default_rng(self.seed).permutation(self.rows) % FOLDS
        for held_out in range(FOLDS):
            data = xgboost.DMatrix(vectors[fold != held_out], target[fold != held_out])
            self._boosters.append(xgboost.train(_PARAMETERS | base, data, _ROUNDS))
        self._process, left_out = gaussian_process.fit(vectors, target)
        each = self._predict_each(vectors)
        unseen = (each[fold, np.arange(self.rows)] + left_out) / 2
        # What had not seen a row, against the disagreement of all there.
        apart = _spread(each, left_out)
        off = np.sqrt(np.mean((unseen - target) ** 2))
        self.error_scale = float(off / max(np.sqrt(np.mean(apart**2)), 1e-9))

    def _predict_each(self, vectors: np.ndarray) -> np.ndarray:
        """What each booster predicts: [FOLDS, n]."""
        import xgboost

        data = xgboost.DMatrix(vectors)
        return np.stack([booster.predict(data) for booster in self._boosters])

    def predict_kernels(self, kernels: Sequence[Kernel]) -> list[float]:
        """Time of one call of each kernel."""
        return [value for value, _ in self.predict_with_errors(kernels)]

    def predict_with_errors(self, kernels: Sequence[Kernel]) -> list[tuple[float, float]]:
        """Time of one call of each kernel, and its standard error as a share of it."""
        bounds, errors = self._expected(kernels)
        values = bounds * self.scale
        if self._process is not None and len(kernels):
            vectors = np.stack([kernel_vector(kernel) for kernel in kernels])
            each, smooth = self._predict_each(vectors), self._process.predict(vectors)
            errors = np.maximum(self.error_scale * _spread(each, smooth), LEAST_ERROR)
            values = bounds * np.exp((each.mean(axis=0) + smooth) / 2)
        return [(float(value), float(error)) for value, error in zip(values, errors, strict=True)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON, with provenance and the version of xgboost."""
        import xgboost

        values = {"version": VERSION, "features": list(FEATURE_NAMES), **self.to_dict()}
        values["provenance"] = self.provenance | {"xgboost": xgboost.__version__}
        write_text(path, json.dumps(values) + "\n")

    def to_dict(self) -> dict[str, Any]:
        """Plain values: all that predictions depend on, and the provenance."""
        numbers = {name: getattr(self, name) for name in _STORED}
        boosters = [json.loads(booster.save_raw("json")) for booster in self._boosters]
        process = self._process and self._process.to_dict()
        return numbers | {
            "boosters": boosters,
            "process": process,
            "prior": self.prior and self.prior.to_dict(),
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LatencyModel":
        """Read what `save` wrote.

        Raises
        ------
        StudyError
            If the file is no latency model, or one with other features.
        """
        hint = "Fit it again, by `tvm-compress cost fit` or by the search that wrote it."
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            version, features = values["version"], values["features"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StudyError(f"The latency model {path} cannot be read: {error!r}.", hint) from error
        if version != VERSION or features != list(FEATURE_NAMES):
            raise StudyError(
                f"The latency model {path} is of another version ({version!r}) of this tool.", hint
            )
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatencyModel":
        """Model from `to_dict`'s values."""
        prior = cls.from_dict(values["prior"]) if values["prior"] else None
        model = cls(**{name: values[name] for name in _STORED}, prior=prior)
        if values["boosters"]:
            import xgboost

            model._process = GaussianProcess.from_dict(values["process"])

            for raw in values["boosters"]:
                booster = xgboost.Booster({"nthread": 1})
                booster.load_model(bytearray(json.dumps(raw).encode()))
                model._boosters.append(booster)
        return model


def _spread(each: np.ndarray, smooth: np.ndarray) -> np.ndarray:
    """How far boosters [FOLDS, n] and process [n] are from their common mean, as a standard deviation [n]."""
    return np.sqrt(each.var(axis=0) + ((each.mean(axis=0) - smooth) / 2) ** 2)
