"""Arrays that touch a page which nobody may read or write: one byte too far, and the process dies."""

import ctypes
import math
import mmap
from collections.abc import Sequence
from typing import Literal

import numpy as np

Placement = Literal["end", "begin"]

_NO_ACCESS = 0  # PROT_NONE, which the module mmap does not name.
_FILL = 0xA5


class GuardedArray:
    """An array between two protected pages, which it touches at its end or at its beginning.

    Attributes
    ----------
    array
        The numpy array over that memory.
    """

    def __init__(self, shape: Sequence[int], dtype: str, placement: Placement) -> None:
        length = math.prod(shape) * np.dtype(dtype).itemsize
        page = mmap.PAGESIZE
        inside = -(-length // page) * page
        self._map = mmap.mmap(-1, inside + 2 * page)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._inside = slice(page, page + inside)
        first = page if placement == "begin" else page + inside - length
        self._own = slice(first, first + length)
        self._bytes[self._inside] = _FILL
        self.array = self._bytes[self._own].view(dtype).reshape(shape)
        self._protect(slice(0, page), _NO_ACCESS)
        self._protect(slice(page + inside, inside + 2 * page), _NO_ACCESS)

    def make_read_only(self) -> None:
        """Let writes to the array kill the process too."""
        self._protect(self._inside, mmap.PROT_READ)

    @property
    def surroundings_are_untouched(self) -> bool:
        """Whether what shares the array's pages is as it was."""
        outside = np.ones(self._bytes.size, bool)
        outside[self._own] = False
        return bool((self._bytes[self._inside][outside[self._inside]] == _FILL).all())

    def _protect(self, part: slice, protection: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(self._bytes.ctypes.data + part.start)
        if libc.mprotect(address, ctypes.c_size_t(part.stop - part.start), protection):
            raise OSError(ctypes.get_errno(), "mprotect")
