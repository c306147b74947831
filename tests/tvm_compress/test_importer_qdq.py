"""ONNX models that are quantized already: read with their own scales, computed in integers."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.passes.numpy_interpreter import calls, conv2d, operators
from tvm_compress.compression import compress_model, model_policy, model_summary, uniform_policy
from tvm_compress.compressor import realize
from tvm_compress.errors import ModelError
from tvm_compress.importer.quantized_sites import QuantizedImportWarning
from tvm_compress.model import Model
from tvm_compress.passes.params import get_params, get_stage
from tvm_compress.passes.pipeline import build
from tvm_compress.samples.load import load_sample_data
from tvm_compress.twin import Twin

SHAPE = (3, 6, 6)


@dataclass
class Qdq:
    """Builds a quantized ONNX model layer by layer, as ONNX Runtime's static quantization writes them."""

    seed: int = 0
    activation: Any = np.int8
    opset: int = 13
    nodes: list = field(default_factory=list)
    constants: dict = field(default_factory=dict)

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)

    def constant(self, name, value):
        self.constants[name] = np.asarray(value)
        return name

    def node(self, op, inputs, output, **attrs):
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{op}_{output}", **attrs))
        return output

    def quantized(self, x, low, high):
        """Append QuantizeLinear and DequantizeLinear for a range."""
        info = np.iinfo(self.activation)
        scale = np.float32((high - low) / (float(info.max) - info.min))
        point = self.activation(np.clip(round(info.min - low / scale), info.min, info.max))
        extra = [self.constant(f"{x}_scale", scale), self.constant(f"{x}_zero_point", point)]
        q = self.node("QuantizeLinear", [x, *extra], f"{x}_QuantizeLinear_Output")
        return self.node("DequantizeLinear", [q, *extra], f"{x}_DequantizeLinear_Output")

    def weights(self, name, shape, axis=0, zero_point=0, dtype=np.int8, top=127):
        """Append quantized weights, a scale for each index along the axis."""
        count = shape[axis]
        integers = self.rng.integers(zero_point - top, zero_point + top + 1, shape)
        scale = self.rng.uniform(0.5, 2.0, count) / (top * np.sqrt(np.prod(shape) / count))
        point = np.full(count, zero_point, dtype)
        inputs = [
            self.constant(f"{name}_quantized", integers.clip(*limits(dtype)).astype(dtype)),
            self.constant(f"{name}_scale", scale.astype(np.float32)),
            self.constant(f"{name}_zero_point", point),
        ]
        return self.node("DequantizeLinear", inputs, f"{name}_DequantizeLinear_Output", axis=axis)

    def bias(self, name, count, scale=1e-3):
        inputs = [
            self.constant(f"{name}_quantized", self.rng.integers(-500, 500, count).astype(np.int32)),
            self.constant(f"{name}_quantized_scale", np.full(count, scale, np.float32)),
            self.constant(f"{name}_quantized_zero_point", np.zeros(count, np.int32)),
        ]
        return self.node("DequantizeLinear", inputs, f"{name}_DequantizeLinear_Output", axis=0)

    def model(self, output):
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "qdq",
            [info("x", TensorProto.FLOAT, [1, *SHAPE])],
            [info(output, TensorProto.FLOAT, [1, 5])],
            [numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        onnx.checker.check_model(made)
        return made


def limits(dtype):
    return np.iinfo(dtype).min, np.iinfo(dtype).max


def network(seed=0, activation=np.int8, **weights):
    """A convolution, a residual block with a depthwise layer, pooling, a dense layer."""
    q = Qdq(seed, activation)
    pads = {"pads": [1, 1, 1, 1]}
    x = q.quantized("x", -2.5, 2.5)
    y = q.node(
        "Conv", [x, q.weights("conv1.weight", (8, 3, 3, 3), **weights), q.bias("conv1.bias", 8)], "a", **pads
    )
    a = q.quantized(q.node("Relu", [y], "a_relu"), 0.0, 4.0)
    b = q.node(
        "Conv", [a, q.weights("conv2.weight", (8, 1, 3, 3)), q.bias("conv2.bias", 8)], "b", group=8, **pads
    )
    b = q.quantized(b, -4.0, 4.0)
    s = q.quantized(q.node("Relu", [q.node("Add", [b, a], "s")], "s_relu"), 0.0, 6.0)
    p = q.node("MaxPool", [s], "p", kernel_shape=[2, 2], strides=[2, 2])
    g = q.quantized(q.node("GlobalAveragePool", [q.quantized(p, 0.0, 6.0)], "g"), 0.0, 4.0)
    f = q.node("Flatten", [g], "f")
    y = q.node("Gemm", [f, q.weights("fc.weight", (5, 8)), q.bias("fc.bias", 5)], "y", transB=1)
    return q.model(q.quantized(y, -6.0, 6.0))


def evaluate(model, x):
    """Run a QDQ graph in numpy, in float64."""
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer} | {"x": x.astype(np.float64)}
    for node in model.graph.node:
        a, *rest = (values[name] for name in node.input)
        attrs = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        values[node.output[0]] = OPERATORS[node.op_type](a, *rest, attrs)
    return values[model.graph.output[0].name]


