"""A board that is reached by SSH, as a device: nothing of ours has to be installed or to run on it."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

import tvm
import tvm_ffi

from tvm_compress.errors import DeviceError
from tvm_compress.rpc.address import SshAddress
from tvm_compress.rpc.device import Device, DeviceFailedError, MeasurementSettings, Session
from tvm_compress.rpc.local import LocalSession
from tvm_compress.rpc.ssh_relay import ANSWER_LIMIT, ssh_command
from tvm_compress.rpc.worker import Worker

#: Seconds after which a board ends a session, so that a connection that hangs cannot hold it for ever.
SESSION_LIMIT = 4 * 3600.0
#: Seconds beyond the board's own limit that the connection to it gets.
_MARGIN = 30.0
#: What the board tells of itself that belongs to a figure's provenance.
_TOLD = ("processor", "machine", "system", "python")


class SshDevice(Device):
    """A board that its user can log in to by a key; each worker has a connection of its own.

    Raises
    ------
    DeviceError
        `ssh` is not installed.
    """

    unit = "seconds"

    def __init__(self, address: SshAddress, threads: int = 1) -> None:
        super().__init__(threads)
        self.name = str(address)
        self.address = address
        self._about: dict[str, Any] = {}
        command = ssh_command()[0]
        if shutil.which(command) is None:
            raise DeviceError(
                f"{self.name} needs `{command}`, which is not installed.",
                "Install it by `sudo apt-get install openssh-client`.",
            )

    def open(self, settings: MeasurementSettings | None = None) -> Session:
        """See `Device.open`; DeviceError says what the login or the board lacks, and how to mend it."""
        chosen = self._settings(settings)
        return SshSession(chosen, lambda: self.start(chosen.threads))

    def describe(self) -> dict[str, Any]:
        """Name the board and its system, which it is asked for where no session was open yet."""
        if not self._about:
            self.start(self.threads).close()
        return {
            "device": self.name,
            "unit": self.unit,
            **{key: self._about[key] for key in _TOLD},
            "threads": self.threads,
            "tvm": tvm.__version__,
            "tvm_ffi": tvm_ffi.__version__,
        }

    def start(self, threads: int) -> Worker:
        """Start a worker on the board; DeviceFailedError of kind "connection" where that cannot be."""
        command = [sys.executable, "-P", "-m", "tvm_compress.rpc.ssh_relay"]
        command += [str(self.address), str(threads), str(SESSION_LIMIT)]
        try:
            worker = Worker(lambda _: command, os.environ, ANSWER_LIMIT + _MARGIN, relay=True)
        except DeviceFailedError as error:
            raise DeviceFailedError("connection", error.message, error.hint) from None
        self._about = worker.about
        return worker


class SshSession(LocalSession):
    """Times each candidate in a worker of its own on the board, as on this machine."""
