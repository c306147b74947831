"""The estimate counts exactly, repeats to the bit and refuses what the core lacks."""

import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_compress.errors import DeviceError, SettingError
from tvm_compress.rpc.cost_a72 import BlockModel, estimate, read_counts, split_blocks
from tvm_compress.rpc.device import DeviceFailedError, MeasurementSettings, open_device
from tvm_compress.rpc.elf import Code, read_code
from tvm_compress.rpc.emulation_kit import prepare

NOP, RET, BRANCH_BACK = 0xD503201F, 0xD65F03C0, 0x54FFFFE1  # b.ne .-4
ADD_ONE = 0x91000400  # add x0, x0, #1


@pytest.fixture(scope="module")
def session():
    with open_device("emulated-a72").open(MeasurementSettings(timeout_s=20.0)) as opened:
        yield opened


@pytest.fixture
def model(tmp_path):
    kit = prepare()
    return BlockModel(kit.mc, kit.mca, tmp_path / "blocks")


def words(*values):
    return np.array(values, dtype=np.uint32)


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
    with open_device("emulated-a72").open() as other:
        other.run(library, inputs)
        again = other.time_many({"a": (library, inputs), "b": (library, inputs)})
    assert first.error is None
    for result in again.values():
        assert result.value == first.value
        assert result.kernels == first.kernels
        assert result.counters == first.counters


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
    file.write_text("10040 4 10\n10048 2 3\n90000 7 1\nEND\n")
    assert read_counts(file, code, 0x10000).tolist() == [10, 10, 13, 13]


@pytest.mark.parametrize("text", ["", "10040 4 10\n", "10040 4 10\nEN"])
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
    model._path.write_bytes(b"no database" * 100)
    again = BlockModel(model._mc, model._mca, model._path.parent)
    assert again.cycles([block]) == first
    assert BlockModel(model._mc, model._mca, model._path.parent)._read_stored([block]) == first


def test_instructions_that_llvm_does_not_know_are_an_error(model):
    with pytest.raises(DeviceError, match="llvm-mc"):
        model.cycles([words(0x00000000, 0xFFFFFFFF).tobytes()])


def test_estimate_sums_blocks_and_leaves_the_rest_at_one_cycle(model):
    code = Code(0, words(NOP, ADD_ONE, BRANCH_BACK, RET), ((0, "a"),))
    counts = np.array([1, 100_000, 100_000, 1])
    cost = estimate(code, counts, model)
    loop = words(ADD_ONE, BRANCH_BACK).tobytes()
    assert cost.instructions == 200_002
    assert cost.covered == 200_000
    assert cost.cycles == float(100_000 * model.cycles([loop])[loop] + Fraction(2))
    assert cost.kernels == {"a": cost.cycles}


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
    program.write_text(
        ".globl _start\n_start: mov x8, #0xa72\nmov x0, #1\nsvc #0\n"
        "mov x9, #77\n1: subs x9, x9, #1\nb.ne 1b\n"
        "mov x8, #0xa72\nmov x0, #2\nmov x1, #5\nsvc #0\nmov x8, #93\nmov x0, #0\nsvc #0\n"
    )
    subprocess.run(
        ["aarch64-linux-gnu-gcc", "-nostdlib", "-static", "-o", tmp_path / "loop", program], check=True
    )
    for name, path in (("inline", kit.plugin), ("callback", plugin)):
        counts = f"{path},out={tmp_path / name}"
        subprocess.run([kit.qemu, "-plugin", counts, tmp_path / "loop"], check=True)
    assert (tmp_path / "inline.5").read_text() == (tmp_path / "callback.5").read_text()
    assert " 2 76\n" in (tmp_path / "inline.5").read_text()
