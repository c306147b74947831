"""Whole modules to kernels: fusion, refusals, descriptions, building."""

from unittest.mock import patch

import numpy as np
import pytest
import tvm
from tvm import relax, te, tirx

from tvm_compress.errors import KernelError
from tvm_compress.schedules import apply, kernel, ops, reference, winograd
from tvm_compress.schedules.target_rules import parse_target, rules_for

CONV = {"data_layout": "NHWC", "kernel_layout": "OIHW", "padding": 1}


def residual_network(seed=0, channels=16):
    """Make two 3x3 convolutions with a shortcut, a mean and a classifier; return it with its weights."""
    rng = np.random.default_rng(seed)
    w = [rng.standard_normal((channels, channels, 3, 3)).astype(np.float32) / 12 for _ in range(2)]
    fc = rng.standard_normal((10, channels)).astype(np.float32)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 8, 8, channels), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.nn.conv2d(x, relax.const(w[0]), **CONV))
            y = builder.emit(relax.op.nn.relu(y))
            y = builder.emit(relax.op.nn.conv2d(y, relax.const(w[1]), **CONV))
            y = builder.emit(relax.op.nn.relu(builder.emit(relax.op.add(y, x))))
            y = builder.emit(relax.op.mean(y, [1, 2]))
            weight = builder.emit(relax.op.permute_dims(relax.const(fc)))
            out = builder.emit_output(relax.op.matmul(y, weight))
        builder.emit_func_output(out)
    return builder.get(), w, fc


def expected_output(x, w, fc):
    y = np.maximum(reference.convolution(x, w[0], padding=(1, 1, 1, 1)), 0)
    y = np.maximum(reference.convolution(y, w[1], padding=(1, 1, 1, 1)) + x, 0)
    return y.mean((1, 2)) @ fc.T


def test_a_network_runs_as_a_few_fused_kernels():
    module, w, fc = residual_network()
    target = parse_target("host")
    lowered = apply.lower_to_kernels(module, target)
    infos = apply.kernel_infos(lowered, target)
    assert [info.kind for info in infos] == ["conv2d_fp32", "conv2d_fp32", "elementwise", "dense_fp32"]
    assert [info.features["epilogue_ops"] for info in infos] == [1, 2, 0, 1]
    executable = relax.build(lowered, target=target)
    x = np.random.default_rng(1).standard_normal((1, 8, 8, 16)).astype(np.float32)
    actual = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()
    np.testing.assert_allclose(actual, expected_output(x, w, fc), rtol=1e-4, atol=1e-4)


def test_no_prim_func_is_left_unscheduled():
    target = parse_target("host")
    lowered = apply.lower_to_kernels(residual_network()[0], target)
    functions = [func for func in lowered.functions.values() if isinstance(func, tirx.PrimFunc)]
    assert len(functions) == 4
    assert all(func.attrs["tirx.is_scheduled"] for func in functions)


def test_features_state_the_work():
    target = parse_target("llvm -mcpu=haswell -mtriple=x86_64-linux-gnu -num-cores=4")
    with patch.object(winograd, "choose_algorithm", lambda *arguments: None):
        conv = apply.kernel_infos(apply.lower_to_kernels(residual_network()[0], target), target)[0]
    macs = 8 * 8 * 16 * 16 * 9
    expected = {
        "macs": macs, "bops": macs * 1024, "is_conv2d": 1, "is_dense": 0, "is_fp32": 1, "is_int8": 0,
        "backend_dot": 0, "backend_popcount": 0, "backend_narrow": 0, "backend_winograd": 0,
        "IC": 16, "OC": 16, "KH": 3, "OH": 8, "stride": 1, "groups": 1, "threads": 4,
        "input_bytes": 4096, "output_bytes": 4096, "weight_bytes": 9216, "intensity": macs / (9216 + 8192),
    }  # fmt: skip
    assert {name: conv.features[name] for name in expected} == expected
    assert all(isinstance(value, float) for value in conv.features.values())
    # Products and sums in vectors of 8.
    assert macs / 8 <= conv.features["sum_ops"] <= 3 * macs / 8
    assert conv.features["workspace_bytes"] > 4096


