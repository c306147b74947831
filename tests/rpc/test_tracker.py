"""Boards at a real tracker on loopback: taken, lost, blamed, set aside; and `tvm-compress device`."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.rpc.conftest import QUICK, Board, emulated_boards
from tvm_compress.cli.main import main
from tvm_compress.errors import DeviceError
from tvm_compress.rpc.address import Tracker
from tvm_compress.rpc.device import MeasurementSettings, open_device
from tvm_compress.rpc.relay import boards
from tvm_compress.rpc.tracker import MOST_BLAMES, TrackerDevice, TrackerSession

X = [np.ones((2, 8), "float32"), np.ones((8, 4), "float32")]


@pytest.fixture
def library(build: Callable[[str, str], Path]) -> Path:
    return build("layers", "emulated-a72")


@pytest.fixture(scope="module")
def alone(tracker: Tracker) -> Iterator[Tracker]:
    """A single board of a key of its own."""
    mine = Tracker(tracker.host, tracker.port, "alone")
    with emulated_boards(mine, 1):
        yield mine


def lose(servers: list[Board], session: TrackerSession) -> str:
    """Kill the worker that serves a session, as when its board is unplugged; return the board's address."""
    board = session.board
    (lost,) = [one for one in servers if board.endswith(f":{one.port}")]
    lost.unplug()
    return board


def test_a_board_lost_in_mid_run_is_replaced_by_another(
    two: list[Board], tracker: Tracker, library: Path
) -> None:
    device = TrackerDevice(tracker)
    slow = MeasurementSettings(repeat=8, min_repeat_ms=0.0, cooldown_ms=250.0, timeout_s=20.0)
    with device.open(slow) as session:
        assert isinstance(session, TrackerSession)
        lost: list[str] = []
        killer = threading.Timer(1.0, lambda: lost.append(lose(two, session)))
        killer.start()
        results = session.time_many({"a": (library, X), "b": (library, X)})
        killer.join()
        assert [result.error for result in results.values()] == [None, None]
        assert {len(result.samples) for result in results.values()} == {8}
        assert session.board != lost[0]
    assert device.blames == {lost[0]: 1}


def test_a_board_that_fails_three_times_is_set_aside(
    two: list[Board], tracker: Tracker, library: Path
) -> None:
    device = TrackerDevice(tracker)
    with device.open(QUICK) as session:
        assert isinstance(session, TrackerSession)
        bad = session.board
    device.blame(bad)
    device.blame(bad)
    assert device.describe()["set_aside"] == []
    with pytest.warns(UserWarning, match=f"{bad} .* is set aside"):
        device.blame(bad)
    assert device.describe()["set_aside"] == [bad]
    for _ in range(2):
        with device.open(QUICK) as session:
            assert isinstance(session, TrackerSession)
            assert session.board != bad
            session.run(library, X)
    device.blames = {f"{tracker.host}:{server.port}": MOST_BLAMES for server in two}
    with pytest.raises(DeviceError, match="are set aside"):
        device.open(QUICK)


def test_a_library_that_fails_everywhere_blames_no_board(
    two: list[Board], tracker: Tracker, build: Callable[[str, str], Path]
) -> None:
    device = TrackerDevice(tracker)
    with device.open(QUICK) as session:
        result = session.time(build("segfault", "emulated-a72"), [np.ones(1, "float32")])
    assert result.error is not None
    assert result.error[0] == "crash"
    assert device.blames == {}


def test_a_single_board_survives_what_crashes_it(
    alone: Tracker, library: Path, build: Callable[[str, str], Path]
) -> None:
    with open_device(str(alone)).open(QUICK) as session:
        assert session.time(build("segfault", "emulated-a72"), [np.ones(1, "float32")]).error is not None
        (out,) = session.run(library, X)
        np.testing.assert_allclose(out, np.full((2, 4), 8.0))


