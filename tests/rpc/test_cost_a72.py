"""The estimate counts exactly, repeats to the bit and refuses what the core lacks."""

import dataclasses
import json
import re
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_compress.errors import DeviceError, SettingError
from tvm_compress.rpc import emulation_kit
from tvm_compress.rpc.block_model import BlockModel
from tvm_compress.rpc.cost_a72 import (
    L1_MISS_CYCLES,
    L2_BYTES,
    L2_MISS_CYCLES,
    LINE_BYTES,
    Counts,
    KernelCost,
    estimate,
    read_counts,
    split_blocks,
)
from tvm_compress.rpc.device import DeviceFailedError, MeasurementSettings, open_device
from tvm_compress.rpc.elf import Code, read_code
from tvm_compress.rpc.emulated_a72 import EmulatedA72, EmulatedSession, worker_command
from tvm_compress.rpc.emulation_kit import prepare

NOP, RET, BRANCH_BACK = 0xD503201F, 0xD65F03C0, 0x54FFFFE1  # b.ne .-4
ADD_ONE = 0x91000400  # add x0, x0, #1


def test_the_caches_are_those_that_are_emulated():
    header = Path(emulation_kit.__file__).with_name("native") / "caches.h"
    said = {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)", header.read_text())}
    assert 1 << said["LINE_BITS"] == LINE_BYTES
    assert said["L2_SETS"] * said["L2_WAYS"] * LINE_BYTES == L2_BYTES


@pytest.fixture(scope="module")
def session():
    with EmulatedA72(remember=False).open(MeasurementSettings(timeout_s=20.0)) as opened:
        yield opened


@pytest.fixture
def model(tmp_path):
    kit = prepare()
    return BlockModel(kit.mc, kit.mca, tmp_path / "blocks")


def words(*values):
    return np.array(values, dtype=np.uint32)


def counts_of(*executed, l1=None, l2=None):
    """Make counts of instructions; misses are given as {index: number}."""
    arrays = [np.array(executed, dtype=np.int64)]
    for misses in (l1 or {}, l2 or {}):
        arrays.append(np.zeros(len(executed), dtype=np.int64))
        for index, number in misses.items():
            arrays[-1][index] = number
    return Counts(*arrays)


# Puts the address of the data of the kernel's first argument in x9.
DATA = "ldr x9, [x1, #8]\nldr x9, [x9]"


def sweep(instruction, step, steps, rounds=1):
    """Assembly that does something at x10 = data, data + step, ..., all over again `rounds` times."""
    return (
        f"{DATA}\nmov x13, #{rounds}\n"
        f"2: mov x10, x9\nmov x11, #{steps}\n1: {instruction}\nadd x10, x10, #{step}\n"
        "subs x11, x11, #1\nb.ne 1b\nsubs x13, x13, #1\nb.ne 2b"
    )


def misses_of(session, library, size):
    result = session.time_kernels(library, {"hand": [((size,), "int8")]})["hand"]
    assert result.error is None
    return result.counters["l1_misses"], result.counters["l2_misses"]


def test_a_loop_is_counted_to_the_instruction(session, assemble):
    library = assemble("mov x9, #1000\n1: subs x9, x9, #1\nb.ne 1b")
    result = session.time_kernels(library, {"hand": []})["hand"]
    assert result.error is None
    assert result.counters["instructions"] == 1 + 2 * 1000 + 2
    assert set(result.kernels) == {"hand"}


def test_dependent_work_costs_more_than_independent_work(session, assemble):
    loop = "mov x9, #1000\n1: {}\nsubs x9, x9, #1\nb.ne 1b"
    chain = assemble(loop.format("\n".join(["fmul v0.4s, v0.4s, v1.4s"] * 4)))
    slow = session.time_kernels(chain, {"hand": []})["hand"]
    four = assemble(loop.format("\n".join(f"fmul v{i}.4s, v{i + 4}.4s, v{i + 4}.4s" for i in range(4))))
    fast = session.time_kernels(four, {"hand": []})["hand"]
    assert slow.counters["instructions"] == fast.counters["instructions"]
    assert slow.value > 2 * fast.value


def test_instructions_that_the_core_lacks_are_a_crash(session, assemble):
    result = session.time_kernels(assemble("sdot v0.4s, v1.16b, v2.16b"), {"hand": []})["hand"]
    assert result.error[0] == "crash"
    assert "SIGILL" in result.error[1]