def along(value, rank, attrs):
    axis = attrs.get("axis", 1)
    return (
        value.reshape([-1 if i == axis else 1 for i in range(rank)]) if value.size > 1 else value.reshape(())
    )


def quantize(x, scale, point, attrs):
    return np.clip(np.rint(x.astype(np.float32) / scale) + point.astype(int), *limits(point.dtype))


def dequantize(q, scale, point, attrs):
    centred = q.astype(np.float64) - along(point, q.ndim, attrs)
    return centred * along(scale, q.ndim, attrs).astype(np.float64)


def conv(x, w, b, attrs):
    settings_ = {
        "groups": attrs.get("group", 1),
        "strides": (1, 1),
        "padding": attrs["pads"],
        "dilation": (1, 1),
    }
    return conv2d(x.transpose(0, 2, 3, 1), w, settings_).transpose(0, 3, 1, 2) + b.reshape(1, -1, 1, 1)


OPERATORS: dict[str, Any] = {
    "QuantizeLinear": quantize,
    "DequantizeLinear": dequantize,
    "Conv": conv,
    "Relu": lambda x, _: np.maximum(x, 0),
    "Add": lambda x, y, _: x + y,
    "Mul": lambda x, y, _: x * y,
    "Sigmoid": lambda x, _: 1 / (1 + np.exp(-x)),
    "HardSigmoid": lambda x, attrs: np.clip(attrs["alpha"] * x + attrs["beta"], 0, 1),
    "MaxPool": lambda x, _: x.reshape(*x.shape[:2], x.shape[2] // 2, 2, x.shape[3] // 2, 2).max(axis=(3, 5)),
    "GlobalAveragePool": lambda x, _: x.mean(axis=(2, 3), keepdims=True),
    "Flatten": lambda x, _: x.reshape(len(x), -1),
    "Gemm": lambda x, w, b, attrs: x @ (w.T if attrs.get("transB") else w) + b,
}


def images(count=4, seed=3):
    return np.random.default_rng(seed).normal(size=(count, *SHAPE)).astype(np.float32)


@pytest.mark.parametrize("activation", [np.int8, np.uint8])
def test_the_integers_are_those_of_the_file(activation):
    onnx_model = network(activation=activation)
    model = Model.from_onnx(onnx_model)
    assert get_stage(model.module) == "qdq"
    step = 12.0 / 255
    wanted = evaluate(onnx_model, images())
    assert np.ptp(wanted) > 20 * step
    for module in (model.module, realize(model.module)):
        steps = np.abs(Twin(module).predict(images()) - wanted) / step
        # A sum that lies between two integers may be rounded to either.
        assert steps.max() <= 2.01
        assert np.mean(steps < 0.01) > 0.8
    integer = realize(model.module)
    assert [len(calls(integer, f"tvm_compress.{kind}")) for kind in ("conv2d", "dense")] == [2, 1]
    assert not {"nn.conv2d", "matmul", "quantize"} & set(operators(integer))
    assert operators(integer).count("tvm_compress.quantize") == 1
    assert operators(integer).count("tvm_compress.dequantize") == 1


@pytest.mark.parametrize("activation", [np.int8, np.uint8])
def test_hard_swish_and_gates_are_those_of_the_file(activation):
    """Each operator of hard-swish between quantizations of its own, and an image times a number a channel."""
    q = Qdq(activation=activation)
    weights = [q.weights("conv1.weight", (8, 3, 3, 3)), q.bias("conv1.bias", 8)]
    x = q.node("Conv", [q.quantized("x", -2.5, 2.5), *weights], "a", pads=[1, 1, 1, 1])
    a = q.quantized(x, -4.0, 4.0)
    h = q.quantized(q.node("HardSigmoid", [a], "h", alpha=1 / 6, beta=0.5), 0.0, 1.0)
    s = q.quantized(q.node("Mul", [a, h], "s"), -0.4, 4.0)
    g = q.quantized(q.node("GlobalAveragePool", [s], "g"), -0.4, 2.0)
    t = q.quantized(q.node("Mul", [s, q.quantized(q.node("Sigmoid", [g], "k"), 0.0, 1.0)], "t"), -0.4, 3.0)
    f = q.node("Flatten", [q.quantized(q.node("GlobalAveragePool", [t], "p"), -0.4, 2.0)], "f")
    y = q.node("Gemm", [f, q.weights("fc.weight", (5, 8)), q.bias("fc.bias", 5)], "y", transB=1)
    onnx_model = q.model(q.quantized(y, -3.0, 3.0))
    integer = realize(Model.from_onnx(onnx_model).module)
    names = operators(integer)
    assert names.count("tvm_compress.table") == 2
    assert not {"sigmoid", "clip", "mean", "divide"} & set(names)
    assert names.count("tvm_compress.quantize") == names.count("tvm_compress.dequantize") == 1
    steps = np.abs(Twin(integer).predict(images()) - evaluate(onnx_model, images())) / (6.0 / 255)
    assert steps.max() <= 2.01
    assert np.mean(steps < 0.01) > 0.6


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), activation=st.sampled_from([np.int8, np.uint8]))
def test_any_weights_and_scales(seed, activation):
    onnx_model = network(seed, activation)
    found = Twin(realize(Model.from_onnx(onnx_model).module)).predict(images(2, seed))
    assert np.abs(found - evaluate(onnx_model, images(2, seed))).max() <= 2.01 * 12.0 / 255


