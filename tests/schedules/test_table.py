"""Tables of functions of 8-bit integers: exact for every input, by vector instructions if there are any."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from tests.schedules.test_elementwise import build, run, unary
from tvm_compress.errors import KernelError
from tvm_compress.schedules import ops, reference
from tvm_compress.schedules.target_rules import parse_target

BYTES = st.sampled_from(["int8", "uint8"])


def table_of(values):
    return lambda _, x: ops.call("table", [x, relax.const(values)])


def any_values(dtype, seed=0):
    limits = np.iinfo(dtype)
    return np.random.default_rng(seed).integers(limits.min, limits.max, 256, dtype, endpoint=True)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("result", ["int8", "uint8", "int32"])
def test_every_input_has_its_value(dtype, result):
    x = np.arange(256).astype(np.uint8).view(dtype)
    values = any_values(result)
    found = run(unary(x.shape, dtype, table_of(values)), x)
    assert found.dtype == np.dtype(result)
    np.testing.assert_array_equal(found, reference.table(x, values))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), BYTES, BYTES, st.integers(0, 99))
def test_any_number_of_values_is_exact(shape, dtype, result, seed):
    limits = np.iinfo(dtype)
    shape = (*shape[:2], *(min(extent, 7) for extent in shape[2:]))
    x = np.random.default_rng(seed).integers(limits.min, limits.max, shape, dtype, endpoint=True)
    values = any_values(result, seed)
    found = run(unary(shape, dtype, table_of(values)), x)
    np.testing.assert_array_equal(found, reference.table(x, values))


def test_large_tensors_are_exact():
    # Enough for several threads, and no multiple of a step.
    x = np.random.default_rng(0).integers(-128, 128, (1, 33, 31, 37)).astype(np.int8)
    values = any_values("int8")
    found = run(unary(x.shape, "int8", table_of(values)), x)
    np.testing.assert_array_equal(found, reference.table(x, values))


@pytest.mark.parametrize(("dtype", "count"), [("int32", 256), ("int8", 255)])
def test_tables_are_of_all_bytes(dtype, count):
    values = np.zeros(count, np.int8)
    with pytest.raises(KernelError, match=f"256 values for int8 or uint8, not .{count},. for {dtype}"):
        build(unary((1, 8), dtype, table_of(values)))


@pytest.mark.parametrize(
    ("target", "instruction", "size", "there"),
    [
        ("raspberry-pi/4b-aarch64", "tbx", 1000, True),
        ("llvm -mcpu=haswell -mtriple=x86_64-linux-gnu", "vpshufb", 1000, True),
        ("llvm -mcpu=skylake-avx512 -mtriple=x86_64-linux-gnu", "vpshufb", 1000, True),
        # One vector and no more; less than one; a processor without the instruction.
        ("raspberry-pi/4b-aarch64", "tbx", 16, True),
        ("raspberry-pi/4b-aarch64", "tbx", 15, False),
        ("llvm -mcpu=x86-64 -mtriple=x86_64-linux-gnu", "pshufb", 1000, False),
    ],
)
def test_vectors_are_looked_up(target, instruction, size, there):
    module = unary((size,), "int8", table_of(any_values("int8")))
    assembly = build(module, parse_target(target)).mod.imports[0].inspect_source("asm")
    assert (f"\t{instruction}\t" in assembly) == there
