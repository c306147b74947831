"""What a board tells of its state is read over RPC, understood, and warned of once."""

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_compress.rpc import serve_local
from tvm_compress.rpc.device import LatencyResult, MeasurementSettings, open_device
from tvm_compress.rpc.health import HealthWarning, describe_health, find_problems, parse_health, warn_once
from tvm_compress.rpc.local import worker_command
from tvm_compress.rpc.worker import Worker

POLICY = "/sys/devices/system/cpu/cpufreq/policy0"
ZONE = "/sys/class/thermal/thermal_zone0"
THROTTLED = "/sys/devices/platform/soc/soc:firmware/get_throttled"
# A Raspberry Pi 4 with Raspberry Pi OS, at rest.
PI_AT_REST = {
    "/proc/loadavg": "0.08 0.03 0.01 1/187 2113\n",
    f"{POLICY}/scaling_cur_freq": "600000\n",
    f"{POLICY}/cpuinfo_max_freq": "1800000\n",
    f"{POLICY}/scaling_governor": "ondemand\n",
    f"{ZONE}/type": "cpu-thermal\n",
    f"{ZONE}/temp": "48199\n",
    THROTTLED: "0\n",
}
FIXED = {f"{POLICY}/scaling_cur_freq": "1800000\n", f"{POLICY}/scaling_governor": "performance\n"}


def pi(**changes: str) -> dict[str, Any]:
    """Health of a Pi with a fixed clock, but for some files."""
    names = {"temp": f"{ZONE}/temp", "throttled": THROTTLED, "clock": f"{POLICY}/scaling_cur_freq"}
    return parse_health(PI_AT_REST | FIXED | {names[name]: text for name, text in changes.items()})


def test_a_raspberry_pi_is_understood():
    health = parse_health(PI_AT_REST)
    assert health == {
        "clock_mhz": 600.0,
        "max_clock_mhz": 1800.0,
        "governor": "ondemand",
        "temperature_c": 48.199,
        "throttled": [],
        "load_average": 0.08,
    }
    assert describe_health(health) == "600 of 1800 MHz, governor ondemand, 48.2 °C, load 0.08"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50005\n", ["under-voltage", "throttled", "under-voltage since boot", "throttled since boot"]),
        ("throttled=0x20002\n", ["clock capped", "clock capped since boot"]),
        ("80008", ["soft temperature limit", "soft temperature limit since boot"]),
        ("throttled=0x0\n", []),
    ],
)
def test_throttling_is_named_from_the_file_and_the_command(text, expected):
    assert parse_health({THROTTLED: text}) == {"throttled": expected}


def test_what_is_missing_or_strange_is_left_out():
    assert parse_health({}) == {}
    strange = {
        "/proc/loadavg": "",
        f"{POLICY}/scaling_cur_freq": "<unknown>\n",
        f"{POLICY}/scaling_governor": "\n",
        f"{ZONE}/temp": "hot\n",
        THROTTLED: "VCHI initialization failed\n",
    }
    assert parse_health(strange) == {}
    assert describe_health({}) == ""


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(max_size=12), min_size=len(PI_AT_REST), max_size=len(PI_AT_REST)))
def test_no_text_breaks_it(texts):
    health = parse_health(dict(zip(PI_AT_REST, texts, strict=True)))
    json.dumps(health, allow_nan=False)
    find_problems(health, health)
    describe_health(health)


def test_a_pc_is_understood():
    pc = {
        "/proc/cpuinfo": "processor\t: 0\ncpu MHz\t\t: 2445.430\n\nprocessor\t: 1\ncpu MHz\t\t: 2600.0\n",
        "/sys/class/thermal/thermal_zone0/type": "acpitz\n",
        "/sys/class/thermal/thermal_zone0/temp": "90000\n",
        "/sys/class/thermal/thermal_zone1/type": "x86_pkg_temp\n",
        "/sys/class/thermal/thermal_zone1/temp": "61000\n",
    }
    assert parse_health(pc) == {"clock_mhz": 2600.0, "temperature_c": 61.0}


