"""RealizeInteger: the same numbers as the QDQ module within one step, in the form of docs/architecture.md."""

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from tests.passes.numpy_interpreter import calibrate, calls, operators, run, run_forced, site_inputs
from tests.passes.quantized_networks import (
    FP32,
    INT8,
    Net,
    Ranges,
    average_pool,
    bits,
    policy,
    residual,
    sequential,
)
from tvm_compress.errors import KernelError, ModelError
from tvm_compress.passes.annotate_quantization import AnnotateQuantization, site_calls
from tvm_compress.passes.insert_qdq import InsertQDQ
from tvm_compress.passes.params import get_params, get_stage, set_params
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.passes.realize_integer import RealizeInteger

MIXED = [INT8, bits(4, 4), bits(2, 2), bits(1, 1), bits(3, 6), FP32]


def names_of(module) -> list[str]:
    return [call.name for call in site_calls(module["main"])]


def samples(count: int = 3, shape=(3, 8, 8)) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, *shape)).astype(np.float32)


def quantize(module, sites, x):
    """The QDQ and the integer form, calibrated on x."""
    ranges = Ranges(calibrate(module, x))
    qdq = tvm.transform.Sequential([AnnotateQuantization(sites, ranges), InsertQDQ()])(module)
    return qdq, RealizeInteger()(qdq)


def uniform(module, site) -> CompressionPolicy:
    return CompressionPolicy(sites=dict.fromkeys(names_of(module), site))


def assert_same_numbers(module, sites, x=None, logits_step: float = 0.02):
    """On the same inputs, integers within one step of QDQ's, the result within `logits_step` of its own."""
    x = samples() if x is None else x
    qdq, integer = quantize(module, sites, x)
    wanted, differences = run_forced(qdq, x, site_inputs(integer, x))
    assert max(differences.values(), default=0) <= 1
    assert {name for name in differences if " " not in name} == {
        name for name, site in sites.sites.items() if site.quantized
    }
    np.testing.assert_allclose(run(integer, x), wanted, atol=logits_step * np.abs(wanted).max())
    check_form(integer)
    return integer


def check_form(integer):
    assert get_stage(integer) == "integer"
    relax.analysis.well_formed(integer)
    main = integer["main"]
    assert len(main.params) == 1
    assert "params" not in main.attrs
    assert not {"nn.batch_norm", "quantize", "clip", "dequantize"} & set(operators(integer))
    for call in calls(integer, "tvm_compress.conv2d") + calls(integer, "tvm_compress.dense"):
        attrs = call.attrs
        weight = call.args[1].value.numpy()
        assert weight.dtype == np.int8
        dtype = str(call.args[0].ty.dtype)
        assert dtype == ("uint8" if attrs["scheme"] == "bitserial" else "int8")
        if int(attrs["weight_bits"]) == 1:
            assert set(np.unique(weight)) <= {-1, 1}
        else:
            assert np.abs(weight.astype(int)).max() < 2 ** (int(attrs["weight_bits"]) - 1)


@pytest.mark.parametrize("site", [INT8, bits(4, 4), bits(2, 2), bits(1, 1)], ids=["8x8", "4x4", "2x2", "1x1"])
@pytest.mark.parametrize("make", [sequential, residual])
def test_uniform_policies(make, site):
    module = make()
    assert_same_numbers(module, uniform(module, site))


@settings(max_examples=12, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000), make=st.sampled_from([sequential, residual]))
def test_mixed_policies(data, seed, make):
    module = make(seed)
    sites = {name: data.draw(st.sampled_from(MIXED), label=name) for name in names_of(module)}
    assert_same_numbers(module, CompressionPolicy(sites=sites))


