"""What a device is: open a session, run a library, time it; a failed measurement is a value."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tvm_compress.errors import DeviceError, SettingError

Unit = Literal["seconds", "estimated_cycles"]
ErrorKind = Literal["build", "timeout", "crash", "connection", "unsupported"]
#: Why no further sample was taken: there were `repeat`, or the spread was small, or there were `max_repeat`.
StoppedBy = Literal["repeat", "spread", "limit"]
#: Arguments of a kernel in destination-passing style: (shape, dtype) each, outputs last.
ArgumentSpecs = Sequence[tuple[Sequence[int], str]]
#: What is measured: the path of an exported library and the inputs of its `main`.
Candidate = tuple[Path, Sequence[np.ndarray]]

UNITS: tuple[Unit, ...] = ("seconds", "estimated_cycles")
STOPPED_BY: tuple[StoppedBy, ...] = ("repeat", "spread", "limit")
#: Bytes that a flush of the caches may walk: less flushes nothing, more is no cache's size.
LEAST_FLUSH, MOST_FLUSH = 1 << 16, 1 << 30
ERROR_KINDS: tuple[ErrorKind, ...] = ("build", "timeout", "crash", "connection", "unsupported")


@dataclass(frozen=True)
class MeasurementSettings:
    """How a latency is taken; part of every result.

    Parameters
    ----------
    warmup
        Untimed calls before the first sample.
    number
        Calls per sample; the sample is their mean.
    repeat
        Samples; the reported value is their median. With `max_spread`, the least number of them.
    min_repeat_ms
        `number` is raised until one sample takes at least as long; not with `cache_flush`.
    cooldown_ms
        Pause after each sample.
    timeout_s
        Limit of any single call to the device, such as loading a library or taking one sample.
    threads
        Threads of TVM's pool on the device.
    cache_flush
        Whether the caches are flushed before every single call, by walking through a buffer on the device:
        True for one that is larger than its last cache, or the buffer's bytes. Each of the `number` calls of
        a sample is then timed alone. Caches that other cores have to themselves may stay warm.
    max_spread
        None, or the spread (median absolute deviation over median) that suffices: until every candidate's is
        at or below it, further rounds of samples follow the first `repeat`.
    max_repeat
        The most samples that `max_spread` may lead to.
    """

    warmup: int = 1
    number: int = 1
    repeat: int = 10
    min_repeat_ms: float = 20.0
    cooldown_ms: float = 0.0
    timeout_s: float = 60.0
    threads: int = 1
    cache_flush: bool | int = False
    max_spread: float | None = None
    max_repeat: int = 100

    def __post_init__(self) -> None:
        for name, lowest in (("warmup", 0), ("number", 1), ("repeat", 1), ("threads", 1), ("max_repeat", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise SettingError(f"`{name}` must be an integer of at least {lowest}, not {value!r}.")
        for name in ("min_repeat_ms", "cooldown_ms"):
            if not 0 <= getattr(self, name) < math.inf:
                raise SettingError(f"`{name}` must be 0 or more, not {getattr(self, name)!r}.")
        if not 0 < self.timeout_s < math.inf:
            raise SettingError(f"`timeout_s` must be more than 0, not {self.timeout_s!r}.")
        self._check_flush()
        self._check_spread()

    def _check_flush(self) -> None:
        flush = self.cache_flush
        if isinstance(flush, bool) or (isinstance(flush, int) and LEAST_FLUSH <= flush <= MOST_FLUSH):
            return
        raise SettingError(
            f"`cache_flush` must be True, False or bytes from {LEAST_FLUSH} to {MOST_FLUSH}, not {flush!r}."
        )

    def _check_spread(self) -> None:
        if self.max_spread is None:
            return
        if not 0 < self.max_spread < 1:
            raise SettingError(
                f"`max_spread` must be between 0 and 1, such as 0.02, or None, not {self.max_spread!r}."
            )
        if self.max_repeat < self.repeat:
            raise SettingError(
                f"`max_repeat` must be at least `repeat` ({self.repeat}), not {self.max_repeat}.",
                "Raise it, or lower `repeat`.",
            )

    def to_dict(self) -> dict[str, Any]:
        """Give the settings as plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MeasurementSettings:
        """Read what `to_dict` gave; raises SettingError for unknown keys and impossible values."""
        _reject_unknown(cls, values)
        return cls(**values)


