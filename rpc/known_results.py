"""Figures of the emulated Cortex-A72 that were found before: the same question has the same answer."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from tvm_compress.errors import TvmCompressError
from tvm_compress.rpc.device import LatencyResult, MeasurementSettings

#: What computes a figure: a change of one of these is a change of what is asked.
_SOURCES = ("cost_a72.py", "elf.py", "emulated_a72.py", "known_results.py", "program.py", "worker.py")


class KnownResults:
    """Results on disk, a file each, by all that they depend on; they only save time: losing them is no error.

    Parameters
    ----------
    directory
        Where they are kept; it may be deleted at any time.
    tools
        What names the emulator, the plugin and llvm-mca, with their versions.
    """

    def __init__(self, directory: Path, tools: Sequence[str]) -> None:
        self._directory = directory
        self._definition = hashlib.sha256(repr(tuple(tools)).encode())
        for name in _SOURCES:
            self._definition.update(Path(__file__).with_name(name).read_bytes())

    def key(self, library: Path, what: str, inputs: Sequence[np.ndarray] = ()) -> str | None:
        """Name of a question: a library's content, what of it is called, and with which values.

        None where the library cannot be read.
        """
        digest = self._definition.copy()
        try:
            content = library.read_bytes()
        except OSError:
            return None
        for part in (content, what.encode()):
            digest.update(hashlib.sha256(part).digest())
        for array in inputs:
            digest.update(repr((array.dtype.str, array.shape)).encode())
            digest.update(hashlib.sha256(array.tobytes()).digest())
        return digest.hexdigest()

    def get(self, key: str | None, settings: MeasurementSettings) -> LatencyResult | None:
        """Find a result, as if it had been measured by these settings; they have no bearing on counts."""
        if key is None:
            return None
        try:
            result = LatencyResult.from_dict(json.loads((self._directory / f"{key}.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, TvmCompressError):
            return None
        return replace(result, settings=settings)

    def put(self, key: str | None, result: LatencyResult) -> None:
        """Keep a result; failures are not kept, they may have causes outside."""
        if key is None or not result.ok:
            return
        with suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            number, part = tempfile.mkstemp(prefix=".part-", dir=self._directory)
            with os.fdopen(number, "w") as file:
                json.dump(result.to_dict(), file)
            os.replace(part, self._directory / f"{key}.json")
