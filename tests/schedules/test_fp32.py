"""Direct fp32 kernels against numpy, over shapes, strides, paddings, groups and odd widths."""

from unittest.mock import patch

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from tvm_compress.errors import KernelError
from tvm_compress.schedules import apply, fp32, kernel, reference, winograd
from tvm_compress.schedules.target_rules import parse_target, rules_for


@pytest.fixture(autouse=True, scope="module")
def direct_kernels():
    """3 x 3 convolutions too: which kernel is the fastest is not the question here."""
    with patch.object(winograd, "choose_algorithm", lambda *arguments: None):
        yield


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def conv_module(x_shape, weight, bias=None, relu=False, residual=False, **attrs):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(x_shape, "float32"))
    inputs = [x]
    y = relax.op.nn.conv2d(x, relax.const(weight), data_layout="NHWC", kernel_layout="OIHW", **attrs)
    with builder.function("main", inputs):
        with builder.dataflow():
            y = builder.emit(y)
            if bias is not None:
                y = builder.emit(relax.op.add(y, relax.const(bias)))
            if residual:
                y = builder.emit(relax.op.add(y, builder.emit(relax.op.negative(y))))
                ones = relax.const(np.ones((1, 1, 1, weight.shape[0]), np.float32))
                y = builder.emit(relax.op.add(y, ones))
            if relu:
                y = builder.emit(relax.op.nn.relu(y))
            out = builder.emit_output(y)
        builder.emit_func_output(out)
    return builder.get()


def dense_module(rows, weight, bias, transposed):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((rows, weight.shape[1]), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            if transposed:
                second = builder.emit(relax.op.permute_dims(relax.const(weight)))
            else:
                second = relax.const(np.ascontiguousarray(weight.T))
            y = builder.emit(relax.op.matmul(x, second))
            out = builder.emit_output(relax.op.add(y, relax.const(bias)))
        builder.emit_func_output(out)
    return builder.get()


def run(module, *inputs, target=None):
    target = target or parse_target("host")
    executable = relax.build(apply.lower_to_kernels(module, target), target=target)
    main = relax.VirtualMachine(executable, tvm.cpu())["main"]
    return main(*[tvm.runtime.tensor(value) for value in inputs]).numpy()


@st.composite
def convolutions(draw):
    kh, kw = draw(st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 3), (2, 2)]))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2)]))
    padding = draw(st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 2, 1), (2, 0, 0, 3)]))
    height = draw(st.integers(dilation[0] * (kh - 1) + 1, 15))
    width = draw(st.integers(dilation[1] * (kw - 1) + 1, 15))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    in_channels = groups * draw(st.sampled_from([1, 3, 5, 8, 16]))
    out_channels = groups * draw(st.sampled_from([1, 3, 8, 10, 16, 24, 37, 67]))
    return {
        "x": (draw(st.integers(1, 3)), height, width, in_channels),
        "w": (out_channels, in_channels // groups, kh, kw),
        "attrs": {
            "strides": draw(st.sampled_from([(1, 1), (2, 2), (1, 2)])),
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
        },
        "relu": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=30, deadline=None)
@given(convolutions())
def test_convolution_computes_what_numpy_computes(case):
    rng = np.random.default_rng(case["seed"])
    x, w = (rng.standard_normal(case[key]).astype(np.float32) for key in ("x", "w"))
    bias = rng.standard_normal(w.shape[0]).astype(np.float32)
    expected = reference.convolution(x, w, **case["attrs"]) + bias
    expected = np.maximum(expected, 0) if case["relu"] else expected
    actual = run(conv_module(x.shape, w, bias, case["relu"], **case["attrs"]), x)
    assert_close(actual, expected)


@pytest.mark.parametrize("channels", [4, 8, 24, 37])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_convolution_computes_what_numpy_computes(channels, stride):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 9, 11, channels)).astype(np.float32)
    w = rng.standard_normal((channels, 1, 3, 3)).astype(np.float32)
    attrs = {"strides": (stride, stride), "padding": (1, 1, 1, 1), "groups": channels}
    actual = run(conv_module(x.shape, w, relu=True, **attrs), x)
    assert_close(actual, np.maximum(reference.convolution(x, w, **attrs), 0))


