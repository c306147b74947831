"""Table lookup kernels against the integer reference: the computation on the host, the code on the board."""

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, te

from tvm_compress.errors import KernelError
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import open_device
from tvm_compress.schedules import lookup, ops, packing, reference, winograd
from tvm_compress.schedules.apply import kernel_infos, lower_to_kernels
from tvm_compress.schedules.int8 import Tile
from tvm_compress.schedules.packing import IntegerLayer
from tvm_compress.schedules.target_rules import TargetRules, parse_target, rules_for

A72 = "raspberry-pi/4b-aarch64"
HASWELL = "llvm -mcpu=haswell -mtriple=x86_64-unknown-linux-gnu"


def make_layer(
    x_shape: tuple[int, ...], w_shape: tuple[int, ...], bits: tuple[int, int], seed: int = 0, **changes: Any
) -> IntegerLayer:
    """A convolution of random weights; `bits` are those of activations and weights."""
    rng = np.random.default_rng(seed)
    limit = 2 ** (bits[1] - 1) - 1
    w = rng.choice([-1, 1], w_shape) if bits[1] == 1 else rng.integers(-limit, limit + 1, w_shape)
    facts: dict[str, Any] = {
        "operator": "conv2d", "scheme": "int8" if bits[0] > 6 else "bitserial",
        "data_shape": x_shape, "data_dtype": "uint8", "weight": w.astype(np.int8),
        "bias": rng.integers(-500, 500, w_shape[0]).astype(np.int32),
        "strides": (1, 1), "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1, "zero_point": 0,
        "activation_bits": bits[0], "weight_bits": bits[1],
    }  # fmt: skip
    return IntegerLayer(**(facts | changes))


def make_data(layer: IntegerLayer, seed: int = 0) -> np.ndarray:
    low, high = (-128, 128) if layer.data_dtype == "int8" else (0, 2**layer.activation_bits)
    return np.random.default_rng(seed).integers(low, high, layer.data_shape).astype(layer.data_dtype)


def expected(layer: IntegerLayer, x: np.ndarray) -> np.ndarray:
    geometry = (layer.strides, layer.padding, layer.dilation)
    return reference.conv2d(x, layer.weight, layer.bias, layer.zero_point, *geometry)


def make_module(layers: list[IntegerLayer]) -> tvm.IRModule:
    inputs = [
        relax.Var(f"x{i}", relax.TensorType(layer.data_shape, layer.data_dtype))
        for i, layer in enumerate(layers)
    ]
    bb = relax.BlockBuilder()
    with bb.function("main", inputs):
        with bb.dataflow():
            outputs = []
            for data, layer in zip(inputs, layers, strict=True):
                attrs: dict[str, Any] = {
                    name: getattr(layer, name)
                    for name in ("scheme", "groups", "zero_point", "activation_bits", "weight_bits")
                }
                attrs |= {name: list(getattr(layer, name)) for name in ("strides", "padding", "dilation")}
                operands = [data, relax.const(layer.weight), relax.const(layer.bias)]
                outputs.append(bb.emit(ops.call("conv2d", operands, **attrs)))
            result = bb.emit_output(relax.Tuple(outputs))
        bb.emit_func_output(result)
    return bb.get()


def run_on_host(layer: IntegerLayer, x: np.ndarray, vectors: int) -> np.ndarray:
    """Run what the kernel computes without its schedule, whose instructions this machine may not have."""
    arrays = [
        x,
        lookup.pack_weight(layer.weight, layer.weight_bits, 8 * vectors),
        lookup.part_coefficients(layer),
        lookup.lookup_bias(layer),
    ]
    arguments = [te.placeholder(a.shape, str(a.dtype), name=f"argument{i}") for i, a in enumerate(arrays)]
    out = lookup.compute_function(layer, Tile(1, 1, vectors))(*arguments)
    built = tvm.compile(te.create_prim_func([*arguments, out]), target={"kind": "llvm", "opt-level": 1})
    result = tvm.runtime.tensor(np.zeros([int(extent) for extent in out.shape], np.int32))
    built["main"](*map(tvm.runtime.tensor, arrays), result)
    return result.numpy()


