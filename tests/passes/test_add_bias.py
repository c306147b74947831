import numpy as np
import pytest
import tvm
from tvm import relax

from tests.passes.numpy_interpreter import run
from tests.passes.quantized_networks import INT8, Net, Ranges, policy, residual, sequential
from tvm_compress.errors import ModelError
from tvm_compress.passes.add_bias import AddBias
from tvm_compress.passes.params import get_params
from tvm_compress.passes.pipeline import compress


def plain(bias):
    return Net((1, 3, 4, 4)).module(
        lambda net, x: net.conv(net.emit(relax.op.nn.relu(net.conv(x, "a", 4))), "b", 2, bias=bias)
    )


def assert_same_structure(after, expected):
    functions = [
        relax.transform.CanonicalizeBindings()(module)["main"].without_attr("params")
        for module in (after, expected)
    ]
    tvm.ir.assert_structural_equal(*functions, map_free_vars=True)


def test_a_bias_of_zeros_stands_behind_the_site():
    after = AddBias(["b"])(plain(bias=False))
    expected = plain(bias=True)
    assert_same_structure(after, expected)
    assert list(get_params(after)) == ["a.weight", "b.weight", "b.bias"]
    assert np.array_equal(get_params(after)["b.bias"], np.zeros(2, np.float32))


@pytest.mark.parametrize("quantized", [False, True])
def test_the_function_stays(quantized):
    module = residual()
    if quantized:
        module = compress(module, policy(stem=INT8, a__conv2=INT8), calibration=Ranges())
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8))
    after = AddBias(["stem", "b.down"])(module)
    assert np.array_equal(run(module, x), run(after, x))
    assert list(get_params(after))[-2:] == ["stem.bias", "b.down.bias"]


def test_no_site_is_no_change():
    module = sequential()
    after = AddBias([])(module)
    assert_same_structure(after, module)


def test_bad_input():
    with pytest.raises(ModelError, match="'other'"):
        AddBias(["other"])(sequential())
    with pytest.raises(ModelError, match="already"):
        AddBias(["conv2"])(sequential())