@pytest.mark.parametrize("site", [INT8, bits(2, 2), bits(1, 1)], ids=["8x8", "2x2", "1x1"])
@pytest.mark.parametrize(
    "gamma",
    [[-1.0] * 8, [1.0, -2.0, 0.0, 1e-12, -1e-7, 0.5, -0.0, 3.0], [0.0] * 8],
    ids=["negative", "dead channels", "all dead"],
)
def test_negative_and_dead_batch_norm_channels(site, gamma):
    module = residual(gamma=np.array(gamma))
    # A tensor that is all dead may be constant: its reader stays at fp32.
    sites = {name: site for name in names_of(module) if any(gamma) or name not in ("a.conv2",)}
    assert_same_numbers(module, CompressionPolicy(sites=sites))


def test_a_huge_shift_beside_a_tiny_factor():
    module = sequential()
    params = get_params(module)
    gamma, beta = params["bn1.weight"].copy(), params["bn1.bias"].copy()
    gamma[:3], beta[:3] = [1e-6, 1e-9, -1e-4], [2.0, 1.0, 1.5]
    module = set_params(module, {"bn1.weight": gamma, "bn1.bias": beta})
    for site in (INT8, bits(1, 1)):
        assert_same_numbers(module, uniform(module, site))


def test_a_sequential_int8_network_has_one_requantization_per_layer():
    module = sequential()
    integer = assert_same_numbers(module, uniform(module, INT8))
    dialect = "tvm_compress."
    assert operators(integer) == [
        dialect + "quantize",
        "permute_dims",
        dialect + "conv2d",
        dialect + "requantize",
        dialect + "conv2d",
        dialect + "requantize",
        "nn.max_pool2d",
        "permute_dims",
        "nn.batch_flatten",
        dialect + "dense",
        dialect + "requantize",
        dialect + "dense",
        dialect + "dequantize",
    ]
    first = calls(integer, "tvm_compress.conv2d")[0]
    assert str(first.attrs["site"]) == "conv1"
    assert [int(v) for v in first.attrs["padding"]] == [1, 1, 1, 1]
    assert int(calls(integer, "tvm_compress.conv2d")[1].attrs["strides"][0]) == 2
    assert [int(first.attrs[k]) for k in ("activation_bits", "weight_bits", "groups")] == [8, 8, 1]
    assert str(first.attrs["scheme"]) == "int8"
    # ReLU is the clamp at the zero point, which is the smallest integer.
    requantized = calls(integer, "tvm_compress.requantize")[0].attrs
    assert int(requantized["qmin"]) == int(requantized["zero_point"]) == -128


def test_additions_meet_at_a_256th_of_the_output():
    module = residual()
    integer = assert_same_numbers(module, uniform(module, INT8))
    dialect = "tvm_compress."
    block = [dialect + "requantize", "add", dialect + "requantize"]
    ops = operators(integer)
    add = ops.index("add")
    assert ops[add - 1 : add + 2] == block
    sides = [c.attrs for c in calls(integer, "tvm_compress.requantize") if str(c.attrs["dtype"]) == "int32"]
    assert all(int(a["zero_point"]) == 0 for a in sides)
    final = [c for c in calls(integer, "tvm_compress.requantize") if int(c.attrs["shift"]) == 8]
    assert len(final) == 1  # the second addition goes to the average, on its finer integers
    assert final[0].args[1].value.numpy().tolist() == [1]
    assert ops[-6:] == [
        "add",
        "nn.relu",
        "sum",
        dialect + "requantize",
        dialect + "dense",
        dialect + "dequantize",
    ]
    assert not {"mean", "relu"} & set(ops)


def test_fp32_sites_have_their_batch_norm_folded():
    module = residual()
    x = samples()
    _, integer = quantize(module, policy(), x)
    assert not [op for op in operators(integer) if op.startswith("tvm_compress.")]
    np.testing.assert_allclose(run(integer, x), run(module, x), rtol=1e-4, atol=1e-5)
    check_form(integer)


@pytest.mark.parametrize("quantized", ["stem", "a.conv2", "b.down", "fc"])
def test_one_quantized_site_among_fp32_ones(quantized):
    module = residual()
    assert_same_numbers(module, CompressionPolicy(sites={quantized: bits(3, 4)}))