def test_the_same_figure_to_the_bit(session, build):
    inputs = [np.ones((2, 8), "float32"), np.ones((8, 4), "float32")]
    library = build("layers", "emulated-a72")
    first = session.time(library, inputs)
    with EmulatedA72(remember=False).open() as other:
        other.run(library, inputs)
        again = other.time_many({"a": (library, inputs), "b": (library, inputs)})
    assert first.error is None
    for result in again.values():
        assert result.value == first.value
        assert result.kernels == first.kernels
        assert result.counters == first.counters
        assert result.breakdown == first.breakdown


@pytest.mark.parametrize(
    ("kilobytes", "expected"),
    [(16, (0, 0)), (32, (0, 0)), (64, (1024, 0)), (1024, (16384, 0)), (2048, (32768, 32768))],
)
def test_what_fits_into_a_cache_stays_there(session, assemble, kilobytes, expected):
    # Least recently used: going round more than fits, each line leaves just before its turn.
    library = assemble(sweep("ldr x12, [x10]", 64, kilobytes * 16))
    assert misses_of(session, library, kilobytes * 1024) == expected


def test_each_line_is_fetched_once_however_it_is_touched(session, assemble):
    lines = 1024  # twice the first cache
    assert misses_of(session, assemble(sweep("str x12, [x10]", 64, lines)), 64 * lines) == (lines, 0)
    assert misses_of(session, assemble(sweep("ldr q0, [x10]", 16, 4 * lines)), 64 * lines) == (lines, 0)
    assert misses_of(session, assemble(sweep("prfm pldl1keep, [x10]", 64, lines)), 64 * lines) == (0, 0)


def test_an_access_across_two_lines_touches_both(session, assemble):
    # At 61, 189, ...: 4 bytes of which the last is in the next line; every line is touched.
    library = assemble(sweep("ldur w12, [x10, #61]", 128, 512))
    assert misses_of(session, library, 128 * 512) == (1024, 0)


@pytest.mark.parametrize(("ways", "missing"), [(2, False), (3, True)])
def test_two_lines_of_a_set_fit_and_three_do_not(session, assemble, ways, missing):
    # 16 KB apart is one set of the first cache, once the first loop has numbered the pages in order.
    first = sweep("ldr x12, [x10]", 4096, 4 * ways)
    again = sweep("ldr x12, [x10]", 16384, ways, rounds=1000).removeprefix(DATA)
    l1, l2 = misses_of(session, assemble(f"{first}\n{again}"), 16384 * ways)
    assert (l1 >= 3000) == missing
    assert (l1 <= 3) == (not missing)
    assert l2 == 0


def test_memory_that_is_no_tensor_is_free(session, assemble):
    body = "sub sp, sp, #65536\nmov x13, #10\n2: mov x10, sp\nmov x11, #1024\n1: str x12, [x10], #64\n"
    body += "subs x11, x11, #1\nb.ne 1b\nsubs x13, x13, #1\nb.ne 2b\nadd sp, sp, #65536"
    assert misses_of(session, assemble(body.replace("#65536", "#16, lsl #12")), 8) == (0, 0)


def test_a_kernel_takes_its_memorys_cycles_or_its_instructions(session, assemble):
    streams = assemble(sweep("ldr x12, [x10]", 64, 32768))
    result = session.time_kernels(streams, {"hand": [((2 << 20,), "int8")]})["hand"]
    part = result.breakdown["hand"]
    assert part["memory_cycles"] == (L1_MISS_CYCLES + L2_MISS_CYCLES) * 32768 > part["compute_cycles"] > 0
    assert result.value == part["cycles"] == part["memory_cycles"]
    computes = assemble(sweep("fmul v0.4s, v0.4s, v1.4s\n" * 12, 64, 1024))
    result = session.time_kernels(computes, {"hand": [((65536,), "int8")]})["hand"]
    part = result.breakdown["hand"]
    assert part["memory_cycles"] == 0
    assert result.value == part["cycles"] == part["compute_cycles"]


