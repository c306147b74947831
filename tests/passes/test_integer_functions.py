"""Functions and products of quantized tensors in integers: what the QDQ module computes, by tables."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from tests.passes.numpy_interpreter import calls, operators
from tests.passes.quantized_networks import INT8, Net, Ranges, bits, policy, pooling
from tests.passes.torch_networks import Gated, example
from tests.tvm_compress.twin_networks import Build
from tvm_compress.calibration import calibrate
from tvm_compress.errors import ModelError
from tvm_compress.passes.annotate_quantization import AnnotateQuantization, site_calls
from tvm_compress.passes.insert_qdq import InsertQDQ
from tvm_compress.passes.params import get_params
from tvm_compress.passes.pipeline import build, compress
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.passes.realize_integer import RealizeInteger
from tvm_compress.twin import Twin

op = relax.op


def number(value: float) -> relax.Expr:
    return relax.const(np.float32(value))


def hard_sigmoid(b: Build, x):
    return b.emit(op.divide(b.emit(op.clip(b.emit(op.add(x, number(3))), 0, 6)), number(6)))


def parametric(b: Build, x):
    return b.emit(op.multiply(b.emit(op.maximum(x, b.param("least", np.float32(-0.25)))), number(-2)))


FUNCTIONS: dict[str, Callable] = {
    "hard-swish": lambda b, x: b.emit(op.multiply(x, hard_sigmoid(b, x))),
    "hard-swish, divided last": lambda b, x: b.emit(
        op.divide(b.emit(op.multiply(b.emit(op.clip(b.emit(op.add(number(3), x)), 0, 6)), x)), number(6))
    ),
    "hard-sigmoid": hard_sigmoid,
    "sigmoid": lambda b, x: b.emit(op.sigmoid(x)),
    "silu": lambda b, x: b.emit(op.nn.silu(x)),
    "tanh of relu": lambda b, x: b.emit(op.tanh(b.emit(op.nn.relu(x)))),
    "clipped": lambda b, x: b.emit(op.clip(b.emit(op.subtract(number(1), x)), 0.5, 1.5)),
    "with a parameter": parametric,
    "x + sigmoid(x)": lambda b, x: b.emit(op.add(x, b.emit(op.sigmoid(x)))),
}


def fake_quantized(b: Build, x, name: str, scale: float, zero_point: int, bits: int = 8):
    """int8 of 8 bits, uint8 of fewer."""
    low, high, dtype = (-128, 127, "int8") if bits == 8 else (0, 2**bits - 1, "uint8")
    return b.fake_quantize(x, b.param(f"{name}_scale", np.float32(scale)), zero_point, low, high, dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(("in_bits", "out_bits"), [(8, 8), (8, 4), (6, 8)])
def test_tables_hold_what_qdq_computes(name, in_bits, out_bits):
    b = Build((1, 300), "qdq")
    scale, zero_point = (0.05, 11) if in_bits == 8 else (0.2, 40)
    out = (0.02, -40) if out_bits == 8 else (0.3, 5)

    def make():
        x = fake_quantized(b, b.x, "in", scale, zero_point, in_bits)
        return fake_quantized(b, FUNCTIONS[name](b, x), "out", *out, out_bits)

    qdq = b.finish(make)
    integer = RealizeInteger()(qdq)
    assert operators(integer) == ["tvm_compress." + each for each in ("quantize", "table", "dequantize")]
    # Every integer of the input's type, and what lies beyond.
    low = -140 if in_bits == 8 else -20
    x = ((np.arange(low, low + 300) - zero_point) * np.float32(scale)).astype(np.float32)[None]
    np.testing.assert_array_equal(Twin(integer).predict(x), Twin(qdq).predict(x))


def test_a_function_without_value_is_refused():
    b = Build((1, 8), "qdq")

    def make():
        x = fake_quantized(b, b.x, "in", 0.1, 0)
        return fake_quantized(b, b.emit(op.divide(x, x)), "out", 0.1, 0)

    with pytest.raises(ModelError, match=r"NaN at 0\.0"):
        RealizeInteger()(b.finish(make))


def test_products_are_those_of_qdq_within_rounding():
    b = Build((1, 8, 6, 6), "qdq")

    def make():
        x = fake_quantized(b, b.nhwc(b.x), "x", 0.03, 5)
        gate = fake_quantized(b, b.emit(op.mean(x, [1, 2], keepdims=True)), "gate", 0.005, -30)
        return fake_quantized(b, b.emit(op.multiply(x, gate)), "out", 0.01, 3)

    qdq = b.finish(make)
    integer = RealizeInteger()(qdq)
    assert not {"mean", "clip"} & set(operators(integer))
    assert operators(integer).count("tvm_compress.dequantize") == 1
    assert operators(integer)[-1] == "tvm_compress.dequantize"
    x = np.random.default_rng(0).normal(1, 2, (20, 8, 6, 6)).astype(np.float32)
    steps = (Twin(integer).predict(x) - Twin(qdq).predict(x)) / 0.01
    assert np.abs(steps).max() <= 1.01
    assert np.mean(np.abs(steps) > 0.5) < 0.02


def test_functions_in_averages_and_additions_need_no_quantization_of_their_own():
    def network(net, x):
        a = net.emit(op.nn.silu(net.conv(x, "a", 8)))
        y = net.emit(op.add(a, net.conv(net.emit(op.tanh(net.conv(x, "b", 8))), "c", 8)))
        x = net.emit(op.nn.silu(net.conv(y, "d", 8)))
        return net.dense(net.emit(op.mean(x, [1, 2])), "fc", 5)

    module = Net((1, 3, 8, 8)).module(network)
    x = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    sites = policy(**dict.fromkeys("abcd", INT8), fc=INT8)
    qdq = compress(module, sites, calibration=calibrate(module, x))
    assert {"a.output_scale", "b.output_scale", "d.output_scale"} <= set(get_params(qdq))
    integer = RealizeInteger()(qdq)
    # On the way to a sum: int32.
    assert [str(c.args[1].ty.dtype) for c in calls(integer, "tvm_compress.table")] == [
        "int8",
        "int32",
        "int32",
    ]
    assert operators(integer).count("tvm_compress.dequantize") == 1
    found, expected = Twin(integer).predict(x), Twin(qdq).predict(x)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_gates_of_dense_layers_are_integers():
    """Squeeze-and-excite as many networks write it: pooled to [N, C], two dense layers, spread again."""

    def network(net, x):
        x = net.conv(x, "a", 8)
        gate = net.emit(op.nn.relu(net.dense(net.emit(op.mean(x, [1, 2])), "squeeze", 4)))
        gate = net.emit(op.expand_dims(net.emit(op.sigmoid(net.dense(gate, "excite", 8))), [1, 2]))
        x = net.conv(net.emit(op.multiply(x, gate)), "b", 8)
        return net.dense(net.emit(op.mean(x, [1, 2])), "fc", 5)

    module = Net((1, 3, 8, 8)).module(network)
    x = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    sites = CompressionPolicy(sites=dict.fromkeys(("a", "squeeze", "excite", "b", "fc"), INT8))
    qdq = compress(module, sites, calibration=calibrate(module, x))
    integer = RealizeInteger()(qdq)
    names = operators(integer)
    assert names.count("tvm_compress.quantize") == names.count("tvm_compress.dequantize") == 1
    assert not {"mean", "sigmoid"} & set(names)
    expected = Twin(integer).predict(x)
    np.testing.assert_allclose(expected, Twin(qdq).predict(x), atol=0.05 * np.abs(expected).max())
    assert_compiled(integer, x, expected)


GATES = {"hard-sigmoid": "hardsigmoid", "sigmoid": "sigmoid"}


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_a_gated_network_is_all_integers_and_as_compiled(gate):
    made = example(Gated(getattr(torch.nn.functional, gate)))
    module = made.module
    x = np.random.default_rng(0).normal(size=(12, 3, 8, 8)).astype(np.float32)
    sites = dict.fromkeys((call.name for call in site_calls(module["main"])), INT8)
    qdq = compress(module, CompressionPolicy(sites=sites), calibration=calibrate(module, x))
    integer = RealizeInteger()(qdq)
    names = operators(integer)
    assert names[0] == "tvm_compress.quantize"
    assert names[-1] == "tvm_compress.dequantize"
    assert not {"tvm_compress.quantize", "tvm_compress.dequantize", "mean", "divide"} & set(names[1:-1])
    assert len(calls(integer, "tvm_compress.conv2d")) == 7
    expected = Twin(integer).predict(x)
    np.testing.assert_allclose(expected, Twin(qdq).predict(x), atol=0.05 * np.abs(expected).max())
    assert_compiled(integer, x, expected)


def test_average_pooling_is_all_integers_and_as_compiled():
    module = pooling()
    x = np.random.default_rng(0).normal(size=(8, 3, 8, 8)).astype(np.float32)
    sites = dict.fromkeys((call.name for call in site_calls(module["main"])), INT8)
    qdq = compress(module, CompressionPolicy(sites=sites), calibration=calibrate(module, x))
    integer = RealizeInteger()(qdq)
    names = operators(integer)
    assert names.count("tvm_compress.window_sum") == 3
    assert names.count("tvm_compress.quantize") == names.count("tvm_compress.dequantize") == 1
    assert not {"nn.avg_pool2d", "nn.silu"} & set(names)
    expected = Twin(integer).predict(x)
    np.testing.assert_allclose(expected, Twin(qdq).predict(x), atol=0.05 * np.abs(expected).max())
    assert_compiled(integer, x, expected)


def test_mixed_policies_of_a_gated_network_are_as_compiled():
    module = example(Gated()).module
    x = np.random.default_rng(0).normal(size=(12, 3, 8, 8)).astype(np.float32)
    sites = {call.name: INT8 for call in site_calls(module["main"])}
    # The product's readers of fewer bits, a float site among them, and functions on either side.
    sites |= {"project.0": bits(4, 4), "hidden": bits(2, 3)}
    del sites["last.0"]
    qdq = compress(module, CompressionPolicy(sites=sites), calibration=calibrate(module, x))
    integer = RealizeInteger()(qdq)
    assert "uint8" in {str(c.args[1].ty.dtype) for c in calls(integer, "tvm_compress.table")}
    assert_compiled(integer, x, Twin(integer).predict(x), exact=False)


def test_a_float_layer_before_hard_swish_is_computed_once():
    def network(net, x):
        x = net.conv(x, "a", 8)
        y = net.emit(op.clip(net.emit(op.add(x, number(3))), 0, 6))
        return net.conv(net.emit(op.multiply(x, y)), "b", 8)

    module = Net((1, 3, 8, 8)).module(network)
    qdq = tvm.transform.Sequential([AnnotateQuantization(policy(b=INT8), Ranges()), InsertQDQ()])(module)
    integer = RealizeInteger()(qdq)
    assert operators(integer).count("nn.conv2d") == 1
    x = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(Twin(integer).predict(x), Twin(qdq).predict(x), atol=1e-4)


def test_a_large_bias_beside_a_tiny_input_leaves_room_for_the_kernel():
    """As in a squeeze-and-excite whose average is nearly 0."""

    def network(net, x):
        gate = net.emit(op.mean(net.conv(x, "a", 128), [1, 2], keepdims=True))
        return net.conv(gate, "b", 8, kernel=1, padding=0, bias=True)

    module = Net((1, 3, 8, 8)).module(network)
    ranges = Ranges({"b": (-1e-6, 2e-6)})
    passes = [AnnotateQuantization(policy(a=INT8, b=INT8), ranges), InsertQDQ(), RealizeInteger()]
    integer = tvm.transform.Sequential(passes)(module)
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
    assert_compiled(integer, x, Twin(integer).predict(x))


def assert_compiled(integer, x, expected, exact: bool = True):
    """Compare what the host's library computes with the twin's result."""
    machine = relax.VirtualMachine(build(integer, "host").executable, tvm.cpu())
    found = np.concatenate([machine["main"](tvm.runtime.tensor(one[None])).numpy() for one in x])
    if exact:
        np.testing.assert_array_equal(found, expected)
    else:
        np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())
