"""A board reached by SSH: a real sshd on loopback. What every device must do is in test_sessions."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.rpc.conftest import QUICK, SshServer
from tvm_compress.cli.main import main
from tvm_compress.errors import DeviceError
from tvm_compress.rpc.address import SshAddress
from tvm_compress.rpc.device import DeviceFailedError, MeasurementSettings, open_device
from tvm_compress.rpc.worker import Worker

X = [np.ones((2, 8), "float32"), np.ones((8, 4), "float32")]
END_LIMIT_S = 20.0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ends(pid: int) -> bool:
    deadline = time.monotonic() + END_LIMIT_S
    while time.monotonic() < deadline:
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False


def refusal(address: str) -> str:
    """What opening a session says."""
    with pytest.raises(DeviceError) as failure:
        open_device(address).open(QUICK)
    return str(failure.value)


@pytest.mark.parametrize("how", ["close", "hang"])
def test_the_program_on_the_board_ends_with_the_session(
    ssh_server: SshServer, build: Callable[[str, str], Path], how: str
) -> None:
    session = open_device(ssh_server.address()).open(MeasurementSettings(timeout_s=2.0))
    worker = session._worker  # type: ignore[attr-defined]
    program = worker.about["pid"]
    (serving,) = children(program)
    files = Path(os.readlink(f"/proc/{serving}/cwd"))
    assert worker._process.pid != program
    if how == "hang":
        with pytest.raises(DeviceError, match="within 2 s"):
            session.run(build("hang", "local"), [np.ones(1, "float32")])
    session.close()
    assert ends(program)
    assert ends(serving)
    assert not files.exists()


def _ask_for_long(worker: Worker) -> None:
    for _ in range(50):
        worker.call("Asking", 5.0, worker.remote.get_function, "runtime.NumThreads")
        time.sleep(0.1)


def test_a_connection_that_breaks_is_told_and_made_anew(
    ssh_server: SshServer, build: Callable[[str, str], Path]
) -> None:
    with open_device(ssh_server.address()).open(QUICK) as session:
        worker = session._worker  # type: ignore[attr-defined]
        (ssh,) = children(worker._process.pid)
        os.kill(ssh, signal.SIGKILL)
        with pytest.raises(DeviceFailedError, match=r"the connection to the board ssh://.* broke") as failure:
            _ask_for_long(worker)
        assert failure.value.kind == "connection"
        (out,) = session.run(build("layers", "local"), X)
        np.testing.assert_allclose(out, np.full((2, 4), 8.0))


def test_a_board_that_freezes_is_given_up(ssh_server: SshServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TVM_COMPRESS_SSH", f"{ssh_server.client()} -o ServerAliveInterval=1")
    with open_device(ssh_server.address()).open(QUICK) as session:
        worker = session._worker  # type: ignore[attr-defined]
        (server,) = [
            int(line.split()[1])
            for line in Path(f"/proc/{worker.about['pid']}/status").read_text().splitlines()
            if line.startswith("PPid:")
        ]
        os.kill(server, signal.SIGSTOP)
        try:
            with pytest.raises(DeviceFailedError, match=r"broke\. ssh said: Timeout, server") as failure:
                worker.call("Asking", 20.0, worker.remote.get_function, "runtime.NumThreads")
            assert failure.value.kind == "connection"
        finally:
            os.kill(server, signal.SIGKILL)


def test_what_login_scripts_print_is_skipped(
    ssh_server: SshServer, build: Callable[[str, str], Path], tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho Welcome to this board\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with open_device(ssh_server.address(python)).open(QUICK) as session:
        (out,) = session.run(build("layers", "local"), X)
        np.testing.assert_allclose(out, np.full((2, 4), 8.0))


def test_a_login_that_is_refused_names_the_command(
    ssh_server: SshServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVM_COMPRESS_SSH", ssh_server.client(identity="other_key"))
    said = refusal(ssh_server.address())
    assert "refused the login" in said
    assert f"`ssh-copy-id -p {ssh_server.port} {ssh_server.user}@127.0.0.1`" in said


def test_a_board_that_is_not_known_names_the_command(
    ssh_server: SshServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TVM_COMPRESS_SSH", ssh_server.client(known="nobody"))
    said = refusal(ssh_server.address())
    assert "is not known yet" in said
    assert f"Connect once by `ssh -p {ssh_server.port} {ssh_server.user}@127.0.0.1`" in said


def test_a_board_without_an_ssh_server(ssh_server: SshServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    said = refusal(f"ssh://{ssh_server.user}@127.0.0.1:{port}")
    assert "takes no SSH connections" in said
    assert "systemctl enable --now ssh" in said


def test_a_board_that_says_nothing_is_given_up(
    ssh_server: SshServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first of two options is the one that ssh takes; ours is 10 s.
    monkeypatch.setenv("TVM_COMPRESS_SSH", f"{ssh_server.client()} -o ConnectTimeout=1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        said = refusal(f"ssh://{ssh_server.user}@127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - begin < 10
    assert "is not reachable" in said


def test_a_board_without_that_python(ssh_server: SshServer) -> None:
    said = refusal(ssh_server.address("/nowhere/python"))
    assert "has no `/nowhere/python`" in said
    assert "ssh://USER@HOST/home/USER/venv/bin/python" in said


def test_a_board_without_tvm_or_with_another_says_what_to_install(
    ssh_server: SshServer, tmp_path: Path
) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = tmp_path / "bare/bin/python"
    said = refusal(ssh_server.address(python))
    assert "has no TVM" in said
    assert f"`{python} -m pip install apache-tvm==" in said
    (packages,) = (tmp_path / "bare/lib").glob("python*/site-packages")
    (packages / "apache_tvm-0.1.dist-info").mkdir()
    (packages / "apache_tvm-0.1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: apache-tvm\nVersion: 0.1\n"
    )
    assert "has apache-tvm 0.1 for" in refusal(ssh_server.address(python))


def test_a_machine_without_ssh_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TVM_COMPRESS_SSH", raising=False)
    with pytest.raises(DeviceError, match="apt-get install openssh-client"):
        open_device("ssh://pi@raspberrypi")


@pytest.mark.parametrize(
    ("text", "login", "port", "python"),
    [
        ("ssh://pi@raspberrypi", "pi@raspberrypi", None, "python3"),
        ("ssh://board:2222", "board", 2222, "python3"),
        ("ssh://pi@[fe80::1]:22/home/pi/v/bin/python", "pi@fe80::1", 22, "/home/pi/v/bin/python"),
    ],
)
def test_addresses(text: str, login: str, port: int | None, python: str) -> None:
    address = SshAddress.parse(text)
    assert address == SshAddress(login, port, python)
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "ssh://",
        "ssh:pi@board",
        "ssh://-oProxyCommand=x",
        "ssh://a@-b",
        "ssh://pi@h:0",
        "ssh://pi@h:x",
        "ssh://a b",
    ],
)
def test_addresses_that_name_no_board(text: str) -> None:
    with pytest.raises(DeviceError, match=r"names no board|names the port"):
        open_device(text)


def test_device_check_over_ssh(ssh_server: SshServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["device", "check", ssh_server.address(), "--target", "host", "--json"]) == 0, (
        capsys.readouterr()
    )
    found = json.loads(capsys.readouterr().out)
    assert found["unit"] == "seconds"
    assert found["largest_difference"] < 1e-3
    assert found["device"]["device"] == ssh_server.address()
    assert found["device"]["system"]
