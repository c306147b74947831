# ruff: noqa: N805 - functions in TVMScript's classes are not methods
# mypy: disable-error-code="valid-type, misc"
import warnings

import numpy as np
import onnx
import pytest
import torch
import tvm
from torch import nn
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx
from tvm.script import ir as I
from tvm.script import relax as R

from tests.passes.torch_networks import Branches, Residual, Sequential, example, import_torch, run
from tvm_compress.errors import ModelError, UnsupportedOperatorError
from tvm_compress.model import Model
from tvm_compress.passes.canonicalize import SUPPORTED_OPERATORS, Canonicalize
from tvm_compress.passes.graph import bindings, operator
from tvm_compress.passes.params import get_params, get_stage, with_main, with_values
from tvm_compress.passes.sites import find_sites


def with_random_params(module, seed=0):
    generator = np.random.default_rng(seed)
    main = module["main"]
    variables = list(main.params)[int(main.attrs["num_input"]) :]
    shapes = [tuple(int(extent) for extent in var.ty.shape) for var in variables]
    values = [generator.normal(size=shape).astype("float32") for shape in shapes]
    return with_main(module, with_values(main, values))


def same_code(module, expected):
    attributes = dict(expected["main"].attrs)
    main = module["main"]
    for name in list(main.attrs.keys()):
        if name not in attributes:
            main = main.without_attr(name)
    tvm.ir.assert_structural_equal(main, expected["main"].with_attrs({}), map_free_vars=True)


def to_onnx(network, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.zeros(1, 3, 8, 8),),
            path,
            dynamo=False,
            input_names=["x"],
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
        )
    return onnx.load(path)


def operators(module):
    return [operator(value) for _, value in bindings(module["main"])]


