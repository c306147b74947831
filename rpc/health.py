"""The state of a Linux machine that figures are taken on: clock, governor, temperature, throttling, load."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tvm_compress.rpc.worker import Worker

#: The worker's function that gives a JSON object: path of a file of the system -> its text.
READER = "tvm_compress.read_machine"
#: Degrees Celsius from which a Raspberry Pi lowers its clock.
HOT = 80.0
#: A clock within this part of another is the same: figures of the system are rounded.
SAME_CLOCK = 0.01
#: Part by which a clock may change from before a measurement to after it.
CLOCK_CHANGE = 0.05
#: Bits of a Raspberry Pi's `get_throttled`; the same, 16 bits further up, have been set since it started.
THROTTLED_BITS = ("under-voltage", "clock capped", "throttled", "soft temperature limit")
SINCE_BOOT = " since boot"
#: Zones of heat that are the processor's, by their types' words.
PROCESSOR_ZONE = re.compile(r"cpu|soc|pkg")


class HealthWarning(UserWarning):
    """A device is in a state in which its figures drift; the text says what to do."""


def read_health(worker: Worker, limit: float) -> dict[str, Any]:
    """State of the machine that a worker runs on; see `Session.health`. Empty for workers that cannot tell.

    Raises
    ------
    DeviceFailedError
        The worker does not answer within `limit` seconds, or it died.
    """

    def ask() -> str:
        try:
            read = worker.remote.get_function(READER)
        except AttributeError:
            return "{}"
        return str(read())

    return parse_health(json.loads(worker.call("Asking for the state of the machine", limit, ask)))


def parse_health(files: Mapping[str, str]) -> dict[str, Any]:
    """Read the texts of a system's files, by their paths; what is missing or strange is left out."""

    def numbers(name: str) -> list[float]:
        texts = [text.strip() for path, text in files.items() if PurePosixPath(path).name == name]
        return [float(text) for text in texts if re.fullmatch(r"-?[0-9]+", text)]

    governors = {t.strip() for path, t in files.items() if path.endswith("scaling_governor")} - {""}
    listed = re.findall(r"^cpu MHz\s*:\s*([0-9.]+)\s*$", files.get("/proc/cpuinfo", ""), re.MULTILINE)
    # The core that works has the highest clock; the others may rest.
    clocks = [khz / 1000 for khz in numbers("scaling_cur_freq")] or [float(mhz) for mhz in listed]
    highest = [khz / 1000 for khz in numbers("cpuinfo_max_freq")]
    load = re.match(r"[0-9]+\.[0-9]+", files.get("/proc/loadavg", ""))
    health: dict[str, Any] = {
        "clock_mhz": max(clocks, default=None),
        "max_clock_mhz": max(highest, default=None),
        "governor": ", ".join(sorted(governors)) or None,
        "temperature_c": _temperature(files),
        "throttled": _throttled(files),
        "load_average": float(load.group()) if load else None,
    }
    return {name: value for name, value in health.items() if value is not None}


def _temperature(files: Mapping[str, str]) -> float | None:
    """Degrees Celsius of the hottest of the processor's zones, or of any where none is called so."""
    zones: dict[str, float] = {}
    for path, text in files.items():
        if path.endswith("/temp") and re.fullmatch(r"-?[0-9]+", text.strip()):
            zones[path] = int(text) / 1000
    kinds = {path: files.get(path.removesuffix("temp") + "type", "") for path in zones}
    processor = [zones[path] for path, kind in kinds.items() if PROCESSOR_ZONE.search(kind.lower())]
    return max(processor or zones.values(), default=None)


def _throttled(files: Mapping[str, str]) -> list[str] | None:
    """What holds a Raspberry Pi's clock back now, or has since it was started; None on other machines."""
    for path, text in files.items():
        # The file holds "50005", the command says "throttled=0x50005".
        found = re.fullmatch(r"(?:throttled=)?(?:0x)?([0-9a-fA-F]+)", text.strip())
        if path.endswith("get_throttled") and found:
            flags = int(found.group(1), 16)
            now = [name for bit, name in enumerate(THROTTLED_BITS) if flags >> bit & 1]
            return now + [n + SINCE_BOOT for bit, n in enumerate(THROTTLED_BITS) if flags >> (16 + bit) & 1]
    return None


def find_problems(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Say what makes figures taken between two readings doubtful.

    Returns
    -------
    By cause ("governor", "throttled", "temperature", "clock"), what is wrong and what to do.
    """
    checks: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], str]] = {
        "governor": _governor_problem,
        "throttled": _throttled_problem,
        "temperature": _temperature_problem,
        "clock": _clock_problem,
    }
    found = {cause: check(before, after) for cause, check in checks.items()}
    return {cause: text for cause, text in found.items() if text}


def _governor_problem(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    for reading in (after, before):
        governor, clock, highest = (reading.get(k) for k in ("governor", "clock_mhz", "max_clock_mhz"))
        if governor in (None, "performance") or clock is None or highest is None:
            continue
        if clock < (1 - SAME_CLOCK) * highest:
            return (
                f"The governor is {governor} and the clock at {clock:.0f} of {highest:.0f} MHz: it follows "
                "the load. Fix it on the device by "
                "`echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor`."
            )
    return ""


def _throttled_problem(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    flags = [set(reading.get("throttled", [])) for reading in (before, after)]
    now = {flag for flag in flags[0] | flags[1] if not flag.endswith(SINCE_BOOT)}
    # What was first seen after the measurement happened during it.
    if before:
        now |= {flag.removesuffix(SINCE_BOOT) for flag in flags[1] - flags[0]}
    if not now:
        return ""
    return (
        f"The board holds its clock back ({', '.join(sorted(now))}): use a supply of 5 V and 3 A or more "
        "with a short cable against under-voltage, a heat sink or a fan against the rest, and measure again."
    )


def _temperature_problem(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    degrees = max(reading.get("temperature_c", -273.0) for reading in (before, after))
    if degrees < HOT:
        return ""
    return (
        f"The processor has {degrees:.0f} °C: from {HOT:.0f} °C on boards lower their clock. Cool it, or let "
        "it rest between samples (`cooldown_ms`)."
    )


def _clock_problem(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    first, last = before.get("clock_mhz"), after.get("clock_mhz")
    if first is None or last is None or abs(last - first) <= CLOCK_CHANGE * first:
        return ""
    return (
        f"The clock changed from {first:.0f} to {last:.0f} MHz during the measurement: compare ratios of "
        "libraries that were timed in turns, not latencies, or fix the clock and measure again."
    )


def warn_once(problems: Mapping[str, str], told: set[str], device: str) -> None:
    """Warn of each cause that was not told yet, and note it."""
    for cause, text in problems.items():
        if cause not in told:
            told.add(cause)
            warnings.warn(f"{device}: {text}", HealthWarning, stacklevel=4)


def describe_health(health: Mapping[str, Any]) -> str:
    """One line for a person on a reading of `Session.health`; empty where nothing was read."""
    words = []
    if "clock_mhz" in health:
        highest = f" of {health['max_clock_mhz']:.0f}" if "max_clock_mhz" in health else ""
        words.append(f"{health['clock_mhz']:.0f}{highest} MHz")
    if "governor" in health:
        words.append(f"governor {health['governor']}")
    if "temperature_c" in health:
        words.append(f"{health['temperature_c']:.1f} °C")
    if health.get("throttled"):
        words.append(f"held back: {', '.join(health['throttled'])}")
    if "load_average" in health:
        words.append(f"load {health['load_average']:.2f}")
    return ", ".join(words)
