"""ONNX files as canonical Relax modules: the same sites, names and values as from torch."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import tvm
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from tvm import relax

from tvm_compress.calibration import calibrate
from tvm_compress.compressor import realize
from tvm_compress.errors import ModelError, UnsupportedOperatorError
from tvm_compress.model import Model, load_model
from tvm_compress.passes.graph import bindings, operator
from tvm_compress.passes.params import bind_params, get_params
from tvm_compress.passes.pipeline import compress
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.sites import find_sites
from tvm_compress.samples.load import load_sample, sample_module
from tvm_compress.twin import Twin

RNG = np.random.default_rng


def export(network: nn.Module, path: Path, example: torch.Tensor, **settings: Any) -> Path:
    settings = {"dynamo": True, "optimize": False, "verbose": False} | settings
    with warnings.catch_warnings():
        # The exporter's own: what it still uses of torch's older interfaces.
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (example,), str(path), **settings)
    return path


def run(module: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    executable = relax.build(bind_params(module), "llvm")
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()


def reference(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return onnx.reference.ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x})[0]


def test_sample_from_onnx_is_the_sample_from_torch(tmp_path: Path) -> None:
    path = export(sample_module("resnet8-fashion"), tmp_path / "network.onnx", torch.zeros(1, 1, 28, 28))
    from_onnx, from_torch = load_model(path), load_sample("resnet8-fashion")
    assert from_onnx.metadata["source"] == "network.onnx"
    assert find_sites(from_onnx.module) == find_sites(from_torch.module)
    assert list(get_params(from_onnx.module)) == list(get_params(from_torch.module))
    # The attribute `params` is compared too: everything downstream is the same, to the integer.
    tvm.ir.assert_structural_equal(from_onnx.module, from_torch.module)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)))
        self.fc = nn.Linear(16, 3, bias=False)
        generator = torch.Generator().manual_seed(0)
        for name, value in self.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5 * name.endswith("var"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(nn.functional.hardtanh(self.layer1(x), 0.0, 6.0), 2)
        return self.fc(x.reshape(x.shape[0], -1))


@pytest.mark.parametrize(
    ("settings", "folded"),
    [
        ({"dynamic_shapes": ({0: torch.export.Dim("batch", min=1, max=9)},)}, False),
        ({"optimize": True}, True),
        ({"dynamo": False}, True),
        ({"dynamo": False, "input_names": ["image"], "dynamic_axes": {"image": {0: "batch"}}}, True),
    ],
)
def test_exports_of_a_module(tmp_path: Path, settings: dict[str, Any], folded: bool) -> None:
    network = Small().eval()
    example = torch.zeros(2 if "dynamic_shapes" in settings else 1, 2, 6, 6)
    module = load_model(export(network, tmp_path / "network.onnx", example, **settings)).module
    assert [site.name for site in find_sites(module)] == ["layer1.0.0", "fc"]
    expected = {"layer1.0.0.weight", "layer1.0.0.bias", "fc.weight"}
    if not folded:
        expected |= {f"layer1.0.1.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert set(get_params(module)) == expected
    x = torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        np.testing.assert_allclose(run(module, x.numpy()), network(x).numpy(), rtol=1e-4, atol=1e-4)


# Graphs as other exporters write them


def graph(
    nodes: list[onnx.NodeProto],
    values: dict[str, np.ndarray],
    batch: int | str = 1,
    channels: int = 2,
    as_constants: bool = False,
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    if as_constants:
        nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in tensors] + nodes
    proto = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, channels, 6, 6])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3])],
        [] if as_constants else tensors,
    )
    return helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def values(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = RNG(0)
    return {name: rng.uniform(0.1, 1.0, shape).astype(np.float32) for name, shape in shapes.items()}


def node(op: str, inputs: str, output: str, name: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], name=name, **attributes)


def head(source: str = "features") -> list[onnx.NodeProto]:
    return [
        node("GlobalAveragePool", source, "pooled"),
        node("Flatten", "pooled", "flat"),
        node("Gemm", "flat head", "logits", transB=1),
    ]


def matmul_and_add() -> tuple[onnx.ModelProto, set[str]]:
    nodes = [
        node("Conv", "image conv_w", "raw", pads=[1, 1, 1, 1]),
        node("Add", "conv_b raw", "features"),
        node("GlobalAveragePool", "features", "pooled"),
        node("Flatten", "pooled", "flat"),
        node("MatMul", "flat w", "product"),
        node("Add", "product b", "logits"),
    ]
    shapes = {"conv_w": (4, 2, 3, 3), "conv_b": (1, 4, 1, 1), "w": (4, 3), "b": (3,)}
    return graph(nodes, values(**shapes)), {"conv_w", "conv_b", "w", "b"}


def gemm_with_factors() -> tuple[onnx.ModelProto, set[str]]:
    nodes = [
        node("GlobalAveragePool", "image", "pooled"),
        node("Flatten", "pooled", "flat"),
        node("Gemm", "flat w b", "logits", alpha=0.5, beta=2.0),
    ]
    return graph(nodes, values(w=(2, 3), b=(1,))), {"w", "b"}


def weights_in_constants() -> tuple[onnx.ModelProto, set[str]]:
    nodes = [
        node("Conv", "image conv.weight conv.bias", "raw"),
        node("BatchNormalization", "raw norm.weight norm.bias norm.mean norm.var", "features"),
        *head(),
    ]
    shapes = {"conv.weight": (4, 2, 3, 3), "conv.bias": (4,), "head": (3, 4)}
    shapes |= {f"norm.{name}": (4,) for name in ("weight", "bias", "mean", "var")}
    return graph(nodes, values(**shapes), as_constants=True), set(shapes)


def anonymous_weights() -> tuple[onnx.ModelProto, set[str]]:
    nodes = [
        node("Conv", "image onnx::Conv_1 12", "one", name="/body/body.0/conv/Conv"),
        node("Identity", "onnx::Conv_1", "val_7"),
        node("Conv", "one val_7", "features", name="/body/body.1/conv/Conv"),
        *head(),
    ]
    arrays = values(**{"onnx::Conv_1": (2, 2, 3, 3), "12": (2,), "head": (3, 2)})
    return graph(nodes, arrays), {"body.0.conv.weight", "body.0.conv.bias", "body.1.conv.weight", "head"}


def transposed_and_reshaped() -> tuple[onnx.ModelProto, set[str]]:
    nodes = [
        node("Transpose", "fc.weight", "Transpose_3", perm=[1, 0]),
        node("GlobalAveragePool", "image", "pooled"),
        node("Shape", "pooled", "shape"),
        node("Slice", "shape starts ends", "batch"),
        node("Concat", "batch rest", "new_shape", axis=0),
        node("Reshape", "pooled new_shape", "flat"),
        node("Dropout", "flat", "dropped"),
        node("MatMul", "dropped Transpose_3", "logits"),
    ]
    arrays = values(**{"fc.weight": (3, 2)})
    arrays |= {"starts": np.array([0]), "ends": np.array([1]), "rest": np.array([-1])}
    return graph(nodes, arrays, batch="batch"), {"fc.weight"}


def sum_of_three() -> tuple[onnx.ModelProto, set[str]]:
    nodes = [
        node("Conv", "image scope/w", "raw"),
        node("Relu", "raw", "active"),
        node("Sum", "raw active raw", "total"),
        node("Sum", "total", "features"),
        *head(),
    ]
    return graph(nodes, values(**{"scope/w": (4, 2, 3, 3), "head": (3, 4)})), {"scope/w", "head"}


@pytest.mark.parametrize(
    "make",
    [
        sum_of_three,
        matmul_and_add,
        gemm_with_factors,
        weights_in_constants,
        anonymous_weights,
        transposed_and_reshaped,
    ],
)
def test_graphs_of_other_exporters(make: Callable[[], tuple[onnx.ModelProto, set[str]]]) -> None:
    proto, names = make()
    before = proto.SerializeToString()
    module = Model.from_onnx(proto).module
    assert proto.SerializeToString() == before
    assert set(get_params(module)) == names
    x = RNG(1).normal(size=(1, 2, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(run(module, x), reference(proto, x), rtol=1e-4, atol=1e-4)


# Refusals


def refused() -> dict[str, tuple[onnx.ModelProto, type[ModelError], str]]:
    arrays = values(**{"w": (4, 2, 3, 3), "head": (3, 4)})
    with_nan = {**arrays, "w": arrays["w"] * np.float32("nan")}
    conv = node("Conv", "image w", "features", name="/stem/Conv")
    foreign = helper.make_node("Blur", ["image"], ["features"], name="stem/blur", domain="com.example")
    statistics = values(a=(2,), b=(2,), c=(2,), d=(2,), head=(3, 2))
    training = helper.make_node(
        "BatchNormalization", ["image", *"abcd"], ["features", "m", "v"], name="/norm/BN", training_mode=1
    )
    no_importer = node("LpNormalization", "image", "features", name="/norm/LpNormalization")
    return {
        "operator": (
            graph([no_importer, *head()], statistics),
            UnsupportedOperatorError,
            "'LpNormalization' of layer 'norm'",
        ),
        "domain": (
            graph([foreign, *head()], arrays),
            UnsupportedOperatorError,
            "'com.example.Blur'.*'stem/blur'",
        ),
        "tool": (
            graph([node("Sin", "image", "wave"), node("Conv", "wave w", "features"), *head()], arrays),
            UnsupportedOperatorError,
            r"sin",
        ),
        "NaN": (graph([conv, *head()], with_nan), ModelError, "'w' holds 72 values"),
        "batch": (graph([conv, *head()], arrays, batch=4), ModelError, "fixed to batches of 4"),
        "training": (
            graph([training, *head()], statistics),
            ModelError,
            "'norm' was exported in training mode",
        ),
        "shapes": (graph([conv, *head()], arrays, channels=3), ModelError, "fails|do not fit"),
        "undefined": (
            graph([node("Conv", "image w nothing", "features"), *head()], arrays),
            ModelError,
            "not valid",
        ),
        "nothing": (onnx.ModelProto(), ModelError, "no nodes"),
    }


@pytest.mark.parametrize("case", refused())
def test_refused(case: str) -> None:
    proto, error, message = refused()[case]
    with pytest.raises(error, match=message):
        Model.from_onnx(proto)


def pads(opset: int, widths: list[int], value: float = 0.0, axes: list[int] | None = None) -> onnx.ModelProto:
    """A convolution behind a Pad, as this opset spells it."""
    arrays = values(w=(4, 2, 3, 3), head=(3, 4), bias=(3,))
    if opset < 11:
        pad = node("Pad", "image", "padded", pads=widths, value=value)
    else:
        arrays |= {"widths": np.asarray(widths), "value": np.asarray(value, np.float32)}
        arrays |= {} if axes is None else {"axes": np.asarray(axes)}
        pad = node("Pad", "image widths value" + (" axes" if axes else ""), "padded")
    convolution = node("Conv", "padded w", "features", strides=[2, 2], pads=[1, 0, 0, 0])
    nodes = [pad, convolution, *head()]
    nodes[-1].input.append("bias")  # needed until opset 10
    proto = graph(nodes, arrays)
    proto.opset_import[0].version = opset
    return proto


@pytest.mark.parametrize(
    "proto",
    [
        pads(10, [0, 0, 0, 0, 0, 0, 1, 1]),
        pads(13, [0, 0, 0, 0, 0, 0, 1, 1]),
        pads(18, [0, 0, 1, 1], axes=[-2, 3]),
    ],
)
def test_pad_becomes_the_padding_of_the_convolution(proto: onnx.ModelProto) -> None:
    module = Model.from_onnx(proto).module
    assert find_sites(module)[0].padding == (1, 0, 1, 1)
    x = RNG(0).normal(size=(1, 2, 6, 6)).astype(np.float32)
    np.testing.assert_allclose(run(module, x), reference(proto, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "proto",
    [
        pads(13, [0, 0, 0, 0, 0, 0, 1, 1], value=0.5),
        pads(13, [0, 0, -1, 0, 0, 0, 1, 1]),
    ],
)
def test_other_pads_are_refused(proto: onnx.ModelProto) -> None:
    with pytest.raises(UnsupportedOperatorError, match="pad"):
        Model.from_onnx(proto)


def with_extents(*extents: int | str) -> onnx.ModelProto:
    """A network whose file says so much of its input's size; -1 as PaddlePaddle writes what is open."""
    nodes = [node("Conv", "image w", "features"), *head()]
    proto = graph(nodes, values(**{"w": (4, 2, 3, 3), "head": (3, 4)}))
    shape = helper.make_tensor_value_info("image", TensorProto.FLOAT, extents)
    proto.graph.input[0].CopyFrom(shape)
    return proto