def net(build, shape=(1, 3, 8, 8)):
    return Net(shape).module(build)


def test_relu6_is_the_clamp_of_the_requantization():
    def build(n, x):
        x = n.emit(relax.op.clip(n.conv(x, "one", 8, bias=True), 0.0, 0.5))
        return n.conv(x, "two", 4)

    module = net(build)
    x = samples()
    # A range wider than [0, 0.5], so that the clip must be seen in the integers.
    ranges = Ranges({"one": (-4.0, 4.0), "two": (-0.25, 1.0)})
    qdq = tvm.transform.Sequential([AnnotateQuantization(uniform(module, INT8), ranges), InsertQDQ()])(module)
    integer = RealizeInteger()(qdq)
    _, differences = run_forced(qdq, x, site_inputs(integer, x))
    assert max(differences.values()) <= 1
    attrs = calls(integer, "tvm_compress.requantize")[0].attrs
    step = 1.25 / 255
    assert int(attrs["qmin"]) == int(attrs["zero_point"])
    assert int(attrs["qmax"]) - int(attrs["zero_point"]) == round(0.5 / step)
    assert "clip" not in operators(integer)


def test_depthwise_and_dilated_convolutions():
    def build(n, x):
        x = n.emit(relax.op.nn.relu(n.batch_norm(n.conv(x, "full", 8, dilation=2, padding=2), "bn1")))
        x = n.emit(relax.op.nn.relu(n.batch_norm(n.conv(x, "depthwise", 8, groups=8), "bn2")))
        return n.conv(x, "point", 6, kernel=1, padding=0)

    module = net(build)
    integer = assert_same_numbers(module, uniform(module, INT8))
    assert [int(c.attrs["groups"]) for c in calls(integer, "tvm_compress.conv2d")] == [1, 8, 1]


def test_concatenation_joins_integers():
    def build(n, x):
        left, right = n.conv(x, "left", 4), n.emit(relax.op.nn.relu(n.conv(x, "right", 4)))
        return n.conv(n.emit(relax.op.concat([left, right], axis=3)), "joined", 4)

    module = net(build)
    integer = assert_same_numbers(module, uniform(module, INT8))
    assert operators(integer)[-3:] == ["concat", "tvm_compress.conv2d", "tvm_compress.dequantize"]


def test_what_has_no_integer_form_is_computed_in_float():
    def build(n, x):
        x = n.conv(x, "one", 6, bias=True)
        x = n.emit(relax.op.sigmoid(x))
        x = n.batch_norm(n.emit(relax.op.nn.relu(x)), "bn")  # a batch norm without a layer before it
        return n.conv(x, "two", 4)

    module = net(build)
    integer = assert_same_numbers(module, uniform(module, INT8))
    assert "sigmoid" in operators(integer)
    assert operators(integer).count("tvm_compress.quantize") == 2


def test_an_accumulator_that_two_read_is_computed_once():
    def build(n, x):
        x = n.conv(x, "one", 6, bias=True)
        left = n.emit(relax.op.nn.relu(x))
        return n.emit(relax.op.add(n.conv(left, "two", 6), x))

    module = net(build)
    integer = assert_same_numbers(module, uniform(module, INT8))
    assert len(calls(integer, "tvm_compress.conv2d")) == 2


def test_average_of_a_stored_tensor_sums_its_integers():
    def build(n, x):
        x = n.emit(relax.op.nn.relu(n.conv(x, "one", 6, bias=True)))
        y = n.emit(relax.op.mean(n.conv(x, "two", 6), axis=[1, 2]))
        z = n.emit(relax.op.mean(x, axis=[1, 2]))
        return n.dense(n.emit(relax.op.add(y, z)), "fc", 3)

    module = net(build)
    integer = assert_same_numbers(module, uniform(module, INT8))
    assert operators(integer).count("sum") == 2
    assert "mean" not in operators(integer)