@given(
    size=st.tuples(st.integers(4, 6), st.integers(4, 6)),
    channels=st.tuples(st.sampled_from([8, 16, 40]), st.integers(1, 3)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    dilation=st.integers(1, 2),
    bits=st.tuples(st.integers(1, 8), st.integers(1, 4)),
    signed=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None)
def test_any_convolution_is_computed_exactly(
    size: tuple[int, int],
    channels: tuple[int, int],
    kernel: int,
    stride: int,
    padding: tuple[int, ...],
    dilation: int,
    bits: tuple[int, int],
    signed: bool,
    seed: int,
) -> None:
    ic, vectors = channels
    changes: dict[str, Any] = {
        "strides": (stride, stride), "padding": padding, "zero_point": seed % 2 ** bits[0]
    }  # fmt: skip
    if kernel * 2 - 1 <= min(size):
        changes["dilation"] = (dilation, dilation)
    if signed:
        changes |= {"scheme": "int8", "data_dtype": "int8", "zero_point": seed - 50}
    layer = make_layer((2, *size, ic), (8 * vectors, ic, kernel, kernel), bits, seed, **changes)
    x = make_data(layer, seed)
    np.testing.assert_array_equal(run_on_host(layer, x, vectors), expected(layer, x))


# Where the layers of the board differ: bits, shapes with whole and partial tiles, several chunks of the sums.
SAMPLE = [
    make_layer((1, 8, 8, 32), (16, 32, 3, 3), (5, 2)),
    make_layer((2, 5, 7, 64), (24, 64, 3, 3), (3, 1), strides=(2, 2), zero_point=5),
    make_layer((1, 6, 6, 32), (8, 32, 3, 3), (6, 3), padding=(0, 1, 2, 1)),
    make_layer((1, 6, 8, 32), (32, 32, 3, 3), (6, 1), zero_point=63),
    make_layer((1, 7, 7, 16), (16, 16, 3, 3), (8, 2), data_dtype="int8", zero_point=-9),
    make_layer((1, 8, 4, 8), (16, 8, 5, 5), (8, 1), data_dtype="int8", padding=(2, 2, 2, 2)),
    make_layer((1, 6, 6, 8), (8, 8, 3, 3), (7, 4), dilation=(2, 2), zero_point=77),
    # With scheme "int8" fewer bits say nothing of what is stored.
    make_layer((1, 4, 8, 8), (8, 8, 3, 3), (4, 1), scheme="int8", data_dtype="int8", zero_point=-128),
    make_layer((1, 4, 4, 64), (32, 64, 1, 1), (4, 4), padding=(0, 0, 0, 0)),
]


def extreme(bits: tuple[int, int], sign: int) -> IntegerLayer:
    """A layer whose weights are all the largest, with more input channels than a chunk holds."""
    layer = make_layer((1, 4, 4, 192), (8, 192, 3, 3), bits)
    layer.weight[:] = sign * max(1, 2 ** (bits[1] - 1) - 1)
    return layer


EXTREMES = [extreme(bits, sign) for bits in ((5, 1), (6, 2), (8, 4)) for sign in (-1, 1)]


def test_the_boards_code_is_exact(tmp_path: Path) -> None:
    layers = [*SAMPLE, *EXTREMES]
    data = [make_data(layer) for layer in SAMPLE]
    data += [np.full(layer.data_shape, 2**layer.activation_bits - 1, np.uint8) for layer in EXTREMES]
    target = parse_target(A72)
    with patch.object(TargetRules, "lookup_pays", lambda *_: True):
        lowered = lower_to_kernels(make_module(layers), target)
    infos = kernel_infos(lowered, target)
    assert sum(info.count for info in infos if info.features["backend_lookup"]) == len(layers)
    executable = relax.build(lowered, target=target)
    executable.export_library(str(tmp_path / "k.so"), fcompile=export_fcompile("aarch64-linux-gnu"))
    text = "".join(part.inspect_source("asm") for part in executable.mod.imports if part.kind == "llvm")
    assert {"sabal", "uaddl", "tbl", "addp"} <= set(text.split())
    with open_device("emulated-a72").open() as session:
        found = session.run(tmp_path / "k.so", data)
    for layer, x, got in zip(layers, data, found, strict=True):
        np.testing.assert_array_equal(got, expected(layer, x), err_msg=str(layer.info()))


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3)),
    st.integers(1, 4),
    st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_packed_weights_are_indices_of_their_bits(
    shape: tuple[int, int, int, int], bits: int, seed: int
) -> None:
    blocks, steps, height, width = shape
    weight = make_layer((1,) * 4, (blocks * 16, steps * 8, height, width), (1, bits), seed).weight
    packed = lookup.pack_weight(weight, bits, 16)
    assert packed.shape == (blocks, bits, height, width, steps, 16)
    for place in range(8):
        plane = packed >> place & 1  # of input channels place, place + 8, ...
        values = [-1 if b == bits - 1 and bits > 1 else 1 for b in range(bits)]
        whole = sum(plane[:, b].astype(int) * value * 2**b for b, value in enumerate(values))
        if bits == 1:
            whole = 2 * whole - 1
        np.testing.assert_array_equal(
            np.transpose(whole, (0, 4, 3, 1, 2)).reshape(blocks * 16, steps, height, width),
            weight[:, place::8],
        )


