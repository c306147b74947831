"""InsertQDQ: the exact form of docs/architecture.md, its parameters, and its numbers."""
# mypy: disable-error-code="valid-type, misc"
# ruff: noqa: N805 - functions in TVMScript's classes are not methods

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from tests.passes.numpy_interpreter import calibrate, calls, operators, run
from tests.passes.quantized_networks import INT8, Net, Ranges, bits, policy, residual, sequential
from tvm_compress.errors import ModelError
from tvm_compress.passes.annotate_quantization import AnnotateQuantization
from tvm_compress.passes.insert_qdq import InsertQDQ
from tvm_compress.passes.params import get_params, get_stage, set_params
from tvm_compress.passes.quantization import quantize_weights


def to_qdq(module, sites, ranges=None):
    passes = [AnnotateQuantization(sites, ranges or Ranges()), InsertQDQ()]
    return tvm.transform.Sequential(passes)(module)


def assert_same_code(module, expected):
    mains = []
    for each in (module, expected):
        main = each["main"]
        for attr in list(main.attrs.keys()) if main.attrs else ():
            main = main.without_attr(attr)
        mains.append(main)
    tvm.ir.assert_structural_equal(*mains, map_free_vars=True)


def test_int8_dense_layer():
    @I.ir_module
    class Before:
        @R.function
        def main(
            x: R.Tensor((1, 4), "float32"), w: R.Tensor((3, 4), "float32"), b: R.Tensor((3,), "float32")
        ) -> R.Tensor((1, 3), "float32"):
            with R.dataflow():
                wt = R.permute_dims(w)
                y = R.matmul(x, wt)
                z = R.add(y, b)
                R.output(z)
            return z

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((1, 4), "float32"),
            w: R.Tensor((3, 4), "float32"),
            b: R.Tensor((3,), "float32"),
            weight_scale: R.Tensor((3,), "float32"),
            input_scale: R.Tensor((), "float32"),
        ) -> R.Tensor((1, 3), "float32"):
            with R.dataflow():
                q = R.quantize(x, input_scale, R.const(-128, "int8"), axis=-1, out_dtype="int8")
                c = R.clip(q, -128, 127)
                d = R.dequantize(c, input_scale, R.const(-128, "int8"), axis=-1)
                qw = R.quantize(w, weight_scale, R.const(0, "int8"), axis=0, out_dtype="int8")
                cw = R.clip(qw, -127, 127)
                dw = R.dequantize(cw, weight_scale, R.const(0, "int8"), axis=0)
                wt = R.permute_dims(dw)
                y = R.matmul(d, wt)
                z = R.add(y, b)
                R.output(z)
            return z

    values = [np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((3, 4), (3,))]
    main = Before["main"].with_attrs(
        {"num_input": 1, "tvm_compress.stage": "float", "params": [tvm.runtime.tensor(v) for v in values]}
    )
    qdq = to_qdq(tvm.IRModule({"main": main}), policy(w=INT8))
    assert_same_code(qdq, Expected)
    assert [var.name for var in qdq["main"].params] == ["x", "w", "b", "w.weight_scale", "w.input_scale"]
    params = get_params(qdq)
    np.testing.assert_array_equal(params["w"], values[0])
    np.testing.assert_allclose(params["w.weight_scale"], np.abs(values[0]).max(axis=1) / 127, rtol=1e-6)
    assert params["w.input_scale"] == np.float32(4 / 255)
    assert get_stage(qdq) == "qdq"
    relax.analysis.well_formed(qdq)