def test_the_figure_does_not_show_where_memory_lies(build, monkeypatch):
    # Stack, heap and mapped files lie elsewhere with another environment and stack; the figure is the same.
    inputs = [np.ones((2, 8), "float32"), np.ones((8, 4), "float32")]
    library, kit, found = build("layers", "emulated-a72"), prepare(), []
    for padding, options in (("", []), ("x" * 1001, []), ("", ["-s", "67112960"])):

        def moved(kit, counting, padding=padding, options=options):
            command, environment = worker_command(kit, counting)

            def run(directory):
                emulator, *rest = command(directory)
                return [emulator, *options, *rest]

            return run, environment | {"PADDING": padding}

        monkeypatch.setattr("tvm_compress.rpc.emulated_a72.worker_command", moved)
        with EmulatedSession(MeasurementSettings(), kit) as moved_session:
            found.append(moved_session.time(library, inputs))
    assert found[0].error is None
    assert found[0] == found[1] == found[2]


def test_a_kernels_figure_does_not_show_what_was_measured_before_it(session, build):
    library = build("layers", "emulated-a72")
    small = [((2, 8), "float32"), ((8, 4), "float32"), ((2, 4), "float32")]
    kernels = {"matmul": small, "relu": [small[2], small[2]]}
    both = session.time_kernels(library, kernels)
    backwards = session.time_kernels(library, dict(reversed(kernels.items())))
    assert both == backwards
    assert session.time_kernels(library, {"relu": kernels["relu"]})["relu"] == both["relu"]


def test_a_counting_process_that_died_between_two_libraries_is_replaced(build):
    library = build("layers", "emulated-a72")
    kernels = {"relu": [((2, 4), "float32"), ((2, 4), "float32")]}
    session = EmulatedSession(MeasurementSettings(), prepare())
    with session:
        first = session.time_kernels(library, kernels)
        counter = session._counter
        assert counter is not None
        counter._process.kill()
        counter._process.wait()
        assert session.time_kernels(library, kernels) == first


def test_a_figure_is_found_again_and_only_for_the_same_question(build, tmp_path, monkeypatch):
    inputs = [np.ones((2, 8), "float32"), np.ones((8, 4), "float32")]
    library, kit = build("layers", "emulated-a72"), prepare()
    monkeypatch.setattr(
        "tvm_compress.rpc.emulated_a72.prepare", lambda: dataclasses.replace(kit, cache=tmp_path)
    )
    quick = MeasurementSettings(timeout_s=21.0)
    with open_device("emulated-a72").open(quick) as session:
        first = session.time(library, inputs)
        (file,) = (tmp_path / "results").iterdir()
        # What stands in the file is the answer: nothing is emulated.
        file.write_text(json.dumps(first.to_dict() | {"value": 7.0}))
        assert session.time(library, inputs).value == 7.0
        assert session.time(library, inputs).settings == quick
        # Other values, another function, a library with another byte: other questions.
        assert session.time(library, [inputs[0] + 1, inputs[1]]).value == first.value
        assert session.time_kernels(library, {"relu": [((2, 4), "float32")] * 2})["relu"].value != 7.0
        other = tmp_path / "other.so"
        other.write_bytes(library.read_bytes() + b"\0")
        assert session.time(other, inputs).value == first.value
        assert len(list((tmp_path / "results").iterdir())) == 4
        # A damaged file is as if it were not there, and failures are not kept.
        file.write_text("{")
        assert session.time(library, inputs) == first
        assert not session.time(tmp_path / "missing.so", inputs).ok
        assert len(list((tmp_path / "results").iterdir())) == 4
    assert not list(tmp_path.glob("results/.part-*"))


def test_kernels_add_up_and_own_their_parallel_loops(session, build):
    library = build("kernels", "emulated-a72")
    result = session.time_kernels(library, {"double": [((4096,), "float32")] * 2})["double"]
    assert sum(result.kernels.values()) == pytest.approx(result.value, rel=1e-12)
    # The body of T.parallel is a function without a symbol.
    assert result.kernels["double"] > 0.99 * result.value
    assert result.counters["covered_instructions"] >= 0.999 * result.counters["instructions"]
    assert result.samples == (result.value,)
    assert result.spread == 0.0


def test_more_work_costs_more(session, build):
    library = build("layers", "emulated-a72")
    small = [((2, 8), "float32"), ((8, 4), "float32"), ((2, 4), "float32")]
    results = session.time_kernels(library, {"matmul": small, "relu": [small[2], small[2]]})
    assert results["matmul"].value > results["relu"].value > 0


