# ruff: noqa: N805 - functions in TVMScript's classes are not methods
# mypy: disable-error-code="valid-type, misc"
import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from tests.passes.torch_networks import example, run
from tvm_compress.errors import PolicyError
from tvm_compress.passes.factorize import Factorize, as_matrix, factors, from_matrix, singular, truncate
from tvm_compress.passes.params import get_params, set_params, with_stage, with_values
from tvm_compress.passes.pipeline import build, compress
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.sites import find_sites
from tvm_compress.twin import Twin


def policy(**sites):
    return CompressionPolicy({name.replace("__", "."): SitePolicy(**how) for name, how in sites.items()})


@I.ir_module(s_tir=True)
class Before:
    @R.function
    def main(
        x: R.Tensor((1, 8, 9, 2), "float32"),
        c: R.Tensor((3, 2, 3, 5), "float32"),
        f: R.Tensor((4, 3), "float32"),
        b: R.Tensor((4,), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y = R.nn.conv2d(
                x, c, strides=[2, 1], padding=[1, 2, 0, 3], dilation=[2, 1],
                data_layout="NHWC", kernel_layout="OIHW",
            )  # fmt: skip
            m = R.mean(y, axis=[1, 2])
            t = R.permute_dims(f)
            q = R.matmul(m, t)
            r = R.add(q, b)
            R.output(r)
        return r


@I.ir_module(s_tir=True)
class Channel:
    @R.function
    def main(
        x: R.Tensor((1, 8, 9, 2), "float32"),
        c1: R.Tensor((2, 2, 3, 5), "float32"),
        c2: R.Tensor((3, 2, 1, 1), "float32"),
        f1: R.Tensor((1, 3), "float32"),
        f2: R.Tensor((4, 1), "float32"),
        b: R.Tensor((4,), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y1 = R.nn.conv2d(
                x, c1, strides=[2, 1], padding=[1, 2, 0, 3], dilation=[2, 1],
                data_layout="NHWC", kernel_layout="OIHW",
            )  # fmt: skip
            y = R.nn.conv2d(y1, c2, data_layout="NHWC", kernel_layout="OIHW")
            m = R.mean(y, axis=[1, 2])
            t1 = R.permute_dims(f1)
            q1 = R.matmul(m, t1)
            t2 = R.permute_dims(f2)
            q = R.matmul(q1, t2)
            r = R.add(q, b)
            R.output(r)
        return r


@I.ir_module(s_tir=True)
class Spatial:
    @R.function
    def main(
        x: R.Tensor((1, 8, 9, 2), "float32"),
        c1: R.Tensor((2, 2, 3, 1), "float32"),
        c2: R.Tensor((3, 2, 1, 5), "float32"),
        f: R.Tensor((4, 3), "float32"),
        b: R.Tensor((4,), "float32"),
    ):
        R.func_attr({"num_input": 1})
        with R.dataflow():
            y1 = R.nn.conv2d(
                x, c1, strides=[2, 1], padding=[1, 0, 0, 0], dilation=[2, 1],
                data_layout="NHWC", kernel_layout="OIHW",
            )  # fmt: skip
            y = R.nn.conv2d(y1, c2, padding=[0, 2, 0, 3], data_layout="NHWC", kernel_layout="OIHW")
            m = R.mean(y, axis=[1, 2])
            t = R.permute_dims(f)
            q = R.matmul(m, t)
            r = R.add(q, b)
            R.output(r)
        return r


def before() -> tvm.IRModule:
    rng = np.random.default_rng(0)
    shapes = [(3, 2, 3, 5), (4, 3), (4,)]
    main = with_values(Before["main"], [rng.normal(size=s).astype("float32") for s in shapes])
    return with_stage(tvm.IRModule({"main": main}), "float")


@pytest.mark.parametrize(
    ("wanted", "expected", "names"),
    [
        (
            policy(c={"rank": 2}, f={"rank": 1}),
            Channel,
            ["c.first.weight", "c.second.weight", "f.first.weight", "f.second.weight", "b"],
        ),
        (
            policy(c={"rank": 2, "factorization": "spatial"}),
            Spatial,
            ["c.first.weight", "c.second.weight", "f", "b"],
        ),
    ],
)
def test_code(wanted, expected, names):
    module = Factorize(wanted)(before())
    main = module["main"].without_attr("params").without_attr("tvm_compress.stage")
    tvm.ir.assert_structural_equal(main, expected["main"], map_free_vars=True)
    assert list(get_params(module)) == names


def test_nothing_to_do_is_nothing_done():
    module = before()
    assert Factorize(policy(f={}))(module).same_as(module)


@pytest.mark.parametrize("factorization", ["channel", "spatial"])
def test_full_rank_computes_the_same(factorization):
    module = before()
    wanted = policy(
        c={"rank": 3 if factorization == "channel" else 6, "factorization": factorization}, f={"rank": 3}
    )
    x = np.random.default_rng(1).normal(size=(1, 8, 9, 2)).astype("float32")
    np.testing.assert_allclose(run(Factorize(wanted)(module), x), run(module, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("factorization", ["channel", "spatial"])
def test_low_rank_weights_run_as_two_convolutions(factorization, residual):
    """Weights that have a low rank are computed exactly, by smaller kernels of the built library."""
    site = "layer2.conv2"
    weight = get_params(residual.module)[f"{site}.weight"]
    low = from_matrix(truncate(as_matrix(weight, factorization), 4), weight.shape, factorization)
    module = set_params(residual.module, {f"{site}.weight": low.astype("float32")})
    wanted = CompressionPolicy({site: SitePolicy(rank=4, factorization=factorization)})
    split = compress(module, wanted)
    by_name = {s.name: s for s in find_sites(split)}
    kernels = {"channel": ((3, 3), (1, 1)), "spatial": ((3, 1), (1, 3))}[factorization]
    assert (by_name[f"{site}.first"].kernel, by_name[f"{site}.second"].kernel) == kernels
    assert sum(s.macs for s in by_name.values()) < sum(s.macs for s in find_sites(module))
    expected = Twin(module).predict(residual.x)
    np.testing.assert_allclose(Twin(split).predict(residual.x), expected, rtol=1e-4, atol=1e-4)
    compiled = build(split, "host")
    machine = relax.VirtualMachine(compiled.executable, tvm.cpu())
    found = machine["main"](tvm.runtime.tensor(residual.x)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    convolutions = sum(k.count for k in compiled.kernels if k.kind == "conv2d_fp32")
    assert convolutions == sum(s.kind == "conv2d" for s in by_name.values())


def test_refused():
    module = before()
    with pytest.raises(PolicyError, match="rank 3 at most"):
        Factorize(policy(c={"rank": 4}))(module)
    with pytest.raises(PolicyError, match="codebook"):
        Factorize(policy(c={"rank": 2, "codebook_bits": 4}))(module)
    grouped = example(nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.Linear(216, 2))).module
    with pytest.raises(PolicyError, match="3 groups"):
        Factorize(CompressionPolicy({"0": SitePolicy(rank=1)}))(grouped)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_truncation_is_that_of_the_svd(rows, columns, seed):
    matrix = np.random.default_rng(seed).normal(size=(rows, columns))
    u, s, v = singular(matrix)
    np.testing.assert_allclose((u * s) @ v, matrix, atol=1e-7)
    np.testing.assert_allclose(s, np.linalg.svd(matrix, compute_uv=False), atol=1e-7)
    rank = 1 + seed % min(rows, columns)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    best = (left[:, :rank] * values[:rank]) @ right[:rank]
    np.testing.assert_allclose(truncate(matrix, rank), best, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "factorization"), [((4, 3), "channel"), ((4, 3, 3, 2), "channel"), ((4, 3, 3, 2), "spatial")]
)
def test_factors_multiply_to_the_weight(shape, factorization):
    weight = np.random.default_rng(0).normal(size=shape)
    np.testing.assert_array_equal(from_matrix(as_matrix(weight, factorization), shape, factorization), weight)
    rank = min(as_matrix(weight, factorization).shape)
    first, second = factors(weight, rank, factorization)
    if len(shape) == 2:
        product = second @ first
    elif factorization == "channel":
        product = np.einsum("or,rihw->oihw", second[:, :, 0, 0], first)
    else:
        product = np.einsum("orw,rih->oihw", second[:, :, 0], first[:, :, :, 0])
    np.testing.assert_allclose(product, weight, atol=1e-5)