@settings(max_examples=8, deadline=None)
@given(
    window=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    counted=st.booleans(),
    stored=st.booleans(),
)
def test_average_pooling_sums_integers(window, stride, padding, counted, stored):
    padding = min(padding, window // 2)

    def build(n, x):
        x = n.emit(relax.op.nn.relu(n.conv(x, "one", 6, bias=True)))
        pooled = n.conv(average_pool(n, x, window, stride, padding, count_include_pad=counted), "two", 4)
        # What another site reads too is integers before it is pooled.
        y = n.emit(relax.op.mean(n.conv(x, "three", 4), axis=[1, 2])) if stored else None
        pooled = n.emit(relax.op.mean(pooled, axis=[1, 2]))
        return pooled if y is None else n.emit(relax.op.add(pooled, y))

    module = net(build)
    integer = assert_same_numbers(module, uniform(module, INT8))
    # Where padding does not count, windows at the border have fewer numbers.
    is_float = padding > 0 and not counted
    assert ("nn.avg_pool2d" in operators(integer)) == is_float
    assert ("tvm_compress.window_sum" in operators(integer)) != is_float


def test_average_before_an_fp32_layer_and_as_the_result():
    def build(n, x):
        x = n.emit(relax.op.nn.relu(n.conv(x, "one", 6)))
        y = n.conv(x, "two", 6)
        x = n.emit(relax.op.mean(x, axis=[1, 2]))
        y = n.emit(relax.op.mean(y, axis=[1, 2]))
        return n.emit(relax.op.add(n.dense(x, "fc", 6), y))

    assert_same_numbers(net(build), policy(one=INT8, two=INT8))


def test_parameters_may_have_been_trained():
    module = sequential()
    x = samples()
    qdq, _ = quantize(module, uniform(module, bits(3, 4)), x)
    rng = np.random.default_rng(5)
    trained = {
        name: (value * rng.uniform(0.9, 1.1, size=value.shape)).astype(np.float32)
        for name, value in get_params(qdq).items()
    }
    qdq = set_params(qdq, trained)
    integer = RealizeInteger()(qdq)
    wanted, differences = run_forced(qdq, x, site_inputs(integer, x))
    assert max(differences.values()) <= 1
    np.testing.assert_allclose(run(integer, x), wanted, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan])
def test_a_broken_scale_is_named(value):
    module = sequential()
    qdq, _ = quantize(module, uniform(module, INT8), samples())
    broken = set_params(qdq, {"conv2.input_scale": np.array(value, np.float32)})
    with pytest.raises(ModelError, match=r"conv2\.input_scale"):
        RealizeInteger()(broken)


def test_sums_that_int32_cannot_hold_are_refused():
    module = Net((1, 70_000)).module(lambda n, x: n.dense(x, "big", 2, bias=False))
    weight = np.ones_like(get_params(module)["big.weight"])
    module = set_params(module, {"big.weight": weight})
    qdq = tvm.transform.Sequential([AnnotateQuantization(policy(big=INT8), Ranges()), InsertQDQ()])(module)
    with pytest.raises(KernelError, match="'big'"):
        RealizeInteger()(qdq)


def test_other_stages_are_refused():
    with pytest.raises(ModelError, match="RealizeInteger"):
        RealizeInteger()(sequential())


def test_it_is_deterministic_and_survives_json():
    module = residual()
    x = samples()
    _, integer = quantize(module, uniform(module, bits(2, 3)), x)
    _, again = quantize(module, uniform(module, bits(2, 3)), x)
    tvm.ir.assert_structural_equal(integer, again)
    loaded = tvm.ir.load_json(tvm.ir.save_json(integer))
    tvm.ir.assert_structural_equal(integer, loaded)
    np.testing.assert_array_equal(run(loaded, x), run(integer, x))