@given(st.tuples(st.integers(1, 7), st.integers(1, 7)), st.integers(1, 128), st.sampled_from([15, 31, 63]))
def test_no_chunk_can_overflow_16_bits(kernel: tuple[int, int], steps: int, largest: int) -> None:
    chunks = lookup.choose_chunks(kernel, steps, largest)
    assert [outer * inside for outer, inside in chunks] == [*kernel, steps]
    assert math.prod(inside for _, inside in chunks) * 8 * largest < 2**16


def test_tables_and_their_parts_fit_their_bytes() -> None:
    for bits in range(1, 9):
        one = lookup.lookup_for(bits, 1)
        assert 4 * one.largest <= (127 if one.subtracts else 255)
        # What is left of the activation after the parts' bits is nothing.
        assert 2**bits - 1 <= sum(one.largest * 16**part for part in range(lookup.parts_of(bits)))


@pytest.mark.parametrize(
    ("x_shape", "w_shape", "bits", "changes"),
    [
        ((1, 4, 4, 12), (8, 12, 3, 3), (8, 1), {}),
        ((1, 4, 4, 16), (12, 16, 3, 3), (8, 1), {}),
        ((1, 4, 4, 32), (8, 32, 3, 3), (8, 5), {}),
        ((1, 4, 4, 32), (8, 16, 3, 3), (8, 1), {"groups": 2}),
        ((1, 1, 4, 32), (8, 32, 1, 1), (8, 1), {"operator": "dense", "padding": (0, 0, 0, 0)}),
        # Sums of cleared bits on the way would not fit int32, although the layer's do.
        ((1, 1, 1, 2**20), (8, 2**20, 3, 1), (8, 2), {}),
    ],
)
def test_what_lookups_cannot_compute_is_left_alone(
    x_shape: Any, w_shape: Any, bits: tuple[int, int], changes: dict[str, Any]
) -> None:
    assert not lookup.applies(make_layer(x_shape, w_shape, bits, **changes))
    assert lookup.applies(make_layer((1, 4, 4, 32), (8, 32, 3, 3), bits=(8, 1)))


