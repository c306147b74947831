"""Ranks for the layers of a network, under one budget of numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tvm_compress.errors import SettingError
from tvm_compress.fastlc.c_steps import row_and_column_factors
from tvm_compress.passes.factorize import as_matrix, singular


@dataclass(frozen=True)
class Spectrum:
    """What each rank of a layer is worth (`gains`, descending) and the shape of its matrix."""

    gains: np.ndarray
    rows: int
    columns: int

    @property
    def most(self) -> int:
        """The largest rank that stores fewer numbers than the whole matrix."""
        return (self.rows * self.columns - 1) // (self.rows + self.columns)


def spectrum(weights: np.ndarray, importance: np.ndarray, factorization: str) -> Spectrum:
    """Squared singular values of weights in the metric of their importance, as a product of factors."""
    matrix = as_matrix(weights, factorization)
    rows, columns = row_and_column_factors(as_matrix(importance, factorization))
    _, values, _ = singular(rows[:, None] * matrix * columns)
    return Spectrum(values**2, *matrix.shape)


def choose_ranks(spectra: Mapping[str, Spectrum], budget: int) -> dict[str, int | None]:
    """Give each layer a rank so that all together store at most `budget` numbers; None leaves a layer whole.

    Ranks are granted one by one, in the order of what they are worth per number stored; a layer whose next
    rank would store no less than the whole matrix is left whole for what that still costs, if the budget
    has it.

    Raises
    ------
    SettingError
        If not even rank 1 everywhere fits.
    """
    ranks: dict[str, int | None] = {name: min(1, one.most) or None for name, one in spectra.items()}
    left = budget - sum(_stored(one, ranks[name]) for name, one in spectra.items())
    if left < 0:
        raise SettingError(
            f"Rank 1 in every layer stores {budget - left} numbers, more than the {budget} that are wanted.",
            "Ask for a smaller ratio.",
        )
    steps = sorted(
        (-gain / (one.rows + one.columns), name, rank)
        for name, one in spectra.items()
        for rank, gain in enumerate(one.gains[: one.most + 1], start=1)
        if rank > 1
    )
    stopped: set[str] = set()
    for _, name, rank in steps:
        one = spectra[name]
        wanted = rank if rank <= one.most else None
        cost = _stored(one, wanted) - _stored(one, ranks[name])
        if name in stopped or ranks[name] is None:
            continue
        if cost > left:
            stopped.add(name)
            continue
        ranks[name] = wanted
        left -= cost
    return ranks


def _stored(one: Spectrum, rank: int | None) -> int:
    return one.rows * one.columns if rank is None else rank * (one.rows + one.columns)
