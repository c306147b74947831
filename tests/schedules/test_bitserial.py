"""Bit-serial kernels against the integer reference, to the last bit, and the rules that they follow."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from tvm_compress.errors import KernelError
from tvm_compress.schedules import bitserial, ops, packing, reference, target_rules
from tvm_compress.schedules.apply import lower_to_kernels
from tvm_compress.schedules.bitpack import packing_kernel
from tvm_compress.schedules.intrin.bits import MAX_STEPS
from tvm_compress.schedules.target_rules import parse_target, rules_for

HOST = "host"
A72 = "raspberry-pi/4b-aarch64"


@pytest.fixture(autouse=True, scope="module")
def count_always() -> Iterator[None]:
    """Count bits even where something else is faster (test_narrow.py and test_lookup.py test that)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target_rules, "_LOOKUP", {})
        patch.setattr(target_rules, "_POPCOUNT_BITS", dict.fromkeys(target_rules._POPCOUNT_BITS, 36))
        yield


def make_site(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, bits: tuple[int, int], **attrs: Any
) -> tvm.IRModule:
    """A module of one bit-serial layer; `bits` are those of activations and weights."""
    common = {"zero_point": 0, "scheme": "bitserial", "activation_bits": bits[0], "weight_bits": bits[1]}
    if w.ndim == 4:
        common |= {"strides": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1}
    operator = "conv2d" if w.ndim == 4 else "dense"
    data = relax.Var("x", relax.TensorType(x.shape, str(x.dtype)))
    bb = relax.BlockBuilder()
    with bb.function("main", [data]):
        with bb.dataflow():
            call = ops.call(operator, [data, relax.const(w), relax.const(b)], **(common | attrs))
            result = bb.emit_output(call)
        bb.emit_func_output(result)
    return bb.get()


def compile_for(module: tvm.IRModule, target: str) -> relax.VMExecutable:
    parsed = parse_target(target)
    return relax.build(lower_to_kernels(module, parsed), target=parsed)


def run(module: tvm.IRModule, x: np.ndarray, target: str = HOST) -> np.ndarray:
    machine = relax.VirtualMachine(compile_for(module, target), tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x)).numpy()


