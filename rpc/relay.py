"""Stands between a session and a board from a tracker: gets the board, then passes bytes on.

Run by `Worker` as `python -m tvm_compress.rpc.relay TRACKER_HOST TRACKER_PORT KEY WAIT SESSION_LIMIT ASIDE
AVOID LISTENING_FD DIRECTORY`. TVM's client waits in C++ for answers, where nothing can interrupt it; killing
this process breaks the connection and ends any such wait, and the board's server then ends its side. What is
known of the board goes into DIRECTORY/board (see `announce`). ASIDE names addresses that are not wanted at
all, AVOID those that are wanted only if no other board is free; both are separated by commas.

Our own boards end a session with last words (see `last_words`), if they are asked to by an option in the
greeting, which TVM's own boards do not know and ignore.

Only the standard library is used: the process starts at once.
"""

import contextlib
import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tvm_compress.rpc.last_words import Chunks
from tvm_compress.rpc.serve_local import MAX_KEY, RPC_MAGIC, greet, receive

TRACKER_MAGIC = 0x2F271
REQUEST, SUMMARY, SUCCESS = 4, 6, 0
#: Seconds that a tracker or a board gets to answer.
CONNECT_LIMIT = 10.0
# A board that is not wanted is offered again after a while; how long to wait before asking anew.
ASK_AGAIN = 1.0
# Seconds to wait for another board while one that is rather not wanted is held; boards that nobody claims
# are announced anew after a little longer.
HOLD = 1.0
CHUNK = 1 << 16
# Seconds between looks whether to stop.
LOOK = 0.5
# Seconds that one end gets to take what the other sent.
STUCK = 60.0
# Seconds after which an end that vanished without a word is given up.
VANISHED = 30
#: Options of the greeting: the client asks for last words, the board grants them and names its processor.
LAST_WORDS, MACHINE = "-last-words", "-machine="
#: Exit codes: the board ended the session, or the connection to it broke.
ENDED, LOST = 1, 3


@dataclass(frozen=True)
class Ticket:
    """The right to be a board's next client."""

    host: str
    port: int
    match: str

    @property
    def board(self) -> str:
        """Address of the board's server, which serves one session at a time."""
        return f"{self.host}:{self.port}"


def say(connection: socket.socket, message: object) -> None:
    """Send JSON as TVM's tracker wants it: its length first."""
    data = json.dumps(message).encode()
    connection.sendall(struct.pack("<i", len(data)) + data)


def hear(connection: socket.socket) -> object:
    """Receive JSON from a tracker."""
    (length,) = struct.unpack("<i", receive(connection, 4))
    return json.loads(receive(connection, length))


def open_tracker(host: str, port: int, limit: float = CONNECT_LIMIT) -> socket.socket:
    """Connect to a tracker and greet it; ConnectionError where none answers within `limit` seconds."""
    try:
        connection = socket.create_connection((host, port), timeout=limit)
        try:
            connection.sendall(struct.pack("<i", TRACKER_MAGIC))
            found = struct.unpack("<i", receive(connection, 4))[0]
        except OSError:
            connection.close()
            raise
    except OSError as error:
        raise ConnectionError(
            f"No tracker of TVM answers at {host}:{port} (it got {limit:g} s): {error}."
        ) from None
    if found != TRACKER_MAGIC:
        connection.close()
        raise ConnectionError(f"What answers at {host}:{port} is no tracker of TVM.")
    return connection


def boards(host: str, port: int, key: str, limit: float = CONNECT_LIMIT) -> set[str]:
    """Addresses of all boards of a key, busy ones too."""
    with open_tracker(host, port, limit) as tracker:
        say(tracker, [SUMMARY])
        answer = hear(tracker)
    if not isinstance(answer, list) or answer[0] != SUCCESS:
        raise ConnectionError(f"The tracker at {host}:{port} gave no summary: {answer!r}.")
    servers = [info for info in answer[1]["server_info"] if info.get("key") == f"server:{key}"]
    return {f"{info['addr'][0]}:{info['addr'][1]}" for info in servers}


def ask(host: str, port: int, key: str, wait: float) -> Ticket | None:
    """Ask a tracker for a free board; None where none becomes free within `wait` seconds."""
    with open_tracker(host, port) as tracker:
        tracker.settimeout(max(0.1, wait))
        say(tracker, [REQUEST, key, "", 1])
        try:
            answer = hear(tracker)
        except TimeoutError:
            return None
    if not isinstance(answer, list) or answer[0] != SUCCESS:
        raise ConnectionError(f"The tracker at {host}:{port} refused: {answer!r}.")
    where, at, match = answer[1]
    return Ticket(where, int(at), match)