@dataclass(frozen=True)
class LatencyResult:
    """One measurement.

    Parameters
    ----------
    value
        Median over the samples; NaN where the measurement failed.
    unit
        "seconds" (a host or a board) or "estimated_cycles" (the emulated Cortex-A72): they never mix.
    samples
        One figure per repeat.
    spread
        Median absolute deviation of the samples from their median.
    settings
        How the samples were taken.
    kernels
        The part of the value spent in each kernel, by the name of its function, where it is known.
    counters
        Whatever else the device counted, such as "instructions"; of a clock, "calls_per_sample" and, where
        caches were flushed, "cache_flush_bytes".
    breakdown
        By kernel, what its part of the value is made of, by name, where it is known.
    error
        None, or (kind, text) of the failure; the text says what happened, in words for a person.
    stopped_by
        Why no further samples were taken, one of STOPPED_BY; None where the measurement failed.
    health
        What was read of the device "before" and "after" (see `Session.health`), and "warnings", a text each;
        empty where nothing was read.
    """

    value: float
    unit: Unit
    samples: tuple[float, ...]
    spread: float
    settings: MeasurementSettings
    kernels: dict[str, float] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    breakdown: dict[str, dict[str, float]] = field(default_factory=dict)
    error: tuple[ErrorKind, str] | None = None
    stopped_by: StoppedBy | None = "repeat"
    health: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the measurement succeeded."""
        return self.error is None

    @classmethod
    def from_samples(
        cls,
        samples: Sequence[float],
        unit: Unit,
        settings: MeasurementSettings,
        kernels: Mapping[str, float] | None = None,
        counters: Mapping[str, float] | None = None,
        stopped_by: StoppedBy = "repeat",
    ) -> LatencyResult:
        """Summarise at least one sample by its median and its median absolute deviation."""
        median, spread = median_and_spread(samples)
        return cls(
            median,
            unit,
            tuple(float(s) for s in samples),
            spread,
            settings,
            dict(kernels or {}),
            dict(counters or {}),
            stopped_by=stopped_by,
        )

    @classmethod
    def failed(cls, kind: ErrorKind, text: str, unit: Unit, settings: MeasurementSettings) -> LatencyResult:
        """Give the value of a measurement that failed."""
        return cls(math.nan, unit, (), math.nan, settings, error=(kind, text), stopped_by=None)

    def to_dict(self) -> dict[str, Any]:
        """Give the result as plain JSON values; NaN becomes null."""
        values = dataclasses.asdict(self)
        values["value"] = None if math.isnan(self.value) else self.value
        values["spread"] = None if math.isnan(self.spread) else self.spread
        values["samples"] = list(self.samples)
        values["error"] = list(self.error) if self.error else None
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LatencyResult:
        """Read what `to_dict` gave, also that of earlier releases, which had no `stopped_by` and `health`.

        Raises
        ------
        SettingError
            A key, a unit, an error kind or a reason to stop is unknown.
        """
        _reject_unknown(cls, values)
        unit, error = values["unit"], values.get("error")
        stopped_by = values.get("stopped_by", "repeat" if error is None else None)
        if unit not in UNITS:
            raise SettingError(f"The unit of a latency is one of {', '.join(UNITS)}, not {unit!r}.")
        if error is not None and error[0] not in ERROR_KINDS:
            raise SettingError(f"A measurement fails by one of {', '.join(ERROR_KINDS)}, not {error[0]!r}.")
        if stopped_by is not None and stopped_by not in STOPPED_BY:
            raise SettingError(f"A measurement stops by one of {', '.join(STOPPED_BY)}, not {stopped_by!r}.")
        return cls(
            value=math.nan if values["value"] is None else float(values["value"]),
            unit=unit,
            samples=tuple(values["samples"]),
            spread=math.nan if values["spread"] is None else float(values["spread"]),
            settings=MeasurementSettings.from_dict(values["settings"]),
            kernels=dict(values.get("kernels", {})),
            counters=dict(values.get("counters", {})),
            # Not in the rows of earlier releases.
            breakdown={name: dict(part) for name, part in values.get("breakdown", {}).items()},
            error=None if error is None else (error[0], error[1]),
            stopped_by=stopped_by,
            health=dict(values.get("health", {})),
        )


def median_and_spread(samples: Sequence[float]) -> tuple[float, float]:
    """Median of at least one sample, and the median absolute deviation from it."""
    median = float(np.median(samples))
    return median, float(np.median(np.abs(np.asarray(samples) - median)))


class DeviceFailedError(DeviceError):
    """A device call that failed; `kind` is the error kind that a measurement would report."""

    def __init__(self, kind: ErrorKind, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.kind: ErrorKind = kind


class Session(ABC):
    """A device in use; a context manager. After any failure the session can be used again."""

    def __init__(self, settings: MeasurementSettings) -> None:
        self.settings = settings

    def run(self, library: Path, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Call `main` of an exported library once.

        Parameters
        ----------
        library
            A shared library from `relax.build(...).export_library(path)`, for this device's processor.
        inputs
            The arguments of `main`, shapes and dtypes as compiled.

        Returns
        -------
        The outputs, one array per field where `main` gives a tuple.

        Raises
        ------
        DeviceError
            The library cannot be loaded, fails, crashes, or takes longer than `settings.timeout_s`.
        """
        return self.run_many(library, [inputs])[0]

    @abstractmethod
    def run_many(self, library: Path, batches: Sequence[Sequence[np.ndarray]]) -> list[list[np.ndarray]]:
        """Call `main` once per element of `batches`, loading the library once; else as `run`."""

    def time(self, library: Path, inputs: Sequence[np.ndarray]) -> LatencyResult:
        """Measure `main` of an exported library; a failure is in the result's `error`."""
        return self.time_many({"": (library, inputs)})[""]

    @abstractmethod
    def time_many(self, candidates: Mapping[str, Candidate]) -> dict[str, LatencyResult]:
        """Measure several libraries, interleaved: all have as many samples, unless they fail.

        Every round takes one sample of each candidate, so that a drift of clock or temperature meets all of
        them alike and cancels in their ratios; sample i of every result is of round i.
        """

    @abstractmethod
    def time_kernels(
        self, library: Path, kernels: Mapping[str, ArgumentSpecs], passes: int = 1
    ) -> dict[str, LatencyResult]:
        """Measure functions of a library, each alone.

        Parameters
        ----------
        library
            A shared library that holds TIR functions, from `tvm.compile` or `relax.build`.
        kernels
            By function name, the shape and dtype of each argument in destination-passing style, outputs
            last. Arguments are filled with small values.
        passes
            How often a clock times all of them in turn: of each kernel's results the fastest counts, a
            failure ends its passes. Where nothing drifts, one pass is enough.
        """

    def health(self) -> dict[str, Any]:
        """What the device tells of its own state now, as plain JSON values; never raises.

        Returns
        -------
        Whatever can be read of "clock_mhz", "max_clock_mhz", "governor", "temperature_c", "throttled" (a list
        of what holds the clock back) and "load_average"; empty where nothing can.
        """
        return {}

    @abstractmethod
    def close(self) -> None:
        """End the session and every process of it; further calls of `close` do nothing."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class LastCache:
    """The last cache before a device's memory, and what is not in it.

    Attributes
    ----------
    size
        In bytes.
    time_per_byte
        What reading a byte from memory takes, in the device's unit.
    """

    size: int
    time_per_byte: float


class Device(ABC):
    """A machine, or the emulation of one, that runs and times libraries."""

    #: The name that `open_device` knows it by.
    name: str
    #: What its latencies are counted in.
    unit: Unit
    #: The LLVM triple of the libraries that it runs, or "" for the host's own.
    target_triple: str = ""
    #: How its unit is defined, where that may change: figures of two definitions are not compared.
    definition: str = ""
    #: Where it is known.
    last_cache: LastCache | None = None

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads

    @property
    def stored_as(self) -> str:
        """Name that its figures are kept under."""
        return f"{self.name} {self.definition}".rstrip()

    @abstractmethod
    def open(self, settings: MeasurementSettings | None = None) -> Session:
        """Start a session; without settings, the defaults with this device's threads.

        Raises
        ------
        DeviceError
            Something that the device needs is missing, or it does not answer.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Say what is measured and where, as plain JSON values: the provenance of a figure."""

    def _settings(self, settings: MeasurementSettings | None) -> MeasurementSettings:
        return settings if settings is not None else MeasurementSettings(threads=self.threads)


def open_device(name: str, threads: int = 1) -> Device:
    """Give the device of that name: "local", "emulated-a72", "tracker://HOST:PORT/KEY" or "ssh://USER@HOST".

    Raises
    ------
    DeviceError
        No device has that name.
    """
    # The devices import this module, so they are imported where they are made.
    if name == "local":
        from tvm_compress.rpc.local import LocalDevice

        return LocalDevice(threads)
    if name == "emulated-a72":
        from tvm_compress.rpc.emulated_a72 import EmulatedA72

        return EmulatedA72(threads)
    if name.startswith("tracker:"):
        from tvm_compress.rpc.address import Tracker
        from tvm_compress.rpc.tracker import TrackerDevice

        return TrackerDevice(Tracker.parse(name), threads)
    if name.startswith("ssh:"):
        from tvm_compress.rpc.address import SshAddress
        from tvm_compress.rpc.ssh import SshDevice

        return SshDevice(SshAddress.parse(name), threads)
    raise DeviceError(
        f"No device is called {name!r}.",
        "Use `local`, `emulated-a72`, tracker://HOST:PORT/KEY or ssh://USER@HOST.",
    )


def _reject_unknown(cls: type, values: Mapping[str, Any]) -> None:
    unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
    if unknown:
        raise SettingError(f"A {cls.__name__} has no field {', '.join(map(repr, unknown))}.")