def test_keys_name_the_kernel_and_not_the_model():
    target = parse_target("host")

    def keys(seed, where=target, channels=16):
        lowered = apply.lower_to_kernels(residual_network(seed, channels)[0], where)
        return [info.key for info in apply.kernel_infos(lowered, where)]

    assert keys(0) == keys(1)
    assert len(set(keys(0))) == 4
    assert not set(keys(0)) & set(keys(0, channels=24))
    assert not set(keys(0)) & set(keys(0, parse_target("raspberry-pi/4b-aarch64")))


def test_equal_layers_share_a_kernel():
    rng = np.random.default_rng(0)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, 8, 8, 8), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = x
            for _ in range(3):
                w = relax.const(rng.standard_normal((8, 8, 3, 3)).astype(np.float32))
                y = builder.emit(relax.op.nn.relu(builder.emit(relax.op.nn.conv2d(y, w, **CONV))))
            out = builder.emit_output(relax.op.negative(y))
        builder.emit_func_output(out)
    target = parse_target("host")
    infos = apply.kernel_infos(apply.lower_to_kernels(builder.get(), target), target)
    assert max(info.count for info in infos) == 2


def unary(operation, shape=(1, 8, 8, 4), dtype="float32"):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, dtype))
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(operation(x))
        builder.emit_func_output(out)
    return builder.get()


def transposed(x):
    return relax.op.nn.conv2d_transpose(x, relax.const(np.ones((8, 4, 3, 3), np.float32)))


def of_unknown_scheme(x):
    constants = [relax.const(np.ones((4, 4, 1, 1), np.int8)), relax.const(np.ones(4, np.int32))]
    geometry = {"strides": [1, 1], "padding": [0, 0, 0, 0], "dilation": [1, 1], "groups": 1}
    bits = {"zero_point": 0, "scheme": "nosuch", "activation_bits": 8, "weight_bits": 8}
    return ops.call("conv2d", [x, *constants], **geometry, **bits)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (transposed, "transpose"),
        (lambda x: relax.op.matmul(x, x), "constant"),
        (lambda x: ops.call("binarize", [x]), "binarize"),
        (of_unknown_scheme, "nosuch"),
    ],
)
def test_a_site_without_a_kernel_is_refused(operation, message):
    with pytest.raises(KernelError, match=message):
        apply.lower_to_kernels(unary(operation, (1, 8, 8, 8)), parse_target("host"))


def test_constants_are_transposed_once():
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    module = unary(lambda x: relax.op.add(x, relax.op.permute_dims(relax.const(weight))), (3, 2))
    folded = apply.fold_transposed_weights(module)
    expected = unary(lambda x: relax.op.add(x, relax.const(np.ascontiguousarray(weight.T))), (3, 2))
    tvm.ir.assert_structural_equal(folded, expected)
    other = unary(lambda x: relax.op.permute_dims(x), (3, 2))
    tvm.ir.assert_structural_equal(apply.fold_transposed_weights(other), other)


def test_views_are_left_to_the_memory_planner():
    module = unary(lambda x: relax.op.reshape(x, (1, 256)))
    lowered = apply.lower_to_kernels(module, parse_target("host"))
    func = next(func for func in lowered.functions.values() if isinstance(func, tirx.PrimFunc))
    assert relax.analysis.has_reshape_pattern(func)


def test_a_schedule_that_does_not_apply_says_so():
    info = {"operator": "dense", "block": 8, "tile": [1], "OC": 8, "N": 1, "OH": 1, "OW": 1}
    x, w = te.placeholder((1, 4), "float32"), te.placeholder((1, 4, 8), "float32")
    k, c = te.reduce_axis((0, 4), "k"), te.reduce_axis((0, 8), "c")
    attrs = kernel.kernel_attrs("fp32", info)
    main = te.compute(
        (1, 8), lambda i, j: te.sum(x[i, k] * w[j // 8, k, j % 8], axis=[k]), "dense", attrs=attrs
    )
    total = te.compute((1,), lambda i: te.sum(main[i, c], axis=[c]), "total")
    twice = te.compute((1,), lambda i: total[i] * 2.0, "twice")
    func = te.create_prim_func([x, w, twice])
    with pytest.raises(KernelError, match=r"fused_dense.*total"):
        apply.schedule_function(func, rules_for(parse_target("host")), "fused_dense")
