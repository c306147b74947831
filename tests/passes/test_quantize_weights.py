import numpy as np
import pytest
import tvm
from tvm import relax

from tests.passes.numpy_interpreter import run
from tests.passes.quantized_networks import Net
from tvm_compress.errors import ModelError
from tvm_compress.passes.params import get_params, with_stage
from tvm_compress.passes.quantize_weights import QuantizeWeights


def before():
    return with_stage(Net((1, 3, 4, 4)).module(lambda net, x: net.conv(x, "a", 4, bias=True)), "qdq")


def expected():
    def build(net, x):
        conv = net.conv(x, "a", 4)
        weight = net.vars["a.weight"]
        bias = net.parameter("a.bias", net.rng.normal(size=4) * 0.5)
        scale = net.parameter("a.weight_scale", np.full(4, 0.01))
        zero = relax.const(0, "int8")
        q = net.emit(relax.op.quantize(weight, scale, zero, axis=0, out_dtype="int8"))
        q = net.emit(relax.op.clip(q, -127, 127))
        w = net.emit(relax.op.dequantize(q, scale, zero, axis=0))
        del conv
        conv = relax.op.nn.conv2d(x, w, padding=[1] * 4, data_layout="NHWC", kernel_layout="OIHW")
        return net.emit(relax.op.add(net.emit(conv), bias))

    return with_stage(Net((1, 3, 4, 4)).module(build), "qdq")


def test_the_weights_are_quantized_in_front_of_the_layer():
    after = QuantizeWeights({"a": np.full(4, 0.01, np.float32)})(before())
    found = relax.transform.DeadCodeElimination()(after)
    wanted = relax.transform.DeadCodeElimination()(expected())
    names = ["a.weight", "a.bias", "a.weight_scale"]
    assert list(get_params(found)) == list(get_params(wanted)) == names
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4))
    np.testing.assert_array_equal(run(found, x), run(wanted, x))
    calls = [
        sorted(str(value.op.name) for block in module["main"].body.blocks for value in values(block))
        for module in (found, wanted)
    ]
    assert calls[0] == calls[1]
    tvm.ir.assert_structural_equal(found["main"].ret_ty, wanted["main"].ret_ty)


def values(block):
    return [b.value for b in block.bindings if isinstance(b.value, relax.Call)]


def test_weights_on_the_grid_stay_what_they_are():
    module = before()
    scale = np.abs(get_params(module)["a.weight"]).reshape(4, -1).max(axis=1) / 127
    after = QuantizeWeights({"a": scale})(module)
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4))
    assert 0 < np.abs(run(after, x) - run(module, x)).max() < 0.1
    none = QuantizeWeights({})(module)
    assert list(get_params(none)) == list(get_params(module))
    np.testing.assert_array_equal(run(none, x), run(module, x))


def test_bad_input():
    with pytest.raises(ModelError, match="'b'"):
        QuantizeWeights({"b": np.ones(4, np.float32)})(before())
    with pytest.raises(ModelError, match="QuantizeWeights takes"):
        QuantizeWeights({})(with_stage(before(), "float"))