def test_size_that_the_file_leaves_open() -> None:
    proto = with_extents(-1, 2, "height", -1)
    with pytest.raises(ModelError, match=r"'image' is \[\?, 2, \?, \?\]: the file leaves its size open"):
        Model.from_onnx(proto)
    with pytest.raises(ModelError, match=r"which \(1, 3, 6, 6\) does not fit"):
        Model.from_onnx(proto, input_shape=(1, 3, 6, 6))
    with pytest.raises(ModelError, match=r"which \(2, 6, 6\) does not fit"):
        Model.from_onnx(proto, input_shape=(2, 6, 6))
    model = Model.from_onnx(proto, input_shape=(1, 2, 8, 6))
    assert model.input_spec.shape == (1, 2, 8, 6)
    x = RNG(0).normal(size=(1, 2, 8, 6)).astype(np.float32)
    np.testing.assert_allclose(run(model.module, x), reference(proto, x), rtol=1e-4, atol=1e-5)
    assert Model.from_onnx(with_extents(-1, 2, 6, 6)).input_spec.shape == (1, 2, 6, 6)


def test_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    with pytest.raises(ModelError, match="does not exist"):
        Model.from_onnx(path)
    path.write_bytes(b"this is no protobuf")
    with pytest.raises(ModelError, match="not a readable ONNX file"):
        load_model(path)