def backend(layer: IntegerLayer, target: str) -> str:
    parsed = parse_target(target)
    infos = kernel_infos(lower_to_kernels(make_module([layer]), parsed), parsed)
    (site,) = [info for info in infos if info.kind != "bitpack"]
    backends = ("lookup", "popcount", "dot", "narrow", "winograd")
    return next(name for name in backends if site.features[f"backend_{name}"])


@pytest.mark.parametrize(
    ("bits", "kernel", "target", "wanted"),
    [
        ((3, 1), 3, A72, "lookup"),
        ((2, 1), 3, A72, "popcount"),
        ((5, 2), 3, A72, "lookup"),
        ((6, 3), 3, A72, "lookup"),
        ((8, 1), 3, A72, "lookup"),
        ((1, 1), 3, A72, "popcount"),
        ((1, 3), 3, A72, "popcount"),
        ((8, 3), 3, A72, "dot"),
        ((6, 4), 3, A72, "dot"),
        ((4, 4), 1, A72, "dot"),
        ((5, 2), 3, "llvm -mcpu=generic -mtriple=aarch64-linux-gnu", "dot"),
        ((5, 2), 3, HASWELL, "narrow"),
    ],
)
def test_lookups_are_chosen_where_they_are_the_fastest(
    bits: tuple[int, int], kernel: int, target: str, wanted: str
) -> None:
    with patch.object(winograd, "choose_algorithm", lambda *arguments: None):
        assert backend(make_layer((1, 8, 8, 32), (16, 32, kernel, kernel), bits), target) == wanted


@pytest.mark.parametrize(
    ("bits", "stride", "wanted"),
    [
        ((5, 2), 1, "lookup"),
        ((8, 2), 1, "winograd"),
        ((6, 3), 1, "winograd"),
        ((6, 2), 2, "lookup"),
        ((6, 3), 2, "lookup"),
        ((6, 4), 2, "winograd"),
        ((1, 1), 1, "popcount"),
    ],
)
def test_winograd_is_chosen_where_it_is_faster_still(bits: tuple[int, int], stride: int, wanted: str) -> None:
    layer = make_layer((1, 16, 16, 64), (64, 64, 3, 3), bits, strides=(stride, stride), padding=(1, 1, 1, 1))
    assert backend(layer, A72) == wanted


def test_a_table_must_serve_enough_outputs() -> None:
    rules = rules_for(parse_target(A72))
    assert rules.lookup_pays(5, 2, reuse=128, counted=False)
    assert not rules.lookup_pays(5, 2, reuse=8, counted=False)
    assert rules.lookup_pays(2, 1, reuse=900, counted=True)
    assert not rules.lookup_pays(2, 1, reuse=90, counted=True)


def test_refused_layers_stay_refused() -> None:
    """A policy is legal on every target or on none: what a lookup could compute does not matter."""
    layer = make_layer((1, 4, 4, 48), (8, 48, 3, 3), (2, 2))
    assert lookup.applies(layer)
    with pytest.raises(KernelError, match="input channels in multiples of 32, not 48"):
        lower_to_kernels(make_module([layer]), parse_target(A72))


def test_weights_out_of_range_are_refused() -> None:
    layer = make_layer((1, 4, 4, 32), (8, 32, 3, 3), (8, 2))
    layer.weight[0, 0, 0, 0] = -2
    with pytest.raises(KernelError, match=r"2-bit weights must lie in \[-1, 1\]"):
        lower_to_kernels(make_module([layer]), parse_target(A72))


def test_bias_takes_off_what_cleared_bits_count() -> None:
    layer = make_layer((1, 4, 4, 8), (8, 8, 3, 3), (8, 1), data_dtype="int8", zero_point=3)
    negative = (layer.weight < 0).sum(axis=(1, 2, 3))
    wanted = packing.fold_bias(layer, 128) - 255 * negative
    np.testing.assert_array_equal(lookup.lookup_bias(layer), wanted)