def test_a_session_ends_at_the_boards_limit(
    alone: Tracker, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvm_compress.rpc.tracker.SESSION_LIMIT", 2.0)
    with open_device(str(alone)).open(QUICK) as session:
        session.run(library, X)
        worker = session._worker  # type: ignore[attr-defined]
        deadline = time.monotonic() + 15
        while worker.alive and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not worker.alive
        # The next call gets a session of its own.
        session.run(library, X)


def test_no_tracker_says_how_to_start_one() -> None:
    begin = time.monotonic()
    with pytest.raises(DeviceError, match=r"tvm\.exec\.rpc_tracker") as failure:
        open_device("tracker://127.0.0.1:9/pi").open()
    assert time.monotonic() - begin < 15
    assert "127.0.0.1:9" in str(failure.value)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request"], ids=["silent", "other"])
def test_what_is_no_tracker_is_told_within_the_wait(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(answer)
                connection.recv(4)
                ended.wait(20)

        ended = threading.Event()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        begin = time.monotonic()
        with pytest.raises(DeviceError, match=r"(No|no) tracker of TVM.* Start a tracker by") as failure:
            TrackerDevice(Tracker("127.0.0.1", port, "pi"), wait=1.0).open()
        assert time.monotonic() - begin < 10
        assert f"127.0.0.1:{port}" in str(failure.value)
        ended.set()
        thread.join(5)


def test_a_board_of_tvm_itself_does_too(
    tracker: Tracker, build: Callable[[str, str], Path], tmp_path: Path
) -> None:
    mine = Tracker(tracker.host, tracker.port, "plain")
    command = [sys.executable, "-m", "tvm.exec.rpc_server", "--host", "127.0.0.1", "--port", "9190"]
    command += ["--port-end", "9990", "--tracker", f"{mine.host}:{mine.port}", "--key", mine.key, "--silent"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        with TrackerDevice(mine).open(QUICK) as session:
            (out,) = session.run(build("layers", "local"), X)
            np.testing.assert_allclose(out, np.full((2, 4), 8.0))
            shapes = [((2, 8), "float32"), ((8, 4), "float32"), ((2, 4), "float32")]
            assert session.time_kernels(build("layers", "local"), {"matmul": shapes})["matmul"].ok
            with pytest.raises(DeviceError, match="built for aarch64, but the device is"):
                session.run(build("layers", "emulated-a72"), X)
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_no_board_is_told_after_the_wait(tracker: Tracker) -> None:
    other = Tracker(tracker.host, tracker.port, "nobody-has-this-key")
    with pytest.raises(DeviceError, match="No board 'nobody-has-this-key' became free"):
        TrackerDevice(other, wait=1.0).open()


@pytest.mark.parametrize(
    "text", ["tracker://pi", "tracker://:9190/pi", "tracker://h:0/pi", "tracker://h:9190"]
)
def test_addresses_that_name_no_tracker(text: str) -> None:
    with pytest.raises(DeviceError, match="names no tracker"):
        open_device(text)


def test_device_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["device", "list", "--json"]) == 0
    devices = json.loads(capsys.readouterr().out)["devices"]
    assert {name.split(":")[0] for name in devices} == {"local", "emulated-a72", "tracker", "ssh"}


@pytest.mark.parametrize("device", ["local", "emulated-a72"])
def test_device_check(capsys: pytest.CaptureFixture[str], device: str) -> None:
    assert main(["device", "check", device, "--json"]) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert found["latency"] > 0
    assert 0.3 < found["ratio_to_itself"] < 3
    assert found["largest_difference"] < 1e-3


def test_serve_and_check_as_on_a_board(capsys: pytest.CaptureFixture[str], tracker: Tracker) -> None:
    mine = Tracker(tracker.host, tracker.port, "this-machine")
    command = [sys.executable, "-c", "from tvm_compress.cli.main import entry; entry()"]
    # Started as by a script, in the background, where interrupts are ignored at first.
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
    command += ["device", "serve", str(mine), "--host", "127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            deadline = time.monotonic() + 60
            while not boards(mine.host, mine.port, mine.key) and time.monotonic() < deadline:
                time.sleep(0.1)
            for _ in range(2):
                assert main(["device", "check", str(mine), "--target", "host", "--json"]) == 0
                assert json.loads(capsys.readouterr().out)["unit"] == "seconds"
        finally:
            server.send_signal(signal.SIGINT)
            try:
                said, _ = server.communicate(timeout=30)
            finally:
                # Or the end of the block would wait for ever.
                server.kill()
    assert server.returncode == 130
    # It was free again after the first check, or there could have been no second.
    assert said.count("announced as 'this-machine'") >= 2
    assert "session: ended" in said