@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 9),
    st.sampled_from([1, 3, 64, 100]),
    st.sampled_from([1, 8, 10, 37, 100, 130]),
    st.booleans(),
)
def test_dense_computes_what_numpy_computes(rows, inputs, outputs, transposed):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, inputs)).astype(np.float32)
    w = rng.standard_normal((outputs, inputs)).astype(np.float32)
    bias = rng.standard_normal(outputs).astype(np.float32)
    assert_close(run(dense_module(rows, w, bias, transposed), x), x @ w.T + bias)


def test_an_epilogue_that_reads_the_convolution_twice_is_scheduled():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, 6, 6, 8)).astype(np.float32)
    w = rng.standard_normal((19, 8, 3, 3)).astype(np.float32)
    actual = run(conv_module(x.shape, w, residual=True, padding=1), x)
    assert_close(actual, np.ones_like(actual))


def test_packed_weights_hold_zeros_beyond_the_true_channels():
    w = np.arange(5 * 2 * 1 * 1, dtype=np.float32).reshape(5, 2, 1, 1)
    packed = fp32.pack_weights(w, 4)
    assert packed.shape == (2, 1, 1, 2, 4)
    assert np.array_equal(packed[0, 0, 0, 1], w[:4, 1, 0, 0])
    assert np.array_equal(packed[1, 0, 0, 0], [8, 0, 0, 0])


@pytest.mark.parametrize("name", ["llvm -mcpu=haswell -mtriple=x86_64-linux-gnu", "raspberry-pi/4b-aarch64"])
@pytest.mark.parametrize(("size", "channels"), [(28, 16), (14, 32), (7, 64), (32, 37), (1, 10)])
def test_tiles_fit_the_registers_and_the_output(name, size, channels):
    rules = rules_for(parse_target(name))
    tile = fp32.choose_tile(rules, size, size, channels, 9 * channels)
    assert tile.vectors * tile.rows * tile.columns + tile.vectors < rules.vector_registers
    assert tile.rows <= size
    assert tile.columns <= size


def test_other_layouts_and_unbound_weights_are_refused():
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 3, 8, 8), "float32"))
    w = relax.Var("w", relax.TensorType((4, 3, 3, 3), "float32"))
    with builder.function("main", [x, w]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.nn.conv2d(x, w))
        builder.emit_func_output(out)
    with pytest.raises(KernelError, match="constant"):
        apply.lower_to_kernels(builder.get(), parse_target("host"))
    module = conv_module((1, 8, 8, 3), np.zeros((4, 3, 3, 3), np.float32))
    call = module["main"].body.blocks[0].bindings[0].value
    bound = relax.op.nn.conv2d(x, call.args[1])
    with pytest.raises(KernelError, match="NHWC"):
        fp32.legalize(relax.BlockBuilder(), bound, rules_for(parse_target("host")))


@pytest.mark.parametrize("channels", [16, 37])
def test_the_a72_kernel_multiplies_vectors(channels):
    target = parse_target("raspberry-pi/4b-aarch64")
    rng = np.random.default_rng(0)
    w = rng.standard_normal((channels, 16, 3, 3)).astype(np.float32)
    lowered = apply.lower_to_kernels(conv_module((1, 14, 14, 16), w, padding=1), target)
    assembly = relax.build(lowered, target=target).mod.imports[0].inspect_source("asm")
    vector, scalar = assembly.count("fmla\tv"), assembly.count("fmadd\ts")
    assert vector >= 16
    assert scalar == 0


def test_small_convolutions_stay_serial_and_large_ones_do_not():
    target = parse_target("llvm -num-cores=2")
    for size, expected in ((4, False), (64, True)):
        w = np.zeros((16, 16, 3, 3), np.float32)
        module = apply.lower_to_kernels(conv_module((1, size, size, 16), w, padding=1), target)
        func = apply.kernel_infos(module, target)[0].func
        assert ("T.parallel" in func.script()) == expected


def test_annotations_are_gone_after_scheduling():
    w = np.zeros((16, 16, 3, 3), np.float32)
    module = apply.lower_to_kernels(conv_module((1, 4, 4, 16), w), parse_target("host"))
    assert f'"{kernel.KERNEL}"' not in module.script(show_meta=False)
