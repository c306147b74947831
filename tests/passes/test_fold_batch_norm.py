# ruff: noqa: N805 - functions in TVMScript's classes are not methods
# mypy: disable-error-code="valid-type, misc"
import numpy as np
import pytest
import tvm
from tvm.script import ir as I
from tvm.script import relax as R

from tests.passes.torch_networks import run
from tvm_compress.errors import ModelError
from tvm_compress.passes.fold_batch_norm import FoldBatchNorm
from tvm_compress.passes.graph import bindings, operator
from tvm_compress.passes.params import get_params, with_stage, with_values
from tvm_compress.passes.pipeline import compress
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.sites import find_sites


def operators(module):
    return [operator(value) for _, value in bindings(module["main"])]


@pytest.mark.parametrize("name", ["sequential", "residual", "branches"])
def test_same_numbers_without_batch_norm(name, request):
    made = request.getfixturevalue(name)
    folded = FoldBatchNorm()(made.module)
    assert "relax.nn.batch_norm" not in operators(folded)
    assert [site.name for site in find_sites(folded)] == [site.name for site in find_sites(made.module)]
    assert not any("running" in name for name in get_params(folded))
    np.testing.assert_allclose(run(folded, made.x), made.expected(), rtol=1e-4, atol=1e-5)
    assert FoldBatchNorm()(folded).same_as(folded)


def test_code_and_values():
    @I.ir_module(s_tir=True)
    class Before:
        @R.function
        def main(
            x: R.Tensor((1, 2), "float32"),
            a: R.Tensor((2, 2), "float32"),
            g: R.Tensor((2,), "float32"),
            b: R.Tensor((2,), "float32"),
            m: R.Tensor((2,), "float32"),
            v: R.Tensor((2,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                p = R.permute_dims(a)
                q = R.matmul(x, p)
                r = R.nn.batch_norm(q, g, b, m, v, axis=1, epsilon=0.0, training=False)
                s = r[0]
                t = R.nn.relu(s)
                R.output(t)
            return t

    @I.ir_module(s_tir=True)
    class Expected:
        @R.function
        def main(
            x: R.Tensor((1, 2), "float32"), a: R.Tensor((2, 2), "float32"), ab: R.Tensor((2,), "float32")
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                p = R.permute_dims(a)
                q = R.matmul(x, p)
                s = R.add(q, ab)
                t = R.nn.relu(s)
                R.output(t)
            return t

    values = [[[1, 2], [3, 4]], [2, -1], [10, 20], [1, 2], [4, 0.25]]
    main = with_values(Before["main"], [np.array(value, "float32") for value in values])
    folded = FoldBatchNorm()(with_stage(tvm.IRModule({"main": main}), "float"))
    main = folded["main"].without_attr("params").without_attr("tvm_compress.stage")
    tvm.ir.assert_structural_equal(main, Expected["main"], map_free_vars=True)
    params = get_params(folded)
    assert list(params) == ["a", "a.bias"]
    np.testing.assert_array_equal(params["a"], [[1, 2], [-6, -8]])
    np.testing.assert_array_equal(params["a.bias"], [9, 24])


def test_what_is_not_alone_behind_a_site_stays():
    @I.ir_module(s_tir=True)
    class Module:
        @R.function
        def main(
            x: R.Tensor((1, 2), "float32"),
            a: R.Tensor((2, 2), "float32"),
            g: R.Tensor((2,), "float32"),
            b: R.Tensor((2,), "float32"),
            m: R.Tensor((2,), "float32"),
            v: R.Tensor((2,), "float32"),
        ):
            R.func_attr({"num_input": 1})
            with R.dataflow():
                p = R.permute_dims(a)
                q = R.matmul(x, p)
                r = R.nn.batch_norm(q, g, b, m, v, axis=1, training=False)
                s = r[0]
                # The layer's own output is read once more: its weights cannot change.
                t = R.add(s, q)
                R.output(t)
            return t

    main = with_values(Module["main"], [np.ones((2, 2), "float32")] + [np.ones(2, "float32")] * 4)
    module = with_stage(tvm.IRModule({"main": main}), "float")
    assert FoldBatchNorm()(module).same_as(module)


def test_in_a_qdq_module_only_fp32_sites_are_folded(residual):
    class Ranges:
        def range(self, site, bits):
            return -3.0, 3.0

    int8 = SitePolicy(scheme="int8", weight_bits=8, activation_bits=8)
    qdq = compress(residual.module, CompressionPolicy({"conv1": int8, "layer2.conv2": int8}), None, Ranges())
    folded = FoldBatchNorm()(qdq)
    assert operators(residual.module).count("relax.nn.batch_norm") == 6
    assert operators(folded).count("relax.nn.batch_norm") == 2
    assert {"bn1.running_mean", "layer2.bn2.running_mean"} < set(get_params(folded))
    np.testing.assert_array_equal(get_params(folded)["conv1.weight"], get_params(qdq)["conv1.weight"])


def test_integer_modules_are_refused(residual):
    with pytest.raises(ModelError, match="FoldBatchNorm takes"):
        FoldBatchNorm()(with_stage(residual.module, "integer"))