def test_names_and_integers_of_the_parameters():
    onnx_model = network()
    params = get_params(Model.from_onnx(onnx_model).module)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx_model.graph.initializer}
    for site in ("conv1", "conv2", "fc"):
        scale = params[f"{site}.weight_scale"]
        assert np.array_equal(scale, stored[f"{site}.weight_scale"])
        column = scale.reshape(-1, *[1] * (params[f"{site}.weight"].ndim - 1))
        assert np.array_equal(np.rint(params[f"{site}.weight"] / column), stored[f"{site}.weight_quantized"])
        assert params[f"{site}.bias"].dtype == np.float32


def test_the_built_library_gives_the_twins_integers():
    import tvm
    from tvm import relax

    module = realize(Model.from_onnx(network()).module)
    machine = relax.VirtualMachine(build(module, "host").executable, tvm.cpu())
    for image in images(3):
        found = machine["main"](tvm.runtime.tensor(image[None])).numpy()
        assert np.array_equal(found, Twin(module).predict(image[None]))


def test_the_policy_and_the_summary_speak_of_int8(tmp_path):
    model = Model.from_onnx(network())
    policy = model_policy(model)
    assert policy is not None
    assert {name: site.scheme for name, site in policy.sites.items()} == dict.fromkeys(
        ("conv1", "conv2", "fc"), "int8"
    )
    assert model_summary(model)["stage"] == "qdq"
    model.save(tmp_path / "m")
    assert np.array_equal(
        Twin(realize(Model.load(tmp_path / "m").module)).predict(images()),
        Twin(realize(model.module)).predict(images()),
    )


