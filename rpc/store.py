"""Every measurement with its provenance, in a SQLite file that several processes may write."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tvm_compress.errors import StudyError
from tvm_compress.rpc.device import LatencyResult, MeasurementSettings, Unit

#: Version 2 came with `cache_flush`, `max_spread` and `max_repeat` in the settings.
SCHEMA_VERSION = 2
#: Seconds to wait for another process: a row is written within milliseconds, by slow cards within a second.
BUSY_LIMIT_S = 10.0
_BUSY_CODES = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS measurements (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL,
    device TEXT NOT NULL,
    unit TEXT NOT NULL,
    settings TEXT NOT NULL,
    result TEXT NOT NULL,
    provenance TEXT NOT NULL,
    measured_at REAL NOT NULL
)
"""
_INDEX = "CREATE INDEX IF NOT EXISTS by_key ON measurements (key, device, unit, settings)"


class MeasurementStore:
    """Measurements by key, device, unit and settings; nothing is overwritten, the newest answers.

    Parameters
    ----------
    path
        The file, made with its folder where it is not there. A damaged file is moved aside to `NAME.corrupt`
        (or `NAME.corrupt-2`, ...), named in a warning, and a new one begun: measurements can be repeated.
    busy_limit_s
        Seconds that each use waits for another process that has the file.

    Raises
    ------
    StudyError
        The file is of another schema version, cannot be opened at all, or another process keeps it longer
        than the limit; this last from every method.
    """

    def __init__(self, path: Path, busy_limit_s: float = BUSY_LIMIT_S) -> None:
        self.path = Path(path)
        self._busy_limit_s = busy_limit_s
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._prepare()
            except sqlite3.DatabaseError as error:
                # A file in use or without permission is not a damaged one.
                if isinstance(error, sqlite3.OperationalError):
                    raise
                self._move_aside(error)
                self._prepare()
        except (OSError, sqlite3.Error) as error:
            raise self._error("opened", error) from None

    def get(
        self,
        key: str,
        device: str,
        unit: Unit | None = None,
        settings: MeasurementSettings | None = None,
    ) -> LatencyResult | None:
        """Newest measurement of a key on a device, or None.

        Parameters
        ----------
        key
            What was measured, such as a kernel's hash.
        device
            A device's name.
        unit, settings
            Only measurements in that unit, or taken by those settings; None takes any.
        """
        query = "SELECT result FROM measurements WHERE key = ? AND device = ?"
        values: list[Any] = [key, device]
        if unit is not None:
            query += " AND unit = ?"
            values.append(unit)
        if settings is not None:
            query += " AND settings = ?"
            values.append(_canonical(settings.to_dict()))
        with self._connection() as connection:
            row = connection.execute(f"{query} ORDER BY id DESC LIMIT 1", values).fetchone()
        return None if row is None else LatencyResult.from_dict(json.loads(row[0]))

    def put(self, key: str, device: str, result: LatencyResult, provenance: Mapping[str, Any]) -> None:
        """Keep a measurement, with what a reader needs to judge it, such as `Device.describe()`."""
        row = (
            key,
            device,
            result.unit,
            _canonical(result.settings.to_dict()),
            _canonical(result.to_dict()),
            _canonical(provenance),
            time.time(),
        )
        with self._connection() as connection:
            connection.execute(
                "INSERT INTO measurements (key, device, unit, settings, result, provenance, measured_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )

    def rows(self) -> list[dict[str, Any]]:
        """All measurements in their order: key, device, result, provenance, measured_at (Unix time)."""
        query = "SELECT key, device, result, provenance, measured_at FROM measurements ORDER BY id"
        with self._connection() as connection:
            found = connection.execute(query).fetchall()
        return [
            {
                "key": key,
                "device": device,
                "result": LatencyResult.from_dict(json.loads(result)),
                "provenance": json.loads(provenance),
                "measured_at": measured_at,
            }
            for key, device, result, provenance, measured_at in found
        ]

    def __len__(self) -> int:
        with self._connection() as connection:
            return int(connection.execute("SELECT count(*) FROM measurements").fetchone()[0])

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Open, commit or roll back, close: so that a store can be used in any thread and after a fork."""
        try:
            connection = self._connect()
            with closing(connection), connection:
                yield connection
        except sqlite3.DatabaseError as error:
            raise self._error("used", error) from None

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=self._busy_limit_s)

    def _error(self, action: str, error: Exception) -> StudyError:
        if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF in _BUSY_CODES:
            return StudyError(
                f"The measurements in {self.path} are locked by another process for more than "
                f"{self._busy_limit_s:g} s.",
                "Wait for it or end it (`fuser` names it), or use another folder.",
            )
        return StudyError(f"The measurements in {self.path} cannot be {action}: {error}.")

    def _prepare(self) -> None:
        with closing(self._connect()) as connection:
            # Raises for a file that is no database, and for one whose pages do not fit together.
            problems = connection.execute("PRAGMA quick_check").fetchone()[0]
            if problems != "ok":
                raise sqlite3.DatabaseError(problems)
            connection.execute("PRAGMA journal_mode = WAL")
            with connection:
                # One writer at a time from here on, so that a version is read after it was written.
                connection.execute("BEGIN IMMEDIATE")
                version = connection.execute("PRAGMA user_version").fetchone()[0]
                tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                if version == 1:
                    _fill_settings(connection)
                elif version != SCHEMA_VERSION and (version or tables):
                    raise StudyError(
                        f"{self.path} holds measurements of schema version {version}, not {SCHEMA_VERSION}.",
                        "Use the release that wrote them, or another folder.",
                    )
                connection.execute(_SCHEMA)
                connection.execute(_INDEX)
                connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _move_aside(self, error: Exception) -> None:
        target, number = self.path.with_name(f"{self.path.name}.corrupt"), 2
        while target.exists():
            target = self.path.with_name(f"{self.path.name}.corrupt-{number}")
            number += 1
        self.path.replace(target)
        # The newest rows may be in the journal alone: it goes along, for whoever repairs the file.
        with contextlib.suppress(FileNotFoundError):
            self.path.with_name(f"{self.path.name}-wal").replace(f"{target}-wal")
        self.path.with_name(f"{self.path.name}-shm").unlink(missing_ok=True)
        warnings.warn(
            f"The measurements in {self.path} are damaged ({error}); they were moved to {target}.",
            stacklevel=3,
        )


def _fill_settings(connection: sqlite3.Connection) -> None:
    """Add the defaults of newer settings to rows of version 1, so that they are found by today's settings.

    Releases that know version 1 only could not read what is written from here on: the file's version rises.
    """
    for (old,) in connection.execute("SELECT DISTINCT settings FROM measurements").fetchall():
        new = _canonical(MeasurementSettings.from_dict(json.loads(old)).to_dict())
        connection.execute("UPDATE measurements SET settings = ? WHERE settings = ?", (new, old))


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, allow_nan=False)