def random_site(
    rng: np.random.Generator, x_shape: tuple[int, ...], w_shape: tuple[int, ...], bits: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = rng.integers(0, 2 ** bits[0], x_shape).astype(np.uint8)
    limit = 2 ** (bits[1] - 1) - 1
    w = rng.choice([-1, 1], w_shape) if bits[1] == 1 else rng.integers(-limit, limit + 1, w_shape)
    return x, w.astype(np.int8), rng.integers(-500, 500, w_shape[0]).astype(np.int32)


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    size = st.integers(kernel + stride, 8)
    activation_bits = draw(st.integers(1, 6))
    return {
        "x_shape": (draw(st.integers(1, 2)), draw(size), draw(size), 32 * draw(st.integers(1, 4))),
        "out_channels": 8 * draw(st.integers(1, 5)),
        "kernel": kernel,
        "bits": (activation_bits, draw(st.integers(1, 6))),
        "strides": [stride, stride],
        "padding": [draw(st.integers(0, 1)) for _ in range(4)],
        "zero_point": draw(st.integers(0, 2**activation_bits - 1)),
        "seed": draw(st.integers(0, 99)),
    }


@given(convolutions())
@settings(max_examples=12, deadline=None)
def test_any_legal_convolution_is_exact(site: dict[str, Any]) -> None:
    geometry = {key: site[key] for key in ("strides", "padding", "zero_point")}
    w_shape = (site["out_channels"], site["x_shape"][3], site["kernel"], site["kernel"])
    x, w, b = random_site(np.random.default_rng(site["seed"]), site["x_shape"], w_shape, site["bits"])
    np.testing.assert_array_equal(
        run(make_site(x, w, b, site["bits"], **geometry), x), reference.conv2d(x, w, b, **geometry)
    )


@pytest.mark.parametrize("bits", [(1, 1), (6, 1), (2, 2), (6, 6)])
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_values_are_exact(bits: tuple[int, int], sign: int) -> None:
    # 9 * 8 words of 32 channels: many more than 8-bit lanes can count at once.
    x = np.full((1, 4, 4, 256), 2 ** bits[0] - 1, np.uint8)
    w = np.full((16, 256, 3, 3), sign * max(1, 2 ** (bits[1] - 1) - 1), np.int8)
    b = np.zeros(16, np.int32)
    np.testing.assert_array_equal(run(make_site(x, w, b, bits), x), reference.conv2d(x, w, b))


@pytest.mark.parametrize("bits", [(1, 1), (3, 2)])
@pytest.mark.parametrize("inputs", [32, 37 * 32])
def test_dense_layers_are_exact(bits: tuple[int, int], inputs: int) -> None:
    x, w, b = random_site(np.random.default_rng(0), (3, inputs), (24, inputs), bits)
    np.testing.assert_array_equal(run(make_site(x, w, b, bits, zero_point=1), x), reference.dense(x, w, b, 1))


@pytest.mark.parametrize("bits", [(2, 2), (2, 1)])
def test_portable_code_is_exact(bits: tuple[int, int]) -> None:
    baseline = {"x86_64": "llvm -mcpu=x86-64"}.get(
        parse_target(HOST).attrs["mtriple"].partition("-")[0], HOST
    )
    x, w, b = random_site(np.random.default_rng(0), (1, 5, 5, 64), (24, 64, 3, 3), bits)
    geometry: dict[str, Any] = {"padding": [1, 1, 1, 1]}
    np.testing.assert_array_equal(
        run(make_site(x, w, b, bits, **geometry), x, baseline), reference.conv2d(x, w, b, **geometry)
    )


def test_int8_and_bitserial_kernels_give_the_same_integers() -> None:
    x, w, b = random_site(np.random.default_rng(3), (1, 6, 6, 32), (16, 32, 3, 3), (2, 2))
    geometry = {"padding": [1, 1, 1, 1], "zero_point": 1}
    bit_serial = make_site(x, w, b, (2, 2), **geometry)
    as_int8 = make_site(x, w, b, (2, 2), **geometry, scheme="int8")
    np.testing.assert_array_equal(run(bit_serial, x), run(as_int8, x))


@pytest.mark.parametrize("target", [HOST, "llvm -mcpu=generic"])
@pytest.mark.parametrize("bits", [1, 4, 6])
def test_packing_kernels_pack_as_numpy_does(bits: int, target: str) -> None:
    rng = np.random.default_rng(bits)
    x = rng.integers(0, 2**bits, (2, 3, 4, 64)).astype(np.uint8)
    site = make_site(
        x, np.ones((8, 64, 1, 1), np.int8), np.zeros(8, np.int32), (bits, 1), padding=[1, 0, 2, 1]
    )
    call = site["main"].body.blocks[0].bindings[0].value
    zero_point = 2**bits - 1
    layer = packing.read_layer(
        ops.call("conv2d", call.args, **_attributes(call) | {"zero_point": zero_point})
    )
    padded = np.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=zero_point)
    expected = packing.pack_activation_bits(padded, bits)
    host = parse_target(HOST)
    kernel = packing_kernel(layer, rules_for(parse_target(target)))
    library = tvm.compile(tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")}), target=host)
    result = tvm.runtime.tensor(np.zeros_like(expected))
    library["main"](tvm.runtime.tensor(x), result)
    np.testing.assert_array_equal(result.numpy(), expected)


def _attributes(call: relax.Call) -> dict[str, Any]:
    return dict(call.attrs.items())


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "bits", "rule"),
    [
        ((1, 4, 4, 48), (8, 48, 3, 3), (2, 2), "input channels in multiples of 32, not 48"),
        ((1, 4, 4, 32), (12, 32, 3, 3), (2, 2), "output channels in multiples of 8, not 12"),
        ((1, 3, 3, 32), (8, 32, 3, 3), (2, 2), "at least 2 x 2, not 1 x 1"),
        ((1, 4, 4, 32), (8, 32, 3, 3), (7, 2), "activations have 1 to 6 bits, not 7"),
        ((1, 4, 4, 32), (8, 32, 3, 3), (2, 8), "weights have 1 to 6 bits, not 8"),
    ],
)
def test_illegal_layers_name_the_rule(x_shape: Any, w_shape: Any, bits: tuple[int, int], rule: str) -> None:
    x, w, b = random_site(np.random.default_rng(0), x_shape, w_shape, bits)
    with pytest.raises(KernelError, match=rule):
        run(make_site(x, w, b, bits), x)


def test_signed_activations_are_refused() -> None:
    x, w, b = random_site(np.random.default_rng(0), (1, 4, 4, 32), (8, 32, 3, 3), (2, 2))
    with pytest.raises(KernelError, match="activations are uint8, not int8"):
        run(make_site(x.astype(np.int8), w, b, (2, 2)), x)


@pytest.mark.parametrize(
    ("target", "instructions"),
    [
        (A72, ["cnt\tv", "uaddlp"]),
        ("llvm -mcpu=haswell -mtriple=x86_64-unknown-linux-gnu", ["vpshufb", "vpmovmskb"]),
        ("llvm -mcpu=skylake-avx512 -mtriple=x86_64-unknown-linux-gnu", ["vpshufb", "zmm"]),
    ],
)
def test_bits_are_counted_in_vectors(target: str, instructions: list[str]) -> None:
    x, w, b = random_site(np.random.default_rng(0), (1, 5, 5, 64), (32, 64, 3, 3), (2, 2))
    executable = compile_for(make_site(x, w, b, (2, 2)), target)
    text = "".join(part.inspect_source("asm") for part in executable.mod.imports if part.kind == "llvm")
    assert all(instruction in text for instruction in instructions)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 70))
def test_no_more_than_8_bits_can_count_are_counted_at_once(height: int, width: int, words: int) -> None:
    splits = bitserial.split_reduction(height, width, words)
    assert [outer * inside for outer, inside in splits] == [height, width, words]
    assert math.prod(inside for _, inside in splits) <= MAX_STEPS