def test_zero_points_of_weights_are_taken_off_where_that_fits():
    onnx_model = network(zero_point=128, dtype=np.uint8)
    integer = realize(Model.from_onnx(onnx_model).module)
    assert len(calls(integer, "tvm_compress.conv2d")) == 2
    wanted = evaluate(onnx_model, images())
    assert np.abs(Twin(integer).predict(images()) - wanted).max() <= 2.01 * 12.0 / 255


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({"zero_point": 60, "dtype": np.uint8, "top": 255}, "zero point"),
        ({"zero_point": -1, "dtype": np.int8, "top": 200}, "zero point"),
        ({"axis": 1}, "output channel"),
    ],
)
def test_what_the_kernels_do_not_take_computes_in_float_and_says_so(weights, reason):
    onnx_model = network(**weights)
    with pytest.warns(QuantizedImportWarning, match=f"'conv1'.*{reason}"):
        model = Model.from_onnx(onnx_model)
    policy = model_policy(model)
    assert policy is not None
    assert policy["conv1"].scheme == "fp32"
    assert reason in policy["conv1"].note
    assert policy["conv2"].scheme == "int8"
    integer = realize(model.module)
    assert [operators(integer).count(name) for name in ("nn.conv2d", "tvm_compress.conv2d")] == [1, 1]
    wanted = evaluate(onnx_model, images())
    assert np.abs(Twin(integer).predict(images()) - wanted).max() <= 2.01 * 12.0 / 255


def test_16_bit_activations_leave_their_layer_in_float():
    q = Qdq(opset=21)
    x = q.quantized("x", -2.5, 2.5)
    q.activation = np.uint16
    y = q.node("Conv", [x, q.weights("c.weight", (4, 3, 3, 3)), q.bias("c.bias", 4)], "y", pads=[1] * 4)
    wide = q.quantized(q.node("Relu", [y], "r"), 0.0, 4.0)
    g = q.node("Flatten", [q.node("GlobalAveragePool", [wide], "g")], "f")
    onnx_model = q.model(
        q.node("Gemm", [g, q.weights("d.weight", (5, 4)), q.bias("d.bias", 5)], "z", transB=1)
    )
    with pytest.warns(QuantizedImportWarning, match="'d'.*float"):
        model = Model.from_onnx(onnx_model)
    policy = model_policy(model)
    assert policy is not None
    assert [site.scheme for site in policy.sites.values()] == ["int8", "fp32"]
    found = Twin(realize(model.module)).predict(images())
    np.testing.assert_allclose(found, evaluate(onnx_model, images()), atol=2e-3)


def broken(change):
    onnx_model = network()
    change(onnx_model.graph)
    return onnx_model


def set_constant(name, value):
    def change(graph):
        for tensor in graph.initializer:
            if tensor.name == name:
                tensor.CopyFrom(numpy_helper.from_array(np.asarray(value), name))

    return change


def another_scale(graph):
    graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "other"))
    next(n for n in graph.node if n.output[0] == "a_relu_DequantizeLinear_Output").input[1] = "other"


def integers_pooled(graph):
    node = helper.make_node("Transpose", ["x_QuantizeLinear_Output"], ["t"], perm=[0, 1, 3, 2], name="turn")
    graph.node.insert(1, node)
    graph.node[2].input[0] = "t"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_constant("x_scale", np.float32(0.0)), "positive"),
        (set_constant("conv1.weight_scale", np.full(8, np.nan, np.float32)), "finite"),
        (another_scale, "differ"),
        (integers_pooled, "turn"),
    ],
)
def test_bad_models(change, words):
    with pytest.raises(ModelError, match=words):
        Model.from_onnx(broken(change))


def test_it_is_compressed_already():
    model = Model.from_onnx(network())
    policy = uniform_policy(model, target="host")
    with pytest.raises(ModelError, match="already"):
        compress_model(model, policy, load_sample_data("resnet8-fashion"))
