"""The store keeps every measurement apart by device, unit and settings, and survives damage and company."""

import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest

from tvm_compress.errors import StudyError
from tvm_compress.rpc.device import LatencyResult, MeasurementSettings
from tvm_compress.rpc.store import SCHEMA_VERSION, MeasurementStore

SETTINGS = MeasurementSettings()


def latency(value, unit="seconds", settings=SETTINGS):
    return LatencyResult.from_samples([value], unit, settings, {"conv": value})


def latency_of(value):
    return LatencyResult.from_samples([value], "seconds", SETTINGS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "study" / "measurements.sqlite"


def test_what_is_put_is_got_by_another_store(path):
    MeasurementStore(path).put("k", "local", latency(1.5), {"machine": "m"})
    store = MeasurementStore(path)
    assert store.get("k", "local") == latency(1.5)
    assert store.get("k", "board") is None
    assert store.get("other", "local") is None
    (row,) = store.rows()
    assert row["provenance"] == {"machine": "m"}
    assert row["result"] == latency(1.5)
    assert row["measured_at"] > 0


def test_the_newest_answers_and_nothing_is_lost(path):
    store = MeasurementStore(path)
    store.put("k", "local", latency(1.0), {})
    store.put("k", "local", latency(2.0), {})
    assert store.get("k", "local") == latency(2.0)
    assert len(store) == 2


def test_units_and_settings_are_kept_apart(path):
    store, many = MeasurementStore(path), replace(SETTINGS, repeat=50)
    store.put("k", "d", latency(1.0), {})
    store.put("k", "d", latency(9.0, "estimated_cycles"), {})
    store.put("k", "d", latency(3.0, settings=many), {})
    assert store.get("k", "d", unit="estimated_cycles") == latency(9.0, "estimated_cycles")
    assert store.get("k", "d", unit="seconds", settings=SETTINGS) == latency(1.0)
    assert store.get("k", "d", settings=many) == latency(3.0, settings=many)
    assert store.get("k", "d", settings=replace(SETTINGS, repeat=51)) is None


def test_failures_are_kept_too(path):
    failed = LatencyResult.failed("timeout", "too long", "seconds", SETTINGS)
    MeasurementStore(path).put("k", "local", failed, {})
    assert MeasurementStore(path).get("k", "local") == failed


def test_another_schema_version_is_refused(path):
    MeasurementStore(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(StudyError, match=f"version {SCHEMA_VERSION + 1}, not {SCHEMA_VERSION}"):
        MeasurementStore(path)


def test_rows_of_the_first_schema_are_found_by_todays_settings(path):
    path.parent.mkdir()
    settings = (
        '{"cooldown_ms": 0.0, "min_repeat_ms": 20.0, "number": 1, "repeat": 10, "threads": %d, '
        '"timeout_s": 60.0, "warmup": 1}'
    )
    result = (
        '{"counters": {}, "error": null, "kernels": {"conv": 1.5}, "samples": [1.5], "settings": %s, '
        '"spread": 0.0, "unit": "seconds", "value": 1.5}'
    )
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "CREATE TABLE measurements (id INTEGER PRIMARY KEY, key TEXT NOT NULL, device TEXT NOT NULL, "
            "unit TEXT NOT NULL, settings TEXT NOT NULL, result TEXT NOT NULL, provenance TEXT NOT NULL, "
            "measured_at REAL NOT NULL)"
        )
        for threads in (1, 2):
            old = settings % threads
            row = ("k", "local", "seconds", old, result % old, "{}", 1.0)
            connection.execute("INSERT INTO measurements VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", row)
        connection.execute("PRAGMA user_version = 1")
    for _ in range(2):
        store = MeasurementStore(path)
        assert store.get("k", "local", "seconds", SETTINGS) == latency(1.5)
        two = replace(SETTINGS, threads=2)
        assert store.get("k", "local", "seconds", two) == latency(1.5, settings=two)
        assert store.get("k", "local", "seconds", replace(SETTINGS, cache_flush=True)) is None
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


def test_a_database_of_something_else_is_refused(path):
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE cakes (name TEXT)")
    with pytest.raises(StudyError, match="version 0"):
        MeasurementStore(path)


def test_damaged_files_are_moved_aside_and_named(path):
    path.parent.mkdir()
    for ending in ("", "-2"):
        path.write_bytes(b"not a database, but long enough to be looked at " * 100)
        with pytest.warns(UserWarning, match=f"{path.name}.corrupt{ending}"):
            store = MeasurementStore(path)
        store.put("k", "local", latency(1.0), {})
        assert store.get("k", "local") == latency(1.0)
        assert path.with_name(f"{path.name}.corrupt{ending}").read_bytes().startswith(b"not a database")


def test_a_file_damaged_in_the_middle_is_found(path):
    store = MeasurementStore(path)
    for i in range(200):
        store.put(f"k{i}", "local", latency(1.0), {"note": "x" * 200})
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xff" * 8192)
    with pytest.warns(UserWarning, match="damaged"):
        assert len(MeasurementStore(path)) == 0


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be opened"):
        MeasurementStore(tmp_path / "file" / "measurements.sqlite")
    with pytest.raises(StudyError, match="cannot be opened"):
        MeasurementStore(tmp_path)


@contextmanager
def locked(path, mode):
    """Another process that holds the file until the block ends: for writers, or for everybody."""
    program = (
        "import sqlite3, sys, time\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "if sys.argv[2] == 'everybody': connection.execute('PRAGMA locking_mode = EXCLUSIVE')\n"
        "connection.execute('BEGIN EXCLUSIVE')\n"
        "connection.execute('CREATE TABLE IF NOT EXISTS other (x)')\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", program, str(path), mode]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin
        assert holder.stdout
        assert holder.stdout.readline() == "locked\n"
        yield
        holder.stdin.close()
        assert holder.wait(20) == 0


@pytest.mark.parametrize("mode", ["writers", "everybody"])
def test_a_file_that_another_process_keeps_is_an_error_within_the_limit(path, mode):
    store = MeasurementStore(path, busy_limit_s=0.5)
    store.put("k", "local", latency(1.0), {})
    uses: list[Callable[[], object]] = [
        lambda: MeasurementStore(path, 0.5),
        lambda: store.put("k", "local", latency(2.0), {}),
    ]
    if mode == "everybody":
        uses.append(lambda: store.get("k", "local"))
    with locked(path, mode):
        for use in uses:
            began = time.monotonic()
            with pytest.raises(StudyError, match=r"locked by another process for more than 0\.5 s") as caught:
                use()
            assert 0.4 < time.monotonic() - began < 5
            assert str(path) in str(caught.value)
            assert "another folder" in caught.value.hint
    # Nothing was moved aside, and what the other did not keep goes on.
    assert not list(path.parent.glob("*.corrupt*"))
    store.put("k", "local", latency(3.0), {})
    assert MeasurementStore(path).get("k", "local") == latency(3.0)
    assert len(store) == 2


def test_a_new_file_that_another_process_keeps_is_an_error(path):
    path.parent.mkdir()
    with locked(path, "writers"), pytest.raises(StudyError, match="locked by another process"):
        MeasurementStore(path, 0.5)


def test_a_lock_that_ends_is_waited_for(path):
    store = MeasurementStore(path)
    with locked(path, "writers"):
        writer = threading.Thread(target=store.put, args=("k", "local", latency(1.0), {}))
        writer.start()
        time.sleep(0.5)
        assert writer.is_alive()
    writer.join()
    assert store.get("k", "local") == latency(1.0)


def test_what_was_put_is_there_after_a_kill(path):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tvm_compress.rpc.device import LatencyResult, MeasurementSettings\n"
        "from tvm_compress.rpc.store import MeasurementStore\n"
        "store = MeasurementStore(Path(sys.argv[1]))\n"
        "for i in range(1_000_000):\n"
        "    result = LatencyResult.from_samples([i + 1.0], 'seconds', MeasurementSettings())\n"
        "    store.put(f'k{i}', 'local', result, {'note': 'x' * 5000})\n"
        "    print(i, flush=True)\n"
    )
    acknowledged = -1
    for _ in range(3):
        # Each time into what the killed one left.
        before, acknowledged = acknowledged, -1
        command = [sys.executable, "-c", program, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            for line in writer.stdout or ():
                acknowledged = int(line)
                if acknowledged == 40:
                    writer.kill()
        assert acknowledged >= 40
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            store = MeasurementStore(path)
        for i in range(acknowledged + 1):
            assert store.get(f"k{i}", "local") == latency_of(i + 1.0)
        assert len(store) >= acknowledged + before + 2


def test_the_journal_of_a_damaged_file_goes_along_with_it(path):
    store = MeasurementStore(path)
    for i in range(200):
        store.put(f"k{i}", "local", latency(1.0), {"note": "x" * 200})
    with closing(sqlite3.connect(path)) as reader:
        # While somebody reads, the newest row stays in the journal.
        assert reader.execute("SELECT count(*) FROM measurements").fetchone() == (200,)
        store.put("newest", "local", latency(1.0), {})
        journal = path.with_name(f"{path.name}-wal").read_bytes()
        assert b"newest" in journal
        with path.open("r+b") as file:
            file.seek(8192)
            file.write(b"\xff" * 32768)
        with pytest.warns(UserWarning, match="corrupt"):
            assert len(MeasurementStore(path)) == 0
        assert path.with_name(f"{path.name}.corrupt-wal").read_bytes() == journal


def test_several_processes_write_at_once(path):
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tvm_compress.rpc.device import LatencyResult, MeasurementSettings\n"
        "from tvm_compress.rpc.store import MeasurementStore\n"
        "store = MeasurementStore(Path(sys.argv[1]))\n"
        "result = LatencyResult.from_samples([1.0], 'seconds', MeasurementSettings())\n"
        "for i in range(30): store.put(f'{sys.argv[2]}-{i}', 'local', result, {})\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), str(i)]) for i in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    assert len(MeasurementStore(path)) == 90