def test_bitserial_convolution_and_stored_tensor():
    def build(net: Net, x):
        y = net.emit(relax.op.nn.relu(net.conv(x, "stem", 4)))
        return net.emit(relax.op.add(net.conv(y, "low", 4), y))

    qdq = to_qdq(Net((1, 3, 6, 6)).module(build), policy(low=bits(2, 3)))

    @I.ir_module
    class Expected:
        @R.function
        def main(
            x: R.Tensor((1, 3, 6, 6), "float32"),
            stem: R.Tensor((4, 3, 3, 3), "float32"),
            low: R.Tensor((4, 4, 3, 3), "float32"),
            weight_scale: R.Tensor((4,), "float32"),
            input_scale: R.Tensor((), "float32"),
            stored_scale: R.Tensor((), "float32"),
        ) -> R.Tensor((1, 6, 6, 4), "float32"):
            with R.dataflow():
                p = R.permute_dims(x, axes=[0, 2, 3, 1])
                s = R.nn.conv2d(p, stem, padding=[1, 1, 1, 1], data_layout="NHWC", kernel_layout="OIHW")
                y = R.nn.relu(s)
                q = R.quantize(y, stored_scale, R.const(-128, "int8"), axis=-1, out_dtype="int8")
                c = R.clip(q, -128, 127)
                d = R.dequantize(c, stored_scale, R.const(-128, "int8"), axis=-1)
                qw = R.quantize(low, weight_scale, R.const(0, "int8"), axis=0, out_dtype="int8")
                cw = R.clip(qw, -1, 1)
                dw = R.dequantize(cw, weight_scale, R.const(0, "int8"), axis=0)
                q2 = R.quantize(d, input_scale, R.const(0, "uint8"), axis=-1, out_dtype="uint8")
                c2 = R.clip(q2, 0, 7)
                d2 = R.dequantize(c2, input_scale, R.const(0, "uint8"), axis=-1)
                conv = R.nn.conv2d(d2, dw, padding=[1, 1, 1, 1], data_layout="NHWC", kernel_layout="OIHW")
                z = R.add(conv, d)
                gv = z
                R.output(gv)
            return gv

    assert_same_code(qdq, Expected)
    names = [name for name in get_params(qdq) if "scale" in name]
    assert names == ["low.weight_scale", "low.input_scale", "low.stored_scale"]


def test_one_bit_weights_are_binarized():
    qdq = to_qdq(sequential(), policy(conv2=bits(1, 1)))
    assert [call.args[0].name for call in calls(qdq, "tvm_compress.binarize")] == ["conv2.weight"]
    dequantized = calls(qdq, "relax.dequantize")
    assert sum("weight_scale" in call.args[1].name for call in dequantized) == 1
    assert len(calls(qdq, "relax.quantize")) == 1


def test_everything_else_stays_as_it_was():
    module = residual()
    qdq = to_qdq(module, policy(a__conv2=INT8))
    inserted = {"quantize", "clip", "dequantize"}
    assert [op for op in operators(qdq) if op not in inserted] == operators(module)
    before, after = get_params(module), get_params(qdq)
    assert list(after)[: len(before)] == list(before)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert int(qdq["main"].attrs["num_input"]) == 1


def test_nothing_quantized_changes_nothing():
    module = sequential()
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 8))
    qdq = to_qdq(module, policy())
    assert operators(qdq) == operators(module)
    np.testing.assert_array_equal(run(qdq, x), run(module, x))


def test_eight_bits_are_close_to_float_and_two_bits_are_not():
    module = sequential()
    x = np.random.default_rng(0).normal(size=(4, 3, 8, 8))
    ranges = Ranges(calibrate(module, x))
    names = ("conv1", "conv2", "fc1", "fc2")
    wanted = run(module, x)
    errors = [
        np.abs(run(to_qdq(module, policy(**dict.fromkeys(names, site)), ranges), x) - wanted).max()
        for site in (INT8, bits(2, 2))
    ]
    assert errors[0] < 0.05 * np.abs(wanted).max() < errors[1]


def test_weights_of_the_module_are_those_of_the_quantizer():
    module = sequential()
    qdq = to_qdq(module, policy(conv2=bits(3, 4)))
    params = get_params(qdq)
    seen: dict[relax.Var, np.ndarray] = {}
    run(qdq, np.ones((1, 3, 8, 8)), lambda var, value: seen.setdefault(var, value))
    integers = [value for value in seen.values() if getattr(value, "dtype", None) == np.int8]
    expected = quantize_weights(params["conv2.weight"], params["conv2.weight_scale"], 3)
    np.testing.assert_array_equal(integers[-1], expected)


def test_wrong_stage_and_broken_weights_are_refused():
    with pytest.raises(ModelError, match="InsertQDQ"):
        InsertQDQ()(sequential())
    module = sequential()
    weight = get_params(module)["conv2.weight"].copy()
    weight[0, 0, 0, 0] = np.nan
    with pytest.raises(ModelError, match=r"conv2.*NaN|NaN"):
        to_qdq(set_params(module, {"conv2.weight": weight}), policy(conv2=INT8))
    annotated = AnnotateQuantization(policy(conv1=INT8), Ranges())(sequential())
    text = str(annotated["main"].attrs["tvm_compress.quantization"]).replace("conv1", "conv7")
    broken = tvm.IRModule({"main": annotated["main"].with_attr("tvm_compress.quantization", text)})
    with pytest.raises(ModelError, match="'conv7'"):
        InsertQDQ()(broken)
