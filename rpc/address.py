"""Where boards are to be found."""

from __future__ import annotations

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
