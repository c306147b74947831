"""A board's answers as a stream that ends with words: why the session ended, as the board knows it.

What comes from the board is cut into chunks, each after its length (4 bytes, little-endian). A length of 0
says that the last words follow, of a length and text. Only the standard library is used: this also runs on
boards.
"""

import json
import struct

_LENGTH = struct.Struct("<I")
#: More than any chunk or last words that are sent.
_MOST = 1 << 20


def chunk(data: bytes) -> bytes:
    """Wrap some bytes of the session."""
    return _LENGTH.pack(len(data)) + data if data else b""


def ending(words: str) -> bytes:
    """Say why the session ended; nothing follows it."""
    said = words.encode()[:_MOST]
    return _LENGTH.pack(0) + _LENGTH.pack(len(said)) + said


def hello(about: dict) -> bytes:
    """Wrap what a board says of itself before a session, as the first chunk."""
    return chunk(json.dumps(about).encode())


class Chunks:
    """Takes the stream apart again.

    `words` is None until the last words are complete.
    """

    def __init__(self) -> None:
        self._left = b""
        self._ended = False
        self.words: str | None = None

    def feed(self, data: bytes) -> bytes:
        """Give the session's bytes within what was received; ConnectionError where this is no such stream."""
        self._left += data
        whole = []
        while (part := self.next()) is not None:
            whole.append(part)
        return b"".join(whole)

    def add(self, data: bytes) -> None:
        """Take in what was received, for `next`."""
        self._left += data

    def next(self) -> bytes | None:
        """Give one chunk, or None while there is none."""
        while len(self._left) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._left)
            if length > _MOST:
                raise ConnectionError("The board's answers are not cut into chunks.")
            if length == 0 and not self._ended:
                self._ended = True
                self._left = self._left[_LENGTH.size :]
                continue
            end = _LENGTH.size + length
            if len(self._left) < end:
                return None
            part, self._left = self._left[_LENGTH.size : end], self._left[end:]
            if not self._ended:
                return part
            self.words = part.decode(errors="replace")
        return None
