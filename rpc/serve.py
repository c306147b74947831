"""A board's side of a tracker: serves one session after the other, whatever the modules do to it.

Each session gets a worker process of its own, started before its client comes (`serve_local` on a board, the
C worker under emulation). What crashes, hangs or runs out of its time ends with that process, and the next
one is announced at the tracker at once.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tvm_compress.rpc.address import Tracker
from tvm_compress.rpc.last_words import chunk, ending
from tvm_compress.rpc.machine import own_machine
from tvm_compress.rpc.relay import LAST_WORDS, MACHINE, hear, open_tracker, pass_on, say, watch
from tvm_compress.rpc.serve_local import MAX_KEY, RPC_MAGIC, RPC_MISMATCH, receive
from tvm_compress.rpc.worker_process import WorkerProcess, how_ended

PUT, UPDATE_INFO, PENDING, SUCCESS = 3, 5, 7, 0
# Seconds between signs of life to the tracker.
PING = 0.5
# After so many seconds a board that was handed out, but whose client did not come, is announced anew.
UNCLAIMED = 3.0
# Seconds that a client gets to greet.
GREETING = 5.0
# A tracker that went away is looked for again after so many seconds, doubling up to the last.
RETRY_FIRST, RETRY_LAST = 0.5, 30.0


@dataclass(frozen=True)
class Client:
    """Who was greeted, and what its greeting asked for.

    Parameters
    ----------
    connection
        To the client.
    limit
        Seconds after which its session ends.
    last_words
        Whether it wants to be told how the session ended.
    """

    connection: socket.socket
    limit: float
    last_words: bool


class BoardServer:
    """Announces this machine at a tracker and serves its clients, one at a time.

    Parameters
    ----------
    start
        Starts a worker process, which then waits for a client on loopback.
    tell
        Is told what happens, a line each.
    host
        Address to listen on; empty for all of this machine's.
    machine
        Processor that the workers run libraries of; this machine's if empty.
    """

    def __init__(
        self,
        tracker: Tracker,
        start: Callable[[], WorkerProcess],
        tell: Callable[[str], None] = lambda line: None,
        host: str = "",
        machine: str = "",
    ) -> None:
        self._tracker, self._start, self._tell = tracker, start, tell
        self._machine = machine or own_machine()
        self._listening = socket.create_server((host, 0), backlog=4)
        self.port: int = self._listening.getsockname()[1]
        self._connection: socket.socket | None = None
        self._stop = threading.Event()

    def stop(self) -> None:
        """Let `run` end; a session that is served ends with it."""
        self._stop.set()

    def run(self) -> None:
        """Serve until `stop` is called."""
        try:
            while not self._stop.is_set():
                worker = self._start()
                try:
                    self._serve_one(worker)
                finally:
                    worker.close()
        finally:
            self._listening.close()
            self._hang_up()

    def _serve_one(self, worker: WorkerProcess) -> None:
        """Announce a worker, wait for its client, and pass on what they say."""
        client = self._wait_for_client()
        if client is None:
            return
        began = time.monotonic()

        def stopped() -> bool:
            return self._stop.is_set() or time.monotonic() - began > client.limit

        with client.connection as connection:
            try:
                with worker.connect() as served:
                    ended = pass_on(connection, served, stopped, chunk if client.last_words else bytes)
                how = "its time was up" if ended is None else self._how(worker, ended is connection)
            except OSError as error:
                how = f"its worker did not answer ({error}) and {self._how(worker, False)}"
            if client.last_words:
                with contextlib.suppress(OSError):
                    connection.sendall(ending(how))
        self._tell(f"session: {how} after {time.monotonic() - began:.1f} s")

    def _how(self, worker: WorkerProcess, client_left: bool) -> str:
        # A worker whose client left is ended by its `close`, whatever it is at.
        code = 0 if client_left else worker.exit_code()
        return f"its process {how_ended(code)}.{worker.quote_log()}".rstrip(".") if code else "ended"

    def _wait_for_client(self) -> Client | None:
        match, handed_out = "", 0.0
        pause = RETRY_FIRST
        while not self._stop.is_set():
            try:
                pending = self._announced(match) if match else set()
                if match not in pending:
                    handed_out = handed_out or time.monotonic()
                    if not match or time.monotonic() - handed_out > UNCLAIMED:
                        match, handed_out = f"{self._tracker.key}:{secrets.token_hex(8)}", 0.0
                        self._announce(match)
                pause = RETRY_FIRST
            except (OSError, ValueError) as error:
                self._tell(f"tracker {self._tracker.host}:{self._tracker.port}: {error}; trying again")
                self._hang_up()
                match = ""
                self._stop.wait(pause)
                pause = min(2 * pause, RETRY_LAST)
                continue
            if select.select([self._listening], [], [], PING)[0]:
                connection, _ = self._listening.accept()
                client = self._greet(connection, match)
                if client is not None:
                    return client
                connection.close()
        return None

    def _greet(self, client: socket.socket, match: str) -> Client | None:
        """Answer a client's greeting; None if it is the wrong one."""
        client.settimeout(GREETING)
        with contextlib.suppress(OSError):
            magic, length = struct.unpack("<ii", receive(client, 8))
            if magic != RPC_MAGIC or not 0 <= length <= MAX_KEY:
                return None
            said, *options = receive(client, length).decode(errors="replace").split(" ")
            if said != f"client:{match}":
                client.sendall(struct.pack("<i", RPC_MISMATCH))
                return None
            last_words = LAST_WORDS in options
            granted = [LAST_WORDS, MACHINE + self._machine] if last_words else []
            answer = " ".join([f"server:{self._tracker.key}", *granted]).encode()
            client.sendall(struct.pack("<ii", RPC_MAGIC, len(answer)) + answer)
            watch(client)
            limits = [o.removeprefix("-timeout=") for o in options if o.startswith("-timeout=")]
            with contextlib.suppress(ValueError):
                # TVM's clients say 0 where there is no limit.
                limit = float(limits[0]) or float("inf") if limits else float("inf")
                return Client(client, limit, last_words)
        return None

    def _ask(self, message: object) -> object:
        if self._connection is None:
            self._connection = open_tracker(self._tracker.host, self._tracker.port)
            info = {"key": f"server:{self._tracker.key}", "addr": [None, self.port]}
            say(self._connection, [UPDATE_INFO, info])
            hear(self._connection)
        say(self._connection, message)
        return hear(self._connection)

    def _announce(self, match: str) -> None:
        answer = self._ask([PUT, self._tracker.key, [self.port, match], None])
        if answer != SUCCESS:
            raise ConnectionError(f"it refused: {answer!r}")
        self._tell(f"announced as {self._tracker.key!r}, port {self.port}")

    def _announced(self, match: str) -> set[str]:
        """Match keys that the tracker still has to give away."""
        found = self._ask([PENDING])
        return {str(key) for key in found} if isinstance(found, list) else {match}

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