def test_one_thread_only():
    with pytest.raises(SettingError, match="1 thread"):
        open_device("emulated-a72", threads=2)
    with pytest.raises(SettingError, match="1 thread"):
        open_device("emulated-a72").open(MeasurementSettings(threads=2))


def test_blocks_end_at_branches_owners_and_other_counts():
    code = Code(0x100, words(NOP, ADD_ONE, BRANCH_BACK, NOP, RET, NOP, NOP), ((0x100, "a"), (0x118, "b")))
    blocks = split_blocks(code, np.array([1, 5, 5, 1, 1, 1, 1]))
    assert [(b.address, len(b.words) // 4, b.count) for b in blocks] == [
        (0x100, 1, 1),
        (0x104, 2, 5),
        (0x10C, 2, 1),
        (0x114, 1, 1),
        (0x118, 1, 1),
    ]
    assert split_blocks(code, np.zeros(7, dtype=np.int64)) == []


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    data=st.data(),
)
def test_blocks_keep_every_execution(counts, data):
    chosen = [data.draw(st.sampled_from([NOP, RET, BRANCH_BACK, ADD_ONE])) for _ in counts]
    blocks = split_blocks(Code(0, words(*chosen), ((0, "a"),)), np.array(counts))
    rebuilt = np.zeros(len(counts), dtype=np.int64)
    for block in blocks:
        first, size = block.address // 4, len(block.words) // 4
        assert block.words == words(*chosen[first : first + size]).tobytes()
        assert all(word not in (RET, BRANCH_BACK) for word in chosen[first : first + size - 1])
        rebuilt[first : first + size] += block.count
    assert rebuilt.tolist() == counts
    assert sum(block.instructions for block in blocks) == sum(counts)


def test_counts_add_up_over_overlapping_blocks(tmp_path):
    code = Code(0x40, words(*[NOP] * 4), ())
    file = tmp_path / "counts"
    file.write_text(
        "block 10040 4 10\nblock 10048 2 3\nblock 90000 7 1\nmisses 10048 5 2\nmisses 90000 1 1\nEND\n"
    )
    counts = read_counts(file, code, 0x10000)
    assert counts.executed.tolist() == [10, 10, 13, 13]
    assert counts.l1_misses.tolist() == [0, 0, 5, 0]
    assert counts.l2_misses.tolist() == [0, 0, 2, 0]


@pytest.mark.parametrize("text", ["", "block 10040 4 10\n", "block 10040 4 10\nEN"])
def test_incomplete_counts_are_refused(tmp_path, text):
    file = tmp_path / "counts"
    file.write_text(text)
    with pytest.raises(DeviceError, match="incomplete"):
        read_counts(file, Code(0, words(NOP), ()), 0)


def test_counts_that_were_not_written_are_refused(tmp_path):
    with pytest.raises(DeviceError, match="no counts"):
        read_counts(tmp_path / "counts", Code(0, words(NOP), ()), 0)


def test_cycles_do_not_depend_on_what_is_asked_with_them(model, tmp_path):
    chain = words(*[ADD_ONE] * 8).tobytes()
    alone = model.cycles([chain])[chain]
    fresh = BlockModel(model._mc, model._mca, tmp_path / "other")
    others = {words(*[NOP] * n, BRANCH_BACK).tobytes() for n in (1, 40, 700)}
    assert fresh.cycles({chain, *others})[chain] == alone
    # One addition after the other, each of one cycle.
    assert alone == pytest.approx(8, rel=0.05)


def test_a_damaged_cache_of_cycles_is_made_anew(model):
    block = words(NOP, RET).tobytes()
    first = model.cycles([block])
    model.path.write_bytes(b"no database" * 100)
    again = BlockModel(model._mc, model._mca, model.path.parent)
    assert again.cycles([block]) == first
    assert BlockModel(model._mc, model._mca, model.path.parent)._read_stored([block]) == first


def test_instructions_that_llvm_does_not_know_are_an_error(model):
    with pytest.raises(DeviceError, match="llvm-mc"):
        model.cycles([words(0x00000000, 0xFFFFFFFF).tobytes()])