def request(
    host: str, port: int, key: str, wait: float, limit: float, aside: set[str], avoid: set[str]
) -> "Board":
    """Connect to a board that is free within `wait` seconds; ConnectionError says why there is none."""
    known = boards(host, port, key, min(CONNECT_LIMIT, wait))
    if known and not known - aside:
        raise ConnectionError(
            f"All boards {key!r} at {host}:{port} are set aside: {', '.join(sorted(known))}."
        )
    end = time.monotonic() + wait
    failure = f"No board {key!r} became free at {host}:{port} within {wait:g} s."
    while (left := end - time.monotonic()) > 0:
        ticket = ask(host, port, key, left)
        if ticket is None:
            break
        if ticket.board in avoid and known - aside - avoid:
            # Others may be busy for hours: one that is free now, or else this one after all.
            ticket = ask(host, port, key, min(left, HOLD)) or ticket
        if ticket.board in aside:
            failure = f"Of the boards {key!r} at {host}:{port} all that were free are set aside."
            time.sleep(ASK_AGAIN)
            continue
        try:
            return Board(ticket, limit)
        except (OSError, struct.error) as error:
            failure = f"The board {ticket.board} did not answer: {error}."
            time.sleep(ASK_AGAIN)
    raise ConnectionError(failure)


class Board:
    """A board's server that has accepted this client.

    Parameters
    ----------
    ticket
        From the tracker.
    limit
        Seconds after which the board ends the session.
    """

    def __init__(self, ticket: Ticket, limit: float) -> None:
        self.address = ticket.board
        self.connection = socket.create_connection((ticket.host, ticket.port), timeout=CONNECT_LIMIT)
        try:
            options = self._greet(f"client:{ticket.match} -timeout={limit} {LAST_WORDS}")
        except OSError:
            self.connection.close()
            raise
        watch(self.connection)
        #: How its answers are taken apart; None for TVM's own servers, which send them as they are.
        self.chunks = Chunks() if LAST_WORDS in options else None
        #: Its processor, where it says so.
        self.machine = next((o.removeprefix(MACHINE) for o in options if o.startswith(MACHINE)), "")

    def _greet(self, greeting: str) -> list[str]:
        said = greeting.encode()
        self.connection.sendall(struct.pack("<ii", RPC_MAGIC, len(said)) + said)
        if struct.unpack("<i", receive(self.connection, 4))[0] != RPC_MAGIC:
            raise ConnectionError("it expected another client")
        (length,) = struct.unpack("<i", receive(self.connection, 4))
        if not 0 <= length <= MAX_KEY:
            raise ConnectionError("it is no RPC server of TVM")
        return receive(self.connection, length).decode(errors="replace").split(" ")[1:]


def watch(connection: socket.socket) -> None:
    """Have the system end a connection whose other end vanished without a word."""
    options = {"TCP_KEEPIDLE": VANISHED // 2, "TCP_KEEPINTVL": VANISHED // 6, "TCP_KEEPCNT": 3}
    options["TCP_USER_TIMEOUT"] = VANISHED * 1000
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        # Not every system has all of them.
        if hasattr(socket, name):
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def pass_on(
    client: socket.socket,
    board: socket.socket,
    stopped: Callable[[], bool] = lambda: False,
    to_client: Callable[[bytes], bytes] = bytes,
) -> socket.socket | None:
    """Pass bytes both ways until either end closes, which is returned, or something says stop.

    `to_client` changes what comes from the board. An end that takes nothing for a minute counts as closed.
    """
    other = {client: board, board: client}
    for end in other:
        end.settimeout(STUCK)
    while not stopped():
        for source in select.select([client, board], [], [], LOOK)[0]:
            try:
                data = source.recv(CHUNK)
            except OSError:
                return source
            if not data:
                return source
            try:
                other[source].sendall(to_client(data) if source is board else data)
            except OSError:
                return other[source]
    return None


def announce(directory: str, about: dict[str, object]) -> None:
    """Tell `Worker` that the board is there, and what is known of it: "address" and "machine"."""
    part = Path(directory, "board.part")
    part.write_text(json.dumps(about), encoding="utf-8")
    part.replace(Path(directory, "board"))


def main(arguments: list[str]) -> None:
    """Get a board, then serve one client with it."""
    host, port, key, wait, limit, aside, avoid, descriptor, directory = arguments
    try:
        unwanted = [set(filter(None, names.split(","))) for names in (aside, avoid)]
        board = request(host, int(port), key, float(wait), float(limit), *unwanted)
    except OSError as error:
        end(str(error), LOST)
    announce(directory, {"address": board.address, "machine": board.machine})
    serve(int(descriptor), board.connection, board.chunks, f"the board {board.address}")


def serve(
    descriptor: int,
    board: socket.socket,
    chunks: Chunks | None,
    name: str,
    explain: Callable[[], str] = str,
) -> None:
    """Accept one client and pass on what it and the board say; ends the process if the board ends first.

    `explain` adds what is known of a connection that broke.
    """
    with socket.socket(fileno=descriptor) as listening:
        client = greet(listening, os.environ["TVM_COMPRESS_RPC_KEY"])
    ended = pass_on(client, board, to_client=chunks.feed if chunks else bytes)
    if ended is not board:
        return
    if chunks is None:
        end(f"{name} ended the session: its process died, or its time was up.", ENDED)
    if chunks.words is None:
        end(f"the connection to {name} broke.{explain()}", LOST)
    end(f"{name} ended the session: {chunks.words}.", ENDED)


def end(reason: str, code: int) -> NoReturn:
    """End with the reason as last words, which the session's error quotes."""
    sys.stderr.write(f"{reason}\n")
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
