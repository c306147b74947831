"""Which tensors become integers though no site reads them."""

import numpy as np
import pytest
from tvm import relax

from tests.passes.quantized_networks import Net, average_pool, residual, sequential
from tvm_compress.passes.annotate_quantization import site_calls
from tvm_compress.passes.graph import bindings, definitions, operator
from tvm_compress.passes.integer_points import (
    find_integer_points,
    needed_points,
    sums_whole_windows,
)

GATED = [
    "stem.0.output",
    "expand.0.output",
    "depthwise.0.output",
    "excite.output",
    "excite.output_2",
    "depthwise.0.output_2",
    "last.0.output",
    "hidden.output",
]


def test_points_of_hard_swish_and_squeeze_and_excite(gated):
    function = gated.module["main"]
    points = find_integer_points(function)
    assert [point.name for point in points] == GATED
    defined = definitions(function)
    made_by = {point.name: operator(defined[point.tensor]) for point in points}
    # The gate's operand is before its function, its result is an operand of the product, which is swished.
    assert made_by["excite.output"] == "relax.add"
    assert made_by["excite.output_2"] == "relax.divide"
    assert made_by["depthwise.0.output_2"] == "relax.multiply"


@pytest.mark.parametrize("make", [sequential, residual])
def test_relu_networks_have_none(make):
    assert find_integer_points(make()["main"]) == []


@pytest.mark.parametrize(
    ("float_sites", "missing"),
    [
        ((), ()),
        # Nothing is made of integers after it.
        (("stem.0",), ("stem.0.output",)),
        # A product of which one side is float, and what is made of it.
        (("excite",), ("depthwise.0.output", "excite.output", "excite.output_2", "depthwise.0.output_2")),
        # Nobody wants the integers of the last function.
        (("fc",), ("hidden.output",)),
    ],
)
def test_points_are_needed_between_quantized_sites(gated, float_sites, missing):
    function = gated.module["main"]
    sites = {call.name for call in site_calls(function)}
    needed = [point.name for point in needed_points(function, sites - set(float_sites))]
    assert needed == [name for name in GATED if name not in missing]


def one(build):
    function = Net((1, 3, 8, 8)).module(build)["main"]
    return [point.name for point in find_integer_points(function)]


def test_biases_and_clamps_are_no_functions():
    def build(net, x):
        x = net.conv(x, "a", 1, bias=True)
        x = net.emit(relax.op.nn.relu(net.emit(relax.op.add(x, relax.const(np.float32(0.5))))))
        # The bias of one channel is one number too.
        x = net.emit(relax.op.add(net.conv(x, "b", 1), net.parameter("b.bias", np.ones(1))))
        return net.conv(net.emit(relax.op.clip(x, 0, 6)), "c", 4)

    assert one(build) == []


def test_what_is_clamped_is_the_tensor_that_a_function_reads():
    def build(net, x):
        x = net.emit(relax.op.nn.relu(net.conv(x, "a", 4)))
        return net.conv(net.emit(relax.op.sigmoid(x)), "b", 4)

    function = Net((1, 3, 8, 8)).module(build)["main"]
    (point,) = find_integer_points(function)
    assert operator(definitions(function)[point.tensor]) == "relax.nn.relu"


def test_numbers_that_are_parameters_make_functions_too():
    def build(net, x):
        x = net.conv(x, "a", 4)
        x = net.emit(relax.op.multiply(x, net.parameter("slope", np.ones(()))))
        return net.conv(x, "b", 4)

    assert one(build) == ["a.output"]


def test_a_name_that_a_site_has_is_not_taken():
    def build(net, x):
        x = net.emit(relax.op.sigmoid(net.conv(x, "a", 4)))
        return net.conv(x, "a.output", 4)

    assert one(build) == ["a.output_2"]


@pytest.mark.parametrize(
    ("window", "stride", "padding", "attrs", "expected"),
    [
        (2, 2, 0, {}, True),
        (3, 1, 1, {}, True),
        (3, 1, 1, {"count_include_pad": False}, False),
        (3, 1, 0, {"count_include_pad": False}, True),
        # Windows over what is left at the end, and none.
        (3, 2, 0, {"ceil_mode": True}, False),
        (2, 2, 0, {"ceil_mode": True}, True),
        (2, 2, 0, {"layout": "NCHW"}, False),
        (2, 1, 0, {"dilation": [2, 2]}, False),
    ],
)
def test_averages_of_which_integers_are_summed(window, stride, padding, attrs, expected):
    def build(net, x):
        return average_pool(net, x, window, stride, padding, **attrs)

    function = Net((1, 8, 8, 8)).module(build)["main"]
    (call,) = (value for _, value in bindings(function) if operator(value) == "relax.nn.avg_pool2d")
    assert sums_whole_windows(call) is expected
