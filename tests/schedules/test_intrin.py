"""The tensor intrinsics: registered once, and described as the kernels take them."""

import pytest
from tvm.s_tir import TensorIntrin

from tvm_compress.schedules.intrin import bits, dot

ISAS = ["avx512vnni", "avx512", "avx2", "x86", "a72", "neon", "neon_dot"]


@pytest.mark.parametrize("isa", ISAS)
def test_dot_products_are_registered_and_consistent(isa: str) -> None:
    chosen = dot.dot_for(isa)
    assert dot.dot_for(isa) is chosen
    intrinsic = TensorIntrin.get(chosen.name)
    for func in (intrinsic.desc, intrinsic.impl):
        script = func.script()
        inner = ", ".join(str(extent) for extent in chosen.inner_shape)
        assert f'A: T.Buffer(({chosen.depth},), "{chosen.data_dtype}"' in script
        assert f'B: T.Buffer(({inner}), "{chosen.weight_dtype}"' in script
        assert f'C: T.Buffer(({chosen.lanes},), "int32", scope="local"' in script


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_offsets_bring_activations_into_the_stored_type(isa: str, dtype: str) -> None:
    chosen = dot.dot_for(isa)
    low, high = (-128, 127) if dtype == "int8" else (0, 255)
    stored = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-(2**15), 2**15 - 1)}[chosen.data_dtype]
    offset = chosen.offset(dtype)
    assert stored[0] <= low + offset <= high + offset <= stored[1]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("operation", ["and", "xor"])
def test_bit_steps_are_registered_and_divide_the_channels(isa: str, operation: str) -> None:
    for channels in (8, 16, 24):
        chosen = bits.bit_dot_for(isa, operation, channels)
        assert channels % chosen.lanes == 0
        assert TensorIntrin.get(chosen.count)
        assert TensorIntrin.get(chosen.weigh)


def test_counts_cannot_overflow_their_bytes() -> None:
    assert bits.MAX_STEPS * 8 <= 255 < (bits.MAX_STEPS + 1) * 8