def test_imported_convolution_and_dense_layer_become_canonical():
    @I.ir_module(s_tir=True)
    class Before:
        @R.function
        def main(
            x: R.Tensor((1, 3, 8, 8), "float32"),
            cw: R.Tensor((4, 3, 3, 3), "float32"),
            cb: R.Tensor((4,), "float32"),
            dw: R.Tensor((5, 64), "float32"),
            db: R.Tensor((5,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                a = R.nn.conv2d(x, cw, padding=[1, 1, 1, 1])
                b = R.reshape(cb, (1, 4, 1, 1))
                c = R.add(a, b)
                d = R.nn.max_pool2d(c, pool_size=[2, 2], strides=[2, 2])
                e = R.zeros_like(d)
                f = (d, e)
                g = f[0]
                h = R.clip(g, 0, 6)
                i = R.reshape(h, (1, 64))
                j = R.permute_dims(dw, [1, 0])
                k = R.matmul(i, j, out_dtype="float32")
                m = R.add(db, k)
                R.output(m)
            return m

    @I.ir_module(s_tir=True)
    class Expected:
        @R.function
        def main(
            x: R.Tensor((1, 3, 8, 8), "float32"),
            cw: R.Tensor((4, 3, 3, 3), "float32"),
            cb: R.Tensor((4,), "float32"),
            dw: R.Tensor((5, 64), "float32"),
            db: R.Tensor((5,), "float32"),
        ):
            R.func_attr({"num_input": 1, "tvm_compress.stage": "float"})
            with R.dataflow():
                a = R.permute_dims(x, [0, 2, 3, 1])
                b = R.nn.conv2d(a, cw, padding=[1, 1, 1, 1], data_layout="NHWC", kernel_layout="OIHW")
                c = R.add(b, cb)
                d = R.nn.max_pool2d(c, pool_size=[2, 2], strides=[2, 2], layout="NHWC")
                e = R.clip(d, 0.0, 6.0)
                f = R.permute_dims(e, [0, 3, 1, 2])
                g = R.nn.batch_flatten(f)
                h = R.permute_dims(dw)
                i = R.matmul(g, h)
                j = R.add(i, db)
                R.output(j)
            return j

    same_code(Canonicalize()(with_random_params(Before)), Expected)


def test_gap_needs_no_reshape(residual):
    names = operators(residual.module)
    assert names.count("relax.mean") == 1
    assert not {"relax.reshape", "relax.nn.batch_flatten", "relax.squeeze"} & set(names)
    # One transposition of the input, one of the dense layer's weights.
    assert names.count("relax.permute_dims") == 2


@pytest.mark.parametrize("network", [Sequential, Residual, Branches])
def test_same_numbers_as_torch_from_torch_and_from_onnx(network, tmp_path):
    made = example(network())
    np.testing.assert_allclose(run(made.module, made.x), made.expected(), rtol=1e-4, atol=1e-5)
    module = Canonicalize()(from_onnx(to_onnx(made.network, tmp_path / "x.onnx"), keep_params_in_input=True))
    assert [site.name for site in find_sites(module)] == [site.name for site in find_sites(made.module)]
    if network is Branches:  # ONNX spells hard-swish in another order
        np.testing.assert_allclose(run(module, made.x), made.expected(), rtol=1e-4, atol=1e-5)
        return
    mains = [m["main"].without_attr("params") for m in (module, made.module)]
    tvm.ir.assert_structural_equal(*mains, map_free_vars=True)
    for value, expected in zip(get_params(module).values(), get_params(made.module).values(), strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("name", ["sequential", "residual", "branches"])
def test_twice_is_once_and_only_supported_operators(name, request):
    module = request.getfixturevalue(name).module
    tvm.ir.assert_structural_equal(Canonicalize()(module), module)
    assert get_stage(module) == "float"
    assert set(operators(module)) - {""} <= SUPPORTED_OPERATORS


def test_parameters_have_torch_names_and_values(residual):
    params = get_params(residual.module)
    expected = {k: v.numpy() for k, v in residual.network.state_dict().items() if "num_batches" not in k}
    assert set(params) == set(expected)
    for name, value in params.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_constants_of_layers_become_parameters(residual):
    function = residual.imported["main"]
    values = dict(zip(list(function.params)[1:], function.attrs["params"], strict=True))
    bound = relax.transform.BindParams("main", values)(residual.imported)
    bound = with_main(bound, bound["main"].with_attr("params", []))
    module = Canonicalize()(bound)
    assert [site.name for site in find_sites(module)][:2] == ["conv2d_0", "conv2d_1"]
    assert "batch_norm_0.running_var" in get_params(module)
    assert "dense_0.bias" in get_params(module)
    for value, expected in zip(
        get_params(module).values(), get_params(residual.module).values(), strict=True
    ):
        np.testing.assert_array_equal(value, expected)


def test_shared_layer_gets_a_copy_per_use():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(torch.tanh(self.conv(x)))

    network = Twice()
    module = Canonicalize()(import_torch(network))
    assert [site.name for site in find_sites(module)] == ["conv", "conv2d_1"]
    assert list(get_params(module)) == ["conv.weight", "conv.bias", "conv2d_1.weight", "conv2d_1.bias"]
    x = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype("float32")
    # The output is an image: it is given back in the source's layout.
    np.testing.assert_allclose(run(module, x), network(torch.from_numpy(x)).detach().numpy(), atol=1e-5)


def test_input_normalisation_and_clips_are_merged():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            x = (x - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)) / 0.5
            y = torch.relu(self.conv(x)).clamp(max=6.0)
            return torch.relu(y.mean((2, 3)))

    network = Normalised()
    module = Canonicalize()(import_torch(network))
    names = operators(module)
    assert names.count("relax.clip") == 1
    assert names.count("relax.permute_dims") == 1
    assert get_params(module)["subtract_0.value"].shape == (3,)
    x = np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype("float32")
    np.testing.assert_allclose(run(module, x), network(torch.from_numpy(x)).detach().numpy(), atol=1e-5)
    tvm.ir.assert_structural_equal(Canonicalize()(module), module)


class Unknown(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first = first
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return nn.functional.gelu(x) if self.first else nn.functional.gelu(self.conv(x))


@pytest.mark.parametrize(("first", "place"), [(False, "after conv"), (True, "before the first layer")])
def test_unsupported_operator_names_operator_and_layer(first, place):
    with pytest.raises(UnsupportedOperatorError, match=rf"relax\.nn\.gelu {place} is not supported"):
        Canonicalize()(import_torch(Unknown(first)))


def test_training_mode_and_axes_are_refused(sequential):
    @I.ir_module(s_tir=True)
    class Mean:
        @R.function
        def main(x: R.Tensor((1, 3, 8, 8), "float32")):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                a = R.mean(x, axis=[1])
                R.output(a)
            return a

    with pytest.raises(UnsupportedOperatorError, match=r"relax\.mean .*averages axes \[1\]"):
        Canonicalize()(Mean)
    with pytest.raises(ModelError, match="12 parameters, but values for 0"):
        Canonicalize()(with_main(sequential.module, sequential.module["main"].without_attr("params")))


class Padded(nn.Module):
    """Strided convolutions padded as TensorFlow does it, more behind than before; (3, 8, 8) to 10."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2)
        self.depthwise = nn.Conv2d(8, 8, 5, 2, padding=1, groups=8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.stem(nn.functional.pad(x, (0, 1, 0, 1))))
        x = self.depthwise(nn.functional.pad(x, (0, 1, 0, 1)))
        return self.fc(x.mean((2, 3)))


def test_padding_before_a_convolution_becomes_its_own(tmp_path):
    made = example(Padded())
    onnx_file = to_onnx(made.network, tmp_path / "x.onnx")
    for module in (made.module, Model.from_onnx(onnx_file).module):
        assert "relax.nn.pad" not in operators(module)
        assert [site.padding for site in find_sites(module)][:2] == [(0, 0, 1, 1), (1, 1, 2, 2)]
        np.testing.assert_allclose(run(module, made.x), made.expected(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("width", "mode", "zero", "reason"),
    [
        ((0, 0, 0, 0, 0, 1, 0, 1), "constant", 1.0, r"pads with 1.0 \(constant\), not with zeros"),
        ((0, 0, 0, 0, 0, 1, 0, 1), "reflect", 0.0, r"pads with 0.0 \(reflect\), not with zeros"),
        ((0, 0, 0, 0, 0, -1, 0, 0), "constant", 0.0, "cuts off"),
        ((0, 0, 0, 2, 0, 0, 0, 0), "constant", 0.0, "other axes than height and width"),
        ((0, 0, 0, 0, 0, 1, 0, 1), "constant", 0.0, "only a convolution"),
    ],
)
def test_other_paddings_are_refused(width, mode, zero, reason):
    x = relax.Var("x", relax.TensorType((1, 3, 8, 8), "float32"))
    w = relax.Var("w", relax.TensorType((4, 5 if "axes" in reason else 3, 1, 1), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, w], attrs={"num_input": 1}):
        with builder.dataflow():
            padded = builder.emit(relax.op.nn.pad(x, width, mode, zero))
            if "only" in reason:
                padded = builder.emit(relax.op.nn.max_pool2d(padded, [3, 3], [2, 2]))
            output = builder.emit_output(relax.op.nn.conv2d(padded, w))
        builder.emit_func_output(output)
    with pytest.raises(UnsupportedOperatorError, match=reason):
        Canonicalize()(with_random_params(builder.finalize()))


def test_dynamic_batch_is_refused():
    batch = tvm.tirx.Var("n", "int64")
    x = relax.Var("x", relax.TensorType((batch, 4), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(relax.op.nn.relu(x))
        builder.emit_func_output(output)
    with pytest.raises(ModelError, match="Input 'x' has no constant shape"):
        Canonicalize()(builder.finalize())
