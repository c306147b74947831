"""What every device must do, by one suite."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tvm_compress.errors import DeviceError, SettingError
from tvm_compress.rpc.device import Device, MeasurementSettings, open_device
from tvm_compress.rpc.machine import own_machine
from tvm_compress.rpc.measure import latency_ratio, measure

PERSISTENCE_LIMIT_S = 20.0


def layers_inputs(rng):
    return [rng.normal(size=(2, 8)).astype("float32"), rng.normal(size=(8, 4)).astype("float32")]


def expected_layers(x, w):
    return np.maximum(x @ w, 0)


def assert_works(bench):
    inputs = layers_inputs(np.random.default_rng(1))
    (out,) = bench.session.run(bench.build("layers"), inputs)
    np.testing.assert_allclose(out, expected_layers(*inputs), rtol=1e-5, atol=1e-6)


def test_run_gives_the_output(bench):
    assert_works(bench)


def test_run_gives_each_field_of_a_tuple_and_integers_exactly(bench, rng):
    x = rng.integers(-128, 128, size=(3, 5)).astype("int8")
    top, total = bench.session.run(bench.build("two_outputs"), [x])
    assert top.dtype == np.int8
    np.testing.assert_array_equal(top, np.clip(x, 0, 100))
    np.testing.assert_array_equal(total, x.sum(axis=1, dtype=np.int32))


def test_run_takes_arrays_that_are_not_contiguous(bench, rng):
    x, w = layers_inputs(rng)
    (out,) = bench.session.run(bench.build("layers"), [np.asfortranarray(x), w[:, ::-1]])
    np.testing.assert_allclose(out, expected_layers(x, w[:, ::-1]), rtol=1e-5, atol=1e-6)


def test_run_many_answers_each_input(bench, rng):
    batches = [layers_inputs(rng) for _ in range(4)]
    outputs = bench.session.run_many(bench.build("layers"), batches)
    for inputs, (out,) in zip(batches, outputs, strict=True):
        np.testing.assert_allclose(out, expected_layers(*inputs), rtol=1e-5, atol=1e-6)
    assert bench.session.run_many(bench.build("layers"), []) == []


def test_time_measures_in_the_unit_of_the_device(bench, rng):
    result = bench.session.time(bench.build("layers"), layers_inputs(rng))
    assert result.error is None
    assert result.unit == bench.device.unit
    assert result.value > 0
    assert result.settings == bench.session.settings
    assert result.value == np.median(result.samples)


def test_time_many_fails_alone(bench, rng):
    good, bad = bench.build("layers"), bench.build("segfault")
    inputs = layers_inputs(rng)
    results = bench.session.time_many(
        {"first": (good, inputs), "bad": (bad, [np.ones(1, "float32")]), "last": (good, inputs)}
    )
    assert list(results) == ["first", "bad", "last"]
    assert results["first"].ok
    assert results["last"].ok
    assert results["bad"].error[0] == "crash"
    assert np.isnan(results["bad"].value)
    assert_works(bench)


def test_time_kernels_measures_each_function_alone(bench):
    arguments = [((4096,), "float32")] * 2
    results = bench.session.time_kernels(
        bench.build("kernels"),
        {"absent": arguments, "crash": [((1,), "int32")], "double": arguments},
    )
    assert results["absent"].error[0] == "build"
    assert results["crash"].error[0] == "crash"
    assert "was killed by SIGSEGV" in results["crash"].error[1]
    assert results["double"].error is None
    assert results["double"].value > 0


def test_time_kernels_finds_the_kernels_of_a_network(bench):
    shapes = [((2, 8), "float32"), ((8, 4), "float32"), ((2, 4), "float32")]
    result = bench.session.time_kernels(bench.build("layers"), {"matmul": shapes})["matmul"]
    assert result.error is None
    assert result.value > 0


def other_machine(bench):
    return "emulated-a72" if bench.processor == "local" else "local"


@pytest.mark.parametrize("kind", ["missing", "of_another_machine", "text"])
def test_a_library_that_cannot_be_loaded_is_a_build_failure(bench, build, tmp_path, kind):
    if kind == "missing":
        library = tmp_path / "missing.so"
    elif kind == "text":
        library = tmp_path / "text.so"
        library.write_text("not a library")
    else:
        library = build("layers", other_machine(bench))
    result = bench.session.time(library, [])
    assert result.error[0] == "build"
    assert str(library.name) in result.error[1]
    with pytest.raises(DeviceError, match=library.name):
        bench.session.run(library, [])
    assert_works(bench)


def test_a_library_of_another_machine_names_both(bench, build):
    library = build("layers", other_machine(bench))
    found = "aarch64" if bench.processor == "local" else own_machine()
    with pytest.raises(DeviceError, match=f"built for {found}, but the device is {bench.machine}"):
        bench.session.run(library, [])
    assert_works(bench)


def test_a_library_without_main_is_a_build_failure(bench):
    assert bench.session.time(bench.build("kernels"), []).error[0] == "build"
    assert_works(bench)


def test_wrong_inputs_say_what_is_wrong(bench, rng):
    x, w = layers_inputs(rng)
    result = bench.session.time(bench.build("layers"), [x[:, :7], w])
    assert result.error[0] == "unsupported"
    assert "7 vs. 8" in result.error[1]
    with pytest.raises(DeviceError, match=r"7 vs\. 8"):
        bench.session.run(bench.build("layers"), [x[:, :7], w])
    assert_works(bench)


def test_a_crash_ends_one_call_only(bench):
    library = bench.build("segfault")
    with pytest.raises(DeviceError, match="was killed by SIGSEGV"):
        bench.session.run(library, [np.ones(1, "float32")])
    assert_works(bench)
    result = bench.session.time(library, [np.ones(1, "float32")])
    assert result.error[0] == "crash"
    assert "was killed by SIGSEGV" in result.error[1]
    assert_works(bench)


def test_a_call_that_never_returns_ends_at_the_limit(bench):
    settings = MeasurementSettings(repeat=1, min_repeat_ms=0.0, timeout_s=2.0)
    library = bench.build("hang")
    with bench.device.open(settings) as session:
        assert session.time(library, [np.ones(1, "float32")]).error[0] == "timeout"
        with pytest.raises(DeviceError, match=r"within 2 s"):
            session.run(library, [np.ones(1, "float32")])
        inputs = layers_inputs(np.random.default_rng(2))
        (out,) = session.run(bench.build("layers"), inputs)
        np.testing.assert_allclose(out, expected_layers(*inputs), rtol=1e-5, atol=1e-6)


def test_sessions_at_the_same_time_do_not_meet(bench):
    wrong: list[object] = []
    right: list[int] = []

    def work(seed):
        inputs = layers_inputs(np.random.default_rng(seed))
        with bench.device.open(bench.session.settings) as session:
            for _ in range(3):
                (out,) = session.run(bench.build("layers"), inputs)
                if not np.allclose(out, expected_layers(*inputs), rtol=1e-5, atol=1e-6):
                    wrong.append((seed, out))
        right.append(seed)

    bench.build("layers")
    # Daemons, so that one that hangs fails this test and not the whole run.
    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(3)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PERSISTENCE_LIMIT_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []
    assert sorted(right) == [0, 1, 2]


def test_ended_sessions_give_their_place_back(bench):
    # TVM's table of sessions has 32 places, and a session whose objects are not all collected keeps its own.
    places = set()
    for name in ("layers", "segfault", "layers"):
        inputs = layers_inputs(np.random.default_rng(3)) if name == "layers" else [np.ones(1, "float32")]
        with bench.device.open(bench.session.settings) as session:
            places.add(session._worker.remote._tbl_index)
            try:
                session.run(bench.build(name), inputs)
            except DeviceError:
                assert name == "segfault"
    assert len(places) == 1


def test_close_ends_the_processes(bench):
    session = bench.device.open(bench.session.settings)
    pid = session._worker._process.pid
    directory = session._worker.directory
    os.kill(pid, 0)
    session.close()
    session.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not directory.exists()


def test_a_session_that_nobody_closes_ends_when_it_is_forgotten(bench):
    session = bench.device.open(bench.session.settings)
    pid, directory = session._worker._process.pid, session._worker.directory
    del session
    assert _ends(pid)
    assert not directory.exists()


def test_processes_end_with_whoever_started_them():
    program = (
        "import time\n"
        "from tvm_compress.rpc.device import open_device\n"
        "session = open_device('emulated-a72').open()\n"
        "print(session._worker._process.pid, session._worker.directory, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, directory = parent.stdout.readline().split()
        os.kill(int(pid), 0)
        parent.send_signal(signal.SIGKILL)
    try:
        assert _ends(int(pid))
    finally:
        for file in Path(directory).glob("*"):
            file.unlink()
        Path(directory).rmdir()


def _ends(pid: int) -> bool:
    deadline = time.monotonic() + PERSISTENCE_LIMIT_S
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_describe_says_where_figures_come_from(bench):
    description = bench.device.describe()
    assert description["device"] == bench.device.name
    assert description["unit"] == bench.device.unit
    assert {"processor", "threads", "tvm"} <= set(description)


def test_measure_compares_with_the_reference(bench, rng):
    library = bench.build("layers")
    libraries = {"dense": library, "small": library, "gone": Path("gone.so")}
    measured = measure(bench.session, libraries, layers_inputs(rng), reference="dense")
    assert measured["dense"].ratio == 1.0
    assert measured["small"].ratio == latency_ratio(measured["small"].result, measured["dense"].result)
    assert measured["gone"].ratio is None
    assert not measured["gone"].result.ok


def test_an_unknown_device_is_named():
    with pytest.raises(DeviceError, match=r"`local`, `emulated-a72`, tracker://.* or ssh://"):
        open_device("toaster")
    assert isinstance(open_device("local", threads=2), Device)


def test_the_key_is_not_for_everybody(bench):
    session = bench.session
    worker = session._start()
    try:
        arguments = Path(f"/proc/{worker._process.pid}/cmdline").read_bytes()
        environment = Path(f"/proc/{worker._process.pid}/environ").read_bytes()
        key = dict(e.split(b"=", 1) for e in environment.split(b"\0") if e)[b"TVM_COMPRESS_RPC_KEY"]
        assert len(key) == 32
        assert key not in arguments
    finally:
        worker.close()


def test_too_many_to_interleave_is_refused(tmp_path):
    with open_device("local").open() as session, pytest.raises(SettingError, match="not 25"):
        session.time_many({str(i): (tmp_path, []) for i in range(25)})