def test_estimate_sums_blocks_and_leaves_the_rest_at_one_cycle(model):
    code = Code(0, words(NOP, ADD_ONE, BRANCH_BACK, RET), ((0, "a"),))
    cost = estimate(code, counts_of(1, 100_000, 100_000, 1), model)
    loop = words(ADD_ONE, BRANCH_BACK).tobytes()
    assert cost.total("instructions") == 200_002
    assert cost.covered == 200_000
    assert cost.cycles == float(100_000 * model.cycles([loop])[loop] + Fraction(2))
    assert set(cost.kernels) == {"a"}


def test_misses_are_of_the_kernel_whose_instructions_had_them(model):
    code = Code(0, words(NOP, RET, NOP, RET), ((0, "a"), (8, "b")))
    cost = estimate(code, counts_of(1, 1, 1, 1, l1={0: 2, 2: 30, 3: 1}, l2={3: 1}), model)
    assert cost.kernels["a"].l1_misses == 2
    assert cost.kernels["b"] == KernelCost(2, cost.kernels["b"].compute_cycles, 31, 1)
    assert cost.total("l1_misses") == 33
    # The larger of both, by kernel.
    assert cost.kernels["b"].cycles == 31 * L1_MISS_CYCLES + L2_MISS_CYCLES
    assert cost.cycles == float(sum(kernel.cycles for kernel in cost.kernels.values()))


def test_read_code_names_each_kernels_code(build):
    code = read_code(build("layers", "emulated-a72"))
    owners = {name for _, name in code.owners}
    assert {"matmul", "relu", "other"} <= owners
    assert code.owner(0) == "other"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_read_code_refuses_damaged_files(data, build, tmp_path_factory):
    whole = Path(build("layers", "emulated-a72")).read_bytes()
    at = data.draw(st.integers(0, 63) | st.integers(0, len(whole) - 1))
    size = data.draw(st.integers(0, len(whole)))
    damaged = bytearray(whole[:size])
    if at < size:
        damaged[at] ^= data.draw(st.integers(1, 255))
    file = tmp_path_factory.mktemp("damaged") / "library.so"
    file.write_bytes(bytes(damaged))
    try:
        read_code(file)
    except DeviceFailedError as error:
        kind = error.kind
    else:
        kind = "build"
    assert kind == "build"


# Says what is to be counted, stores to 77 lines, ends, and stores to more of them.
PLUGIN_PROGRAM = """
.bss
.balign 4096
memory: .skip 8192
.text
tell: mov x8, #0xa72
svc #0
ret
.globl _start
_start: mov x0, #1
adr x1, loop
adr x2, loop_end
bl tell
mov x0, #2
adrp x1, memory
add x2, x1, #8192
bl tell
mov x0, #3
bl tell
adrp x10, memory
mov x9, #77
bl loop
mov x0, #5
mov x1, #5
bl tell
mov x9, #20
bl loop
mov x8, #93
mov x0, #0
svc #0
loop: str x9, [x10], #64
subs x9, x9, #1
b.ne loop
ret
loop_end:
"""


def test_the_plugin_counts_alike_through_either_interface(tmp_path, session, assemble):
    # QEMU 9 has only callbacks; this emulator has both, under its own version number.
    kit = prepare()
    native = Path(__file__).parents[2] / "rpc" / "native"
    source = (native / "counting_plugin.c").read_text()
    source = source.replace("qemu_plugin_version = PLUGIN_VERSION", "qemu_plugin_version = 1")
    (tmp_path / "plugin.c").write_text(source)
    plugin = tmp_path / "plugin.so"
    subprocess.run(
        ["gcc", "-DPLUGIN_VERSION=2", f"-I{native}", "-shared", "-fPIC", "-o", plugin, tmp_path / "plugin.c"],
        check=True,
    )
    program = tmp_path / "loop.s"
    program.write_text(PLUGIN_PROGRAM)
    subprocess.run(
        ["aarch64-linux-gnu-gcc", "-nostdlib", "-static", "-o", tmp_path / "loop", program], check=True
    )
    for name, path in (("inline", kit.plugin), ("callback", plugin)):
        counts = f"{path},out={tmp_path / name}"
        subprocess.run([kit.qemu, "-plugin", counts, tmp_path / "loop"], check=True)
    found = (tmp_path / "inline.5").read_text()
    assert found == (tmp_path / "callback.5").read_text()
    assert " 3 77\n" in found
    # 77 lines were stored to, cold; what came after the end was not counted.
    assert " 77 77\nEND" in found
