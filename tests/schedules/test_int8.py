"""INT8 kernels against the integer reference, to the last bit, and what they are made of."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, tirx

from tvm_compress.errors import KernelError
from tvm_compress.schedules import int8, ops, reference, winograd
from tvm_compress.schedules.apply import lower_to_kernels
from tvm_compress.schedules.target_rules import parse_target

HOST = "host"
A72 = "raspberry-pi/4b-aarch64"
A76 = "llvm -mcpu=cortex-a76 -mtriple=aarch64-linux-gnu"


@pytest.fixture(autouse=True, scope="module")
def direct_kernels() -> Iterator[None]:
    """No Winograd kernels, whatever the tables say of a shape."""
    with patch.object(winograd, "choose_algorithm", lambda *arguments: None):
        yield


def make_site(x: np.ndarray, w: np.ndarray, b: np.ndarray, **attrs: Any) -> tvm.IRModule:
    """A module of one integer convolution or dense layer."""
    common = {"zero_point": 0, "scheme": "int8", "activation_bits": 8, "weight_bits": 8}
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


def run(module: tvm.IRModule, x: np.ndarray, target: str = HOST) -> np.ndarray:
    parsed = parse_target(target)
    executable = relax.build(lower_to_kernels(module, parsed), target=parsed)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return machine["main"](tvm.runtime.tensor(x)).numpy()


def assembly(module: tvm.IRModule, target: str) -> str:
    parsed = parse_target(target)
    executable = relax.build(lower_to_kernels(module, parsed), target=parsed)
    return "".join(part.inspect_source("asm") for part in executable.mod.imports if part.kind == "llvm")


def random_site(
    rng: np.random.Generator, x_shape: tuple[int, ...], w_shape: tuple[int, ...], dtype: str = "int8"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    info = np.iinfo(dtype)
    x = rng.integers(info.min, info.max + 1, x_shape).astype(dtype)
    w = rng.integers(-127, 128, w_shape).astype(np.int8)
    return x, w, rng.integers(-5000, 5000, w_shape[0]).astype(np.int32)


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    kernel, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    least = dilation * (kernel - 1) + 1
    dtype = draw(st.sampled_from(["int8", "uint8"]))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    return {
        "batch": draw(st.integers(1, 2)),
        "size": (draw(st.integers(least, 9)), draw(st.integers(least, 9))),
        "channels": (groups * draw(st.integers(1, 9)), groups * draw(st.sampled_from([1, 3, 8, 13, 16, 37]))),
        "kernel": kernel,
        "dtype": dtype,
        "groups": groups,
        "strides": [draw(st.integers(1, 2)), draw(st.integers(1, 2))],
        "padding": [draw(st.integers(0, 2)) for _ in range(4)],
        "dilation": [dilation, draw(st.integers(1, dilation))],
        "zero_point": draw(st.sampled_from([0, -128, 3, 127] if dtype == "int8" else [0, 128, 255])),
        "seed": draw(st.integers(0, 99)),
    }


@given(convolutions())
@settings(max_examples=18, deadline=None)
def test_any_convolution_is_exact(site: dict[str, Any]) -> None:
    ic, oc = site["channels"]
    geometry = {key: site[key] for key in ("strides", "padding", "dilation", "groups", "zero_point")}
    x, w, b = random_site(
        np.random.default_rng(site["seed"]),
        (site["batch"], *site["size"], ic),
        (oc, ic // site["groups"], site["kernel"], site["kernel"]),
        site["dtype"],
    )
    np.testing.assert_array_equal(
        run(make_site(x, w, b, **geometry), x), reference.conv2d(x, w, b, **geometry)
    )


@pytest.mark.parametrize("target", ["llvm -mcpu=x86-64", HOST])
@pytest.mark.parametrize(("dtype", "value"), [("int8", -128), ("int8", 127), ("uint8", 255)])
@pytest.mark.parametrize("weight", [-127, 127])
def test_extreme_values_are_exact(dtype: str, value: int, weight: int, target: str) -> None:
    if "x86" in target and not parse_target(HOST).attrs["mtriple"].startswith("x86"):
        target = HOST
    x = np.full((1, 5, 5, 64), value, dtype)
    w = np.full((24, 64, 3, 3), weight, np.int8)
    b = np.zeros(24, np.int32)
    geometry: dict[str, Any] = {"padding": [1, 1, 1, 1], "zero_point": int(np.iinfo(dtype).min)}
    np.testing.assert_array_equal(
        run(make_site(x, w, b, **geometry), x, target), reference.conv2d(x, w, b, **geometry)
    )


@given(st.integers(1, 5), st.integers(1, 70), st.integers(1, 40), st.sampled_from(["int8", "uint8"]))
@settings(max_examples=5, deadline=None)
def test_any_dense_layer_is_exact(batch: int, inputs: int, outputs: int, dtype: str) -> None:
    x, w, b = random_site(np.random.default_rng(inputs), (batch, inputs), (outputs, inputs), dtype)
    np.testing.assert_array_equal(run(make_site(x, w, b, zero_point=7), x), reference.dense(x, w, b, 7))


@pytest.mark.parametrize("channels", [16, 21])
def test_the_epilogue_is_fused_and_sums_stay_local(channels: int) -> None:
    x, w, b = random_site(np.random.default_rng(0), (1, 7, 7, 8), (channels, 8, 3, 3))
    multiplier = np.linspace(1 << 20, 1 << 22, channels).astype(np.int32)
    requantization: dict[str, Any] = {
        "shift": 31,
        "zero_point": -5,
        "qmin": -128,
        "qmax": 127,
        "dtype": "int8",
    }
    data = relax.Var("x", relax.TensorType(x.shape, "int8"))
    bb = relax.BlockBuilder()
    with bb.function("main", [data]):
        with bb.dataflow():
            attrs = make_site(x, w, b, padding=[1, 1, 1, 1])["main"].body.blocks[0].bindings[0].value.attrs
            sums = bb.emit(ops.call("conv2d", [data, relax.const(w), relax.const(b)], **dict(attrs.items())))
            positive = bb.emit(relax.op.maximum(sums, relax.const(np.int32(0))))
            result = bb.emit_output(
                ops.call("requantize", [positive, relax.const(multiplier)], **requantization)
            )
        bb.emit_func_output(result)
    module = bb.get()
    lowered = lower_to_kernels(module, parse_target(HOST))
    kernels = [func for func in lowered.functions.values() if isinstance(func, tirx.PrimFunc)]
    assert len(kernels) == 1
    script = kernels[0].script()
    assert "sums_local = T.sblock_alloc_buffer" in script
    assert '"int32", scope="local")' in script
    expected = reference.conv2d(x, w, b, 0, padding=[1, 1, 1, 1])
    np.testing.assert_array_equal(
        run(module, x), reference.requantize(np.maximum(expected, 0), multiplier, **requantization)
    )


@pytest.mark.parametrize(
    ("target", "instructions"),
    [
        (A72, ["smull", "smlal", "sadalp"]),
        ("llvm -mcpu=haswell", ["vpmaddwd"]),
        ("llvm -mcpu=skylake-avx512", ["vpmaddwd", "zmm"]),
        ("llvm -mcpu=cascadelake", ["vpdpbusd"]),
        (A76, ["sdot"]),
    ],
)
def test_the_dot_product_of_the_target_is_used(target: str, instructions: list[str]) -> None:
    triple = "" if target in (A72, A76) else " -mtriple=x86_64-unknown-linux-gnu"
    x, w, b = random_site(np.random.default_rng(0), (1, 6, 6, 16), (64, 16, 3, 3))
    text = assembly(make_site(x, w, b), target + triple)
    assert all(instruction in text for instruction in instructions)
    assert "pmaddubsw" not in text, "it saturates"


def test_weights_of_minus_128_are_refused() -> None:
    x, w, b = random_site(np.random.default_rng(0), (1, 4, 4, 4), (8, 4, 1, 1))
    w[3, 2] = -128
    with pytest.raises(KernelError, match=r"8-bit weights must lie in \[-127, 127\]"):
        run(make_site(x, w, b), x)


def test_sums_that_may_overflow_are_refused() -> None:
    x, w, b = random_site(np.random.default_rng(0), (1, 100), (8, 100))
    b[0] = 2**31 - 1
    with pytest.raises(KernelError, match="int32 accumulators cannot hold"):
        run(make_site(x, w, b), x)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 30), st.integers(1, 20))
def test_tiles_divide_the_output_and_fit_the_registers(
    height: int, width: int, vectors: int, registers: int
) -> None:
    tile = int8.rank_tiles((height, width), vectors, registers, 0.5, 3)[0]
    assert height % tile.height == width % tile.width == vectors % tile.vectors == 0
    spare = registers // 3 if tile.vectors == 1 else 0
    assert tile.height * tile.width * tile.vectors <= registers + spare
