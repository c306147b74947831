"""Stands between a session and a board from a tracker: gets the board, then passes bytes on.

Run by `Worker` as `python -m tvm_compress.rpc.relay TRACKER_HOST TRACKER_PORT KEY WAIT SESSION_LIMIT ASIDE
AVOID LISTENING_FD DIRECTORY`. TVM's client waits in C++ for answers, where nothing can interrupt it; killing
this process breaks the connection and ends any such wait, and the board's server then ends its side. The
board's address goes into DIRECTORY/board. ASIDE names addresses that are not wanted at all, AVOID those that
are wanted only if there are no others; both are separated by commas.

Only the standard library is used: the process starts at once.
"""

import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tvm_compress.rpc.serve_local import RPC_MAGIC, greet, receive

TRACKER_MAGIC = 0x2F271
REQUEST, SUMMARY, SUCCESS = 4, 6, 0
CONNECT_LIMIT = 10.0
# A board that is not wanted is offered again after a while; how long to wait before asking anew.
ASK_AGAIN = 1.0
CHUNK = 1 << 16
# Seconds between looks whether to stop.
LOOK = 0.5


def say(connection: socket.socket, message: object) -> None:
    """Send JSON as TVM's tracker wants it: its length first."""
    data = json.dumps(message).encode()
    connection.sendall(struct.pack("<i", len(data)) + data)


def hear(connection: socket.socket) -> object:
    """Receive JSON from a tracker."""
    (length,) = struct.unpack("<i", receive(connection, 4))
    return json.loads(receive(connection, length))


def open_tracker(host: str, port: int) -> socket.socket:
    """Connect to a tracker and greet it; ConnectionError if it is none."""
    connection = socket.create_connection((host, port), timeout=CONNECT_LIMIT)
    connection.sendall(struct.pack("<i", TRACKER_MAGIC))
    if struct.unpack("<i", receive(connection, 4))[0] != TRACKER_MAGIC:
        raise ConnectionError(f"{host}:{port} is no tracker of TVM.")
    return connection


def boards(host: str, port: int, key: str) -> set[str]:
    """Addresses of all boards of a key, busy ones too."""
    with open_tracker(host, port) as tracker:
        say(tracker, [SUMMARY])
        answer = hear(tracker)
    if not isinstance(answer, list) or answer[0] != SUCCESS:
        raise ConnectionError(f"The tracker at {host}:{port} gave no summary: {answer!r}.")
    servers = [info for info in answer[1]["server_info"] if info.get("key") == f"server:{key}"]
    return {f"{info['addr'][0]}:{info['addr'][1]}" for info in servers}


def request(
    host: str, port: int, key: str, wait: float, limit: float, aside: set[str], avoid: set[str]
) -> tuple[str, socket.socket]:
    """Give a board's address and the connection to it, greeted."""
    known = boards(host, port, key)
    unwanted = aside | avoid if known - aside - avoid else aside
    if known and not known - aside:
        raise ConnectionError(
            f"All boards {key!r} at {host}:{port} are set aside: {', '.join(sorted(known))}."
        )
    end = time.monotonic() + wait
    failure = f"No board {key!r} became free at {host}:{port} within {wait:g} s."
    while time.monotonic() < end:
        with open_tracker(host, port) as tracker:
            tracker.settimeout(max(0.1, end - time.monotonic()))
            say(tracker, [REQUEST, key, "", 1])
            try:
                answer = hear(tracker)
            except TimeoutError:
                break
        if not isinstance(answer, list) or answer[0] != SUCCESS:
            raise ConnectionError(f"The tracker at {host}:{port} refused: {answer!r}.")
        where, at, match = answer[1]
        board = f"{where}:{at}"
        # The address is that of the server, which serves one session at a time, not of one session.
        if board in unwanted:
            failure = f"Of the boards {key!r} at {host}:{port} all that were free are set aside."
            time.sleep(ASK_AGAIN)
            continue
        try:
            return board, greet_board(where, int(at), match, limit)
        except OSError as error:
            failure = f"The board {board} did not answer: {error}."
            time.sleep(ASK_AGAIN)
    raise ConnectionError(failure)


def greet_board(host: str, port: int, match: str, limit: float) -> socket.socket:
    """Connect to a board as the client that the tracker told it of."""
    board = socket.create_connection((host, port), timeout=CONNECT_LIMIT)
    said = f"client:{match} -timeout={limit}".encode()
    board.sendall(struct.pack("<ii", RPC_MAGIC, len(said)) + said)
    if struct.unpack("<i", receive(board, 4))[0] != RPC_MAGIC:
        board.close()
        raise ConnectionError("it expected another client")
    (length,) = struct.unpack("<i", receive(board, 4))
    receive(board, length)
    board.settimeout(None)
    return board


def pass_on(
    client: socket.socket, board: socket.socket, stopped: Callable[[], bool] = lambda: False
) -> socket.socket | None:
    """Pass bytes both ways until either end closes, which is returned, or something says stop."""
    other = {client: board, board: client}
    while not stopped():
        for source in select.select([client, board], [], [], LOOK)[0]:
            try:
                data = source.recv(CHUNK)
                if not data:
                    return source
                other[source].sendall(data)
            except ConnectionError:
                return source
    return None


def main(arguments: list[str]) -> None:
    """Get a board, then serve one client with it."""
    host, port, key, wait, limit, aside, avoid, descriptor, directory = arguments
    try:
        unwanted = [set(filter(None, names.split(","))) for names in (aside, avoid)]
        address, board = request(host, int(port), key, float(wait), float(limit), *unwanted)
    except OSError as error:
        _end(f"{host}:{port}: {error}")
    Path(directory, "board").write_text(address, encoding="utf-8")
    with socket.socket(fileno=int(descriptor)) as listening:
        client = greet(listening, os.environ["TVM_COMPRESS_RPC_KEY"])
    if pass_on(client, board) is board:
        _end(f"The board {address} ended the session: its worker died, or its time was up.")


def _end(reason: str) -> NoReturn:
    """End with the reason as last words, which the session's error quotes."""
    sys.stderr.write(f"{reason}\n")
    sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
