"""Where boards are to be found."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tvm_compress.errors import DeviceError


@dataclass(frozen=True)
class Tracker:
    """Where boards are announced: address and the key of their kind."""

    host: str
    port: int
    key: str

    @classmethod
    def parse(cls, text: str) -> Tracker:
        """Read "HOST:PORT/KEY" ("tracker://" may stand before it).

        Raises
        ------
        DeviceError
            If it has another form.
        """
        address, _, key = text.removeprefix("tracker://").partition("/")
        host, _, port = address.rpartition(":")
        if not host or not key or not port.isdecimal() or not 0 < int(port) < 65536:
            raise DeviceError(
                f"{text!r} names no tracker.",
                "Give tracker://HOST:PORT/KEY, such as tracker://pi-hub:9190/rpi4.",
            )
        return cls(host, int(port), key)

    def __str__(self) -> str:
        return f"tracker://{self.host}:{self.port}/{self.key}"


@dataclass(frozen=True)
class SshAddress:
    """A board that is reached by SSH.

    Parameters
    ----------
    login
        "USER@HOST", or "HOST" where SSH's own settings name the user.
    port
        Of its SSH server; None is for SSH's own settings to say.
    python
        The board's Python that has TVM.
    """

    login: str
    port: int | None = None
    python: str = "python3"

    @classmethod
    def parse(cls, text: str) -> SshAddress:
        """Read "ssh://[USER@]HOST[:PORT][/PATH/OF/PYTHON]".

        Raises
        ------
        DeviceError
            If it has another form.
        """
        match = re.fullmatch(
            r"ssh://((?:[\w.-]+@)?(?:[\w.-]+|\[[\w:.%]+\]))(?::(\d+))?(/[^\s]+)?/?", text, re.A
        )
        if match is None or "-" in (match[1][0], match[1].rpartition("@")[2][0]):
            raise DeviceError(
                f"{text!r} names no board.",
                "Give ssh://USER@HOST, ssh://USER@HOST:PORT or ssh://USER@HOST/PATH/OF/PYTHON, "
                "such as ssh://pi@raspberrypi.",
            )
        port = int(match[2]) if match[2] else None
        if port is not None and not 0 < port < 65536:
            raise DeviceError(f"{text!r} names the port {port}, which is none.", "Ports are 1 to 65535.")
        return cls(match[1].replace("[", "").replace("]", ""), port, match[3] or "python3")

    def options(self) -> list[str]:
        """Options of `ssh` that lead to it."""
        return [] if self.port is None else ["-p", str(self.port)]

    def __str__(self) -> str:
        user, at, host = self.login.rpartition("@")
        place = f"{user}{at}[{host}]" if ":" in host else self.login
        port = "" if self.port is None else f":{self.port}"
        return f"ssh://{place}{port}{self.python if self.python != 'python3' else ''}"
