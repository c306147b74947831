import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.target import Target

from tvm_compress.errors import KernelError
from tvm_compress.schedules import ops
from tvm_compress.schedules.apply import kernel_infos, lower_to_kernels
from tvm_compress.schedules.codebook import pack_indices, stored_bits
from tvm_compress.schedules.target_rules import parse_target


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 4), st.integers(0, 99))
def test_packed_indices_come_back(bits: int, width: int, seed: int) -> None:
    shape = (3, width * 8 // bits)
    indices = np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)
    packed = pack_indices(indices, bits)
    assert packed.shape == (3, width)
    columns = np.arange(shape[1])
    back = packed[:, columns % width] >> (columns // width * bits) & (2**bits - 1)
    np.testing.assert_array_equal(back, indices)


def test_stored_bits() -> None:
    assert [stored_bits(n) for n in (1, 2, 3, 4, 7, 16, 17, 256)] == [1, 1, 2, 2, 4, 4, 8, 8]
    with pytest.raises(KernelError, match="256"):
        stored_bits(257)


def module(lookup_is_constant: bool) -> object:
    ops.register()
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 6), "float32"))
    indices = relax.const(np.zeros((4, 6), "uint8"))
    codebook = relax.Var("c", relax.TensorType((1, 2), "float32"))
    constant = relax.const(np.array([[1.0, 2.0]], "float32"))
    with builder.function("main", [x] if lookup_is_constant else [x, codebook]):
        with builder.dataflow():
            book = constant if lookup_is_constant else codebook
            w = builder.emit(ops.call("lookup", [indices, book], axis=0))
            y = builder.emit_output(relax.op.matmul(x, builder.emit(relax.op.permute_dims(w))))
        builder.emit_func_output(y)
    return builder.finalize()


def test_one_kernel_expands_and_one_multiplies() -> None:
    target: Target = parse_target("host")
    infos = kernel_infos(lower_to_kernels(module(True), target), target)
    assert sorted(info.kind for info in infos) == ["dense_fp32", "lookup"]
    expansion = next(info for info in infos if info.kind == "lookup")
    assert expansion.name.startswith("lookup_weights")
    assert expansion.features["weight_bytes"] < 4 * expansion.features["output_bytes"]


def test_a_codebook_must_be_constant() -> None:
    with pytest.raises(KernelError, match="constant"):
        lower_to_kernels(module(False), parse_target("host"))
