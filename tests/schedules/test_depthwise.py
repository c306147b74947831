"""Depthwise and grouped convolutions: strides, dilations, multipliers; integers to the last bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, tirx

from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import open_device
from tvm_compress.schedules import depthwise_plan, ops, packing, reference
from tvm_compress.schedules.apply import kernel_infos, lower_to_kernels
from tvm_compress.schedules.target_rules import parse_target, rules_for

HOST = "host"
A72 = "raspberry-pi/4b-aarch64"
X86 = [HOST, "llvm -mcpu=x86-64-v2"] if parse_target(HOST).attrs["mtriple"].startswith("x86") else [HOST]
REQUANTIZATION: dict[str, Any] = {"shift": 39, "zero_point": -5, "qmin": -128, "qmax": 127, "dtype": "int8"}


@st.composite
def layers(draw: st.DrawFn, grouped: bool = False) -> dict[str, Any]:
    """Data and geometry of a layer; `grouped` for several input channels a group."""
    kh, kw = draw(st.sampled_from([(3, 3), (3, 3), (5, 5), (1, 1), (2, 3), (3, 4), (7, 1)]))
    dilation = [draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 1, 3]))]
    if grouped:
        groups, ins = draw(st.sampled_from([2, 3, 4, 6])), draw(st.sampled_from([2, 3, 4, 8]))
    else:
        groups, ins = draw(st.sampled_from([2, 5, 8, 16, 24, 37, 48])), 1
    outs = draw(st.sampled_from([2, 3, 4, 8, 16])) if grouped else draw(st.sampled_from([1, 1, 1, 2, 3]))
    size = (
        draw(st.integers(dilation[0] * (kh - 1) + 1, 14)),
        draw(st.integers(dilation[1] * (kw - 1) + 1, 14)),
    )
    return {
        "x": (draw(st.integers(1, 2)), *size, groups * ins),
        "w": (groups * outs, ins, kh, kw),
        "geometry": {
            "strides": [draw(st.integers(1, 2)), draw(st.integers(1, 3))],
            "padding": [draw(st.integers(0, 2)) for _ in range(4)],
            "dilation": dilation,
            "groups": groups,
        },
        "dtype": draw(st.sampled_from(["int8", "uint8"])),
        "zero_point": draw(st.sampled_from([0, 3, 127])),
        "seed": draw(st.integers(0, 99)),
    }


def float_module(layer: dict[str, Any], w: np.ndarray, b: np.ndarray) -> tvm.IRModule:
    """Convolution, bias, ReLU6."""
    data = relax.Var("x", relax.TensorType(layer["x"], "float32"))
    bb = relax.BlockBuilder()
    with bb.function("main", [data]):
        with bb.dataflow():
            sums = relax.op.nn.conv2d(
                data, relax.const(w), data_layout="NHWC", kernel_layout="OIHW", **layer["geometry"]
            )
            biased = bb.emit(relax.op.add(bb.emit(sums), relax.const(b)))
            result = bb.emit_output(relax.op.clip(biased, 0.0, 6.0))
        bb.emit_func_output(result)
    return bb.get()


def integer_module(
    layer: dict[str, Any], w: np.ndarray, b: np.ndarray, multiplier: np.ndarray | None = None
) -> tvm.IRModule:
    """Convolution; with a multiplier requantized too."""
    data = relax.Var("x", relax.TensorType(layer["x"], layer["dtype"]))
    attrs = {"zero_point": layer["zero_point"], "scheme": "int8", "activation_bits": 8, "weight_bits": 8}
    bb = relax.BlockBuilder()
    with bb.function("main", [data]):
        with bb.dataflow():
            result = ops.call("conv2d", [data, relax.const(w), relax.const(b)], **attrs, **layer["geometry"])
            if multiplier is not None:
                result = ops.call(
                    "requantize", [bb.emit(result), relax.const(multiplier)], **REQUANTIZATION, bound=1 << 20
                )
            result = bb.emit_output(result)
        bb.emit_func_output(result)
    return bb.get()


def run(module: tvm.IRModule, x: np.ndarray, target: str = HOST) -> np.ndarray:
    parsed = parse_target(target)
    executable = relax.build(lower_to_kernels(module, parsed), target=parsed)
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()


def integers(layer: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(layer["seed"])
    info = np.iinfo(layer["dtype"])
    x = rng.integers(info.min, info.max + 1, layer["x"]).astype(layer["dtype"])
    w = rng.integers(-127, 128, layer["w"]).astype(np.int8)
    return x, w, rng.integers(-900, 900, layer["w"][0]).astype(np.int32)


def check_float(layer: dict[str, Any], target: str = HOST) -> None:
    rng = np.random.default_rng(layer["seed"])
    x, w = (rng.standard_normal(layer[key]).astype(np.float32) for key in ("x", "w"))
    b = rng.standard_normal(w.shape[0]).astype(np.float32)
    expected = np.clip(reference.convolution(x, w, **layer["geometry"]) + b, 0, 6)
    np.testing.assert_allclose(run(float_module(layer, w, b), x, target), expected, rtol=1e-4, atol=1e-4)


def check_integers(layer: dict[str, Any], target: str = HOST) -> None:
    x, w, b = integers(layer)
    expected = reference.conv2d(x, w, b, layer["zero_point"], **layer["geometry"])
    np.testing.assert_array_equal(run(integer_module(layer, w, b), x, target), expected)


@given(layers())
@settings(max_examples=12, deadline=None)
def test_any_float_depthwise_convolution_is_right(layer: dict[str, Any]) -> None:
    check_float(layer)


@given(layers(), st.sampled_from(X86))
@settings(max_examples=16, deadline=None)
def test_any_integer_depthwise_convolution_is_exact(layer: dict[str, Any], target: str) -> None:
    check_integers(layer, target)


@given(layers(grouped=True))
@settings(max_examples=8, deadline=None)
def test_any_grouped_convolution_is_right(layer: dict[str, Any]) -> None:
    check_integers(layer)
    check_float(layer)


def fixed(x: tuple[int, ...], w: tuple[int, ...], groups: int, **changes: Any) -> dict[str, Any]:
    geometry = {"strides": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": groups}
    geometry |= {name: changes.pop(name) for name in tuple(changes) if name in geometry}
    return {"x": x, "w": w, "geometry": geometry, "dtype": "int8", "zero_point": -128, "seed": 0} | changes


@pytest.mark.parametrize("target", X86)
@pytest.mark.parametrize(("dtype", "value"), [("int8", -128), ("int8", 127), ("uint8", 255)])
@pytest.mark.parametrize("weight", [-127, 127])
def test_extreme_values_are_exact(dtype: str, value: int, weight: int, target: str) -> None:
    layer = fixed((1, 6, 6, 16), (16, 1, 3, 3), 16, dtype=dtype, zero_point=int(np.iinfo(dtype).max))
    x, w = np.full(layer["x"], value, dtype), np.full(layer["w"], weight, np.int8)
    b = np.zeros(16, np.int32)
    expected = reference.conv2d(x, w, b, layer["zero_point"], **layer["geometry"])
    np.testing.assert_array_equal(run(integer_module(layer, w, b), x, target), expected)


# What the emulated Cortex-A72 computes: strides, odd sizes and channels, dilation, batch, multiplier, groups.
ON_A72 = [
    fixed((1, 9, 11, 16), (16, 1, 3, 3), 16),
    fixed((2, 8, 7, 24), (24, 1, 3, 3), 24, strides=[2, 2], dtype="uint8", zero_point=7),
    fixed((1, 9, 9, 37), (37, 1, 5, 5), 37, padding=[2, 2, 2, 2]),
    fixed((1, 10, 6, 8), (16, 1, 3, 2), 8, dilation=[2, 1], zero_point=0),
    fixed((1, 6, 6, 12), (24, 4, 3, 3), 3),
    fixed((1, 5, 5, 20), (12, 5, 1, 1), 4, padding=[0, 0, 0, 0]),
]


def test_the_a72_computes_the_same(tmp_path: Path) -> None:
    target = parse_target(A72)
    compiler = export_fcompile("aarch64-linux-gnu")
    with open_device("emulated-a72").open() as session:
        for number, layer in enumerate(ON_A72):
            x, w, b = integers(layer)
            values = [x, np.full_like(x, np.iinfo(x.dtype).min), np.full_like(x, np.iinfo(x.dtype).max)]
            extreme = np.where(w < 0, -127, 127).astype(np.int8)
            library = tmp_path / f"{number}.so"
            executable = relax.build(lower_to_kernels(integer_module(layer, extreme, b), target), target)
            executable.export_library(str(library), fcompile=compiler)
            for value, (found,) in zip(values, session.run_many(library, [[v] for v in values]), strict=True):
                expected = reference.conv2d(value, extreme, b, layer["zero_point"], **layer["geometry"])
                np.testing.assert_array_equal(found, expected, err_msg=str(layer))
            rng = np.random.default_rng(0)
            x, w = (rng.standard_normal(layer[key]).astype(np.float32) for key in ("x", "w"))
            bias = rng.standard_normal(w.shape[0]).astype(np.float32)
            library = tmp_path / f"{number}f.so"
            executable = relax.build(lower_to_kernels(float_module(layer, w, bias), target), target)
            executable.export_library(str(library), fcompile=compiler)
            expected = np.clip(reference.convolution(x, w, **layer["geometry"]) + bias, 0, 6)
            (result,) = session.run(library, [x])
            np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4, err_msg=str(layer))


@pytest.mark.parametrize("channels", [32, 21])
def test_the_epilogue_is_fused_and_sums_stay_local(channels: int) -> None:
    layer = fixed((1, 9, 9, channels), (channels, 1, 3, 3), channels)
    x, w, b = integers(layer)
    multiplier = np.random.default_rng(0).integers(2**28, 2**30, channels).astype(np.int32)
    module = integer_module(layer, w, b, multiplier)
    lowered = lower_to_kernels(module, parse_target(HOST))
    (func,) = (f for f in lowered.functions.values() if isinstance(f, tirx.PrimFunc))
    script = func.script()
    assert '"int32", scope="local")' in script
    sums = reference.conv2d(x, w, b, layer["zero_point"], **layer["geometry"])
    expected = reference.requantize(sums, multiplier, **REQUANTIZATION)
    np.testing.assert_array_equal(run(module, x), expected)


@pytest.mark.parametrize("integer", [True, False])
def test_the_result_does_not_depend_on_the_number_of_threads(integer: bool) -> None:
    layer = fixed((2, 40, 40, 48), (48, 1, 3, 3), 48)
    x, w, b = integers(layer)
    module = integer_module(layer, w, b)
    if not integer:
        x, w = (value.astype(np.float32) for value in (x, w))
        module = float_module(layer, w, b.astype(np.float32))
    found = []
    for threads in (1, 4):
        target = parse_target(dict(parse_target(HOST).export()) | {"num-cores": threads})
        lowered = lower_to_kernels(module, target)
        (info,) = kernel_infos(lowered, target)
        assert ("T.parallel" in info.func.script()) == (threads > 1)
        found.append(run(module, x, target))  # type: ignore[arg-type]
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize(
    ("target", "instructions"),
    [
        (A72, ["smull", "smlal", "saddw"]),
        ("llvm -mcpu=haswell -mtriple=x86_64-unknown-linux-gnu", ["vpmaddwd"]),
        ("llvm -mcpu=x86-64-v2 -mtriple=x86_64-unknown-linux-gnu", ["pmaddwd"]),
        ("llvm -mcpu=cascadelake -mtriple=x86_64-unknown-linux-gnu", ["vpmaddwd", "zmm"]),
    ],
)
def test_taps_are_multiplied_in_pairs(target: str, instructions: list[str]) -> None:
    layer = fixed((1, 12, 12, 32), (32, 1, 3, 3), 32)
    _, w, b = integers(layer)
    parsed = parse_target(target)
    executable = relax.build(lower_to_kernels(integer_module(layer, w, b), parsed), target=parsed)
    text = "".join(part.inspect_source("asm") for part in executable.mod.imports if part.kind == "llvm")
    assert all(instruction in text for instruction in instructions)


def test_kernels_say_what_they_are_and_count_what_they_execute() -> None:
    target = parse_target(HOST)
    infos = {}
    for channels in (32, 64):
        layer = fixed((1, 12, 12, channels), (channels, 1, 3, 3), channels)
        _, w, b = integers(layer)
        (infos[channels],) = kernel_infos(lower_to_kernels(integer_module(layer, w, b), target), target)
    features = infos[32].features
    assert infos[32].kind == "conv2d_int8"
    assert features["macs"] == 12 * 12 * 32 * 9
    assert features["groups"] == 32
    assert features["backend_depthwise"] == 1
    assert infos[64].features["sum_loads"] == 2 * features["sum_loads"] > 0
    assert infos[64].key != infos[32].key


@pytest.mark.parametrize("target", [HOST, A72, "llvm -mcpu=x86-64-v2 -mtriple=x86_64-unknown-linux-gnu"])
@pytest.mark.parametrize("integer", [True, False])
@given(
    size=st.integers(1, 112),
    channels=st.integers(2, 200),
    kernel=st.sampled_from([1, 3, 5, 7]),
    stride=st.integers(1, 2),
)
@settings(max_examples=20, deadline=None)
def test_plans_divide_the_layer_and_fit_the_registers(
    target: str, integer: bool, size: int, channels: int, kernel: int, stride: int
) -> None:
    rules = rules_for(parse_target(target))
    form = depthwise_plan.form_for(rules, integer, channels)
    info: dict[str, Any] = {"KH": kernel, "KW": kernel, "OH": size, "OW": size}
    info |= {"IC": channels, "OC": channels, "strides": [stride, stride], "dilation": [1, 1]}
    plan = next(iter(depthwise_plan.cuts(rules, form, info).values()))
    assert size % plan.rows == 0
    assert packing.round_up(channels, plan.lanes) % plan.chunk == plan.chunk % plan.lanes == 0
    assert 1 <= plan.columns <= size
    assert plan.columns * form.accumulators < rules.vector_registers


def test_taps_are_packed_by_channel_and_in_pairs() -> None:
    weight = np.arange(5 * 9, dtype=np.int8).reshape(5, 1, 3, 3)
    taps = depthwise_plan.pack_taps(weight, 4)
    assert taps.shape == (3, 3, 8)
    np.testing.assert_array_equal(taps[1, 2], [*weight[:, 0, 1, 2], 0, 0, 0])
    pairs = depthwise_plan.pack_pairs(weight, 4)
    assert pairs.shape == (3, 2, 8, 2)
    assert pairs.dtype == np.int16
    np.testing.assert_array_equal(pairs[1, 0, 3], weight[3, 0, 1, :2])
    np.testing.assert_array_equal(pairs[1, 1, 3], [weight[3, 0, 1, 2], 0])


def test_groups_are_merged_until_their_channels_fill_vectors() -> None:
    assert packing.merged_groups(6, 8, 8) == 6
    assert packing.merged_groups(6, 4, 8) == 3
    assert packing.merged_groups(6, 3, 8) == 1
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, (1, 4, 4, 12))
    weight = rng.integers(-9, 9, (24, 2, 1, 1))
    merged = packing.merge_groups(weight, 6, 3)
    assert merged.shape == (24, 4, 1, 1)
    np.testing.assert_array_equal(
        reference.convolution(x, weight, groups=6), reference.convolution(x, merged, groups=3)
    )