def test_several_clocks_count_by_the_fastest():
    small = {path.replace("policy0", "policy4"): text for path, text in PI_AT_REST.items() if POLICY in path}
    health = parse_health(PI_AT_REST | FIXED | small)
    assert (health["clock_mhz"], health["governor"]) == (1800.0, "ondemand, performance")


def test_a_board_that_is_well_gives_no_warning():
    assert find_problems(pi(), pi(temp="79900", clock="1795000")) == {}
    # What happened before the measurement did not disturb it.
    assert find_problems(pi(throttled="50000"), pi(throttled="50000")) == {}
    assert find_problems({}, {}) == {}


@pytest.mark.parametrize(
    ("before", "after", "cause", "words"),
    [
        (parse_health(PI_AT_REST), pi(), "governor", ("ondemand", "600 of 1800", "echo performance")),
        (pi(), pi(throttled="4"), "throttled", ("throttled", "fan")),
        (pi(throttled="50000"), pi(throttled="70000"), "throttled", ("clock capped",)),
        (pi(), pi(temp="80000"), "temperature", ("80 °C", "Cool it")),
        (pi(), pi(clock="1700000"), "clock", ("1800 to 1700", "ratios")),
    ],
)
def test_each_cause_is_told_with_what_to_do(before, after, cause, words):
    problems = find_problems(before, after)
    assert cause in problems
    for word in words:
        assert word in problems[cause]


def test_each_cause_is_told_once():
    told: set[str] = set()
    with pytest.warns(HealthWarning, match="pi: hot"):
        warn_once({"temperature": "hot"}, told, "pi")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_once({"temperature": "hotter"}, told, "pi")
    with pytest.warns(HealthWarning, match="pi: slow"):
        warn_once({"temperature": "hot", "clock": "slow"}, told, "pi")


def test_the_local_machine_tells_its_state_quickly():
    with open_device("local").open() as session:
        health = session.health()
        assert health["load_average"] >= 0
        taken = []
        for _ in range(20):
            began = time.perf_counter()
            session.health()
            taken.append(time.perf_counter() - began)
        assert min(taken) < 0.005


def test_a_worker_that_cannot_tell_says_nothing():
    with open_device("emulated-a72").open() as session:
        assert session.health() == {}


@pytest.fixture
def board(tmp_path: Path):
    """A session with a worker whose system has the files of a Raspberry Pi."""
    root = tmp_path / "root"
    for path, text in PI_AT_REST.items():
        file = root / path.removeprefix("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    script = tmp_path / "serve.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(serve_local.__file__).parent)!r})\n"
        "import serve_local\n"
        f"serve_local.ROOT = {str(root) + '/'!r}\n"
        "serve_local.main(sys.argv[1:])\n"
    )
    command, environment = worker_command(1)
    command[command.index(serve_local.__file__)] = str(script)
    with open_device("local").open(MeasurementSettings(repeat=2, min_repeat_ms=0)) as session:
        session.close()
        vars(session)["_start"] = lambda: Worker(lambda _: [sys.executable, *command[1:]], environment)
        yield session


def test_a_measurement_carries_the_boards_state_and_warns_once(board, build):
    job = {"a": (build("layers", "local"), [np.ones((2, 8), "float32"), np.ones((8, 4), "float32")])}
    expected = parse_health(PI_AT_REST)
    assert board.health() == expected
    with pytest.warns(HealthWarning, match="echo performance") as caught:
        result = board.time_many(job)["a"]
    assert len(caught) == 1
    assert result.error is None
    assert (result.health["before"], result.health["after"]) == (expected, expected)
    assert ["600 of 1800 MHz" in text for text in result.health["warnings"]] == [True]
    assert LatencyResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = board.time_many(job)["a"]
    # The user was told, but each result has it.
    assert again.health["warnings"] == result.health["warnings"]
