"""Measuring several libraries against a reference, in one interleaved run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tvm_compress.errors import SettingError
from tvm_compress.rpc.device import Candidate, Device, LatencyResult, MeasurementSettings, Session


@dataclass(frozen=True)
class Measured:
    """A latency and how it compares.

    Parameters
    ----------
    result
        The latency, or its failure.
    ratio
        Latency over that of the reference, by `latency_ratio`; None without a reference, or if either failed.
    """

    result: LatencyResult
    ratio: float | None = None


def measure(
    device: Device | Session,
    libraries: Mapping[str, Path],
    inputs: Sequence[np.ndarray] | Mapping[str, Sequence[np.ndarray]],
    settings: MeasurementSettings | None = None,
    reference: str | None = None,
) -> dict[str, Measured]:
    """Measure libraries interleaved, and compare them with one of them.

    Parameters
    ----------
    device
        A device, opened here with `settings`, or a session that is open, whose own settings hold.
    libraries
        By name, the exported libraries.
    inputs
        The arguments of every library's `main`, or by name those of each.
    reference
        Name of the library that the others are compared with, such as the dense one.

    Returns
    -------
    By name, the latency and its ratio to the reference's.

    Raises
    ------
    SettingError
        The reference or the inputs name no library; settings for a session that has its own.
    DeviceError
        The device cannot be opened. What fails later is in the results.
    """
    if reference is not None and reference not in libraries:
        raise SettingError(f"The reference {reference!r} is none of the libraries {', '.join(libraries)}.")
    candidates: dict[str, Candidate] = {}
    for name, library in libraries.items():
        if isinstance(inputs, Mapping):
            if name not in inputs:
                raise SettingError(f"There are no inputs for {name!r}.")
            candidates[name] = (library, inputs[name])
        else:
            candidates[name] = (library, inputs)
    results = _time(device, candidates, settings)
    if reference is None:
        return {name: Measured(result) for name, result in results.items()}
    return {
        name: Measured(result, latency_ratio(result, results[reference])) for name, result in results.items()
    }


def _time(
    device: Device | Session, candidates: Mapping[str, Candidate], settings: MeasurementSettings | None
) -> dict[str, LatencyResult]:
    if isinstance(device, Session):
        if settings is not None and settings != device.settings:
            raise SettingError("An open session has settings of its own.", "Give the device instead.")
        return device.time_many(candidates)
    with device.open(settings) as session:
        return session.time_many(candidates)


def latency_ratio(result: LatencyResult, reference: LatencyResult) -> float | None:
    """Latency of one result over that of another, from one interleaved run.

    It is the median over the rounds of the ratio within each round: what slows a whole round down cancels.

    Raises
    ------
    SettingError
        The units differ.
    """
    if result.unit != reference.unit:
        raise SettingError(f"A latency in {result.unit} has no ratio to one in {reference.unit}.")
    if not result.ok or not reference.ok:
        return None
    if len(result.samples) != len(reference.samples):
        return result.value / reference.value
    return float(np.median(np.divide(result.samples, reference.samples)))