SPELLINGS: dict[str, list[tuple[Any, ...]]] = {
    "operator": [("HardSwish", ["a"], "b", {})],
    "hard-sigmoid": [
        ("HardSigmoid", ["a"], "s", {"alpha": 1 / 6, "beta": 0.5}),
        ("Mul", ["s", "a"], "b", {}),
    ],
    "arithmetic": [
        ("Add", ["a", "three"], "s", {}),
        ("Clip", ["s", "zero", "six"], "t", {}),
        ("Mul", ["a", "t"], "u", {}),
        ("Div", ["u", "six"], "b", {}),
    ],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_hard_swish_becomes_a_table(name: str, tmp_path: Path) -> None:
    rng = RNG(0)
    constants = {
        "w1": rng.normal(size=(8, 2, 3, 3)).astype(np.float32),
        "w2": rng.normal(size=(5, 8, 3, 3)).astype(np.float32),
        **{key: np.float32(value) for key, value in {"zero": 0, "three": 3, "six": 6}.items()},
    }
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"]),
        *(helper.make_node(op, inputs, [output], **attrs) for op, inputs, output, attrs in SPELLINGS[name]),
        helper.make_node("Conv", ["b", "w2"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["y"]),
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "hard-swish",
        [info("x", TensorProto.FLOAT, [1, 2, 6, 6])],
        [info("y", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()],
    )
    path = tmp_path / "network.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8), path)
    module = load_model(path).module
    x = rng.normal(size=(16, 2, 6, 6)).astype(np.float32)
    site = SitePolicy(scheme="int8", weight_bits=8, activation_bits=8)
    policy = CompressionPolicy(sites={"w1": site, "w2": site})
    integer = realize(compress(module, policy, calibration=calibrate(module, x)))
    convolution, requantization = "tvm_compress.conv2d", "tvm_compress.requantize"
    names = [operator(value) for _, value in bindings(integer["main"])]
    assert names[2:6] == [convolution, requantization, "tvm_compress.table", convolution]
    expected = Twin(module).predict(x)
    np.testing.assert_allclose(Twin(integer).predict(x), expected, atol=0.05 * np.abs(expected).max())
