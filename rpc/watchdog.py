"""Limits on the time that calls take, watched by one thread: starting one takes longer than most calls."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator


class Watchdog:
    """Does something when a block takes longer than it may; may be used from several threads."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._changed = threading.Condition()
        # By a number each: until when a block may take, on the monotonic clock, and what is done then.
        self._watched: dict[int, tuple[float, Callable[[], None]]] = {}
        self._thread: threading.Thread | None = None
        # When the thread looks next by itself.
        self._next_look = math.inf

    @contextlib.contextmanager
    def after(self, limit: float, action: Callable[[], None]) -> Iterator[None]:
        """Do `action` in another thread, once, if the block takes longer than `limit` seconds."""
        if self._process != os.getpid():
            # The thread, and perhaps the owner of its lock, stayed behind in the process that forked.
            self._reset()
        number = next(self._numbers)
        deadline = time.monotonic() + limit
        with self._changed:
            self._watched[number] = (deadline, action)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
                self._thread.start()
            elif deadline < self._next_look:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._watched.pop(number, None)

    def _watch(self) -> None:
        while True:
            with self._changed:
                now = time.monotonic()
                late = [number for number, (deadline, _) in self._watched.items() if deadline <= now]
                actions = [self._watched.pop(number)[1] for number in late]
                self._next_look = min((deadline for deadline, _ in self._watched.values()), default=math.inf)
                if not actions:
                    # What ends in time does not wake the thread: it looks at the first limit that it knew.
                    self._changed.wait(None if self._next_look == math.inf else self._next_look - now)
            for action in actions:
                action()


_WATCHDOG = Watchdog()


def after(limit: float, action: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """Do `action` in another thread, once, if the block takes longer than `limit` seconds."""
    return _WATCHDOG.after(limit, action)
