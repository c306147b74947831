"""Dense layers with weights that are zero by whole vectors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from tests.schedules.test_fp32 import assert_close, dense_module, run
from tvm_compress.schedules import apply, sparse
from tvm_compress.schedules.target_rules import parse_target, rules_for

HOST = parse_target("host")
RULES = rules_for(HOST)
A72 = parse_target("raspberry-pi/4b-aarch64")


def pruned(out: int, inputs: int, lanes: int, kept: float, seed: int = 0) -> np.ndarray:
    """Weights of which a share of the vectors of `lanes` output features is left."""
    rng = np.random.default_rng(seed)
    rows = -(-out // lanes)
    mask = np.repeat(rng.uniform(size=(rows, inputs)) < kept, lanes, axis=0)[:out]
    return np.where(mask, rng.normal(size=(out, inputs)), 0).astype(np.float32)


@settings(max_examples=12, deadline=None)
@given(
    out=st.integers(1, 70),
    inputs=st.integers(1, 90),
    kept=st.sampled_from([0.0, 0.1, 0.4]),
    seed=st.integers(0, 99),
)
def test_lists_hold_the_weights(out, inputs, kept, seed):
    weight = pruned(out, inputs, RULES.fp32_lanes, kept, seed)
    rows = sparse.find_rows(weight, RULES)
    if rows is None:
        used = pruned(out, inputs, RULES.fp32_lanes, kept, seed) != 0
        assert used.any(axis=0).sum() > 0
        return
    again = np.zeros((rows.values.shape[0] * rows.block, inputs), np.float32)
    lanes = rows.block // rows.side_by_side
    for tile, k, vector in np.ndindex(rows.inputs.shape):
        first = tile * rows.block + vector * lanes
        values = rows.values[tile, k, vector * lanes : (vector + 1) * lanes]
        again[first : first + lanes, rows.inputs[tile, k, vector]] += values
    np.testing.assert_array_equal(again[:out], weight)
    assert not again[out:].any()


@pytest.mark.parametrize(("out", "inputs"), [(10, 64), (37, 50), (256, 300), (8, 7)])
@pytest.mark.parametrize("kept", [0.0, 0.3])
def test_a_pruned_layer_computes_what_numpy_computes(out, inputs, kept):
    weight = pruned(out, inputs, RULES.fp32_lanes, kept)
    rng = np.random.default_rng(1)
    bias, x = (rng.normal(size=size).astype(np.float32) for size in (out, (1, inputs)))
    module = dense_module(1, weight, bias, transposed=True)
    names = [info.name for info in apply.kernel_infos(apply.lower_to_kernels(module, HOST), HOST)]
    expected = sparse.find_rows(weight, RULES) is not None
    assert any("sparse" in name for name in names) == expected
    assert_close(run(module, x), x @ weight.T + bias)


def test_a_dense_weight_and_many_rows_take_the_dense_kernel():
    weight = pruned(64, 64, RULES.fp32_lanes, 0.95)
    assert sparse.find_rows(weight, RULES) is None
    few = pruned(64, 64, RULES.fp32_lanes, 0.2)
    assert sparse.find_rows(few, RULES) is not None
    module = dense_module(4, few, np.zeros(64, np.float32), transposed=True)
    infos = apply.kernel_infos(apply.lower_to_kernels(module, HOST), HOST)
    assert not any("sparse" in info.name for info in infos)


def test_only_the_vectors_that_are_left_are_stored():
    weight = pruned(512, 512, RULES.fp32_lanes, 0.1)
    module = dense_module(1, weight, np.zeros(512, np.float32), transposed=True)
    (info,) = (
        i for i in apply.kernel_infos(apply.lower_to_kernels(module, HOST), HOST) if "sparse" in i.name
    )
    rows = sparse.find_rows(weight, RULES)
    assert rows is not None
    assert info.features["weight_bytes"] >= rows.values.nbytes + rows.inputs.nbytes
    assert info.features["weight_bytes"] < 0.25 * weight.nbytes
    assert info.features["macs"] == 512 * rows.values.shape[1]


def test_the_a72_reads_vectors_of_four():
    weight = pruned(64, 64, 4, 0.2)
    module = dense_module(1, weight, np.zeros(64, np.float32), transposed=True)
    lowered = apply.lower_to_kernels(module, A72)
    assert any("sparse" in info.name for info in apply.kernel_infos(lowered, A72))
    assembly = relax.build(lowered, target=A72).mod.imports[0].inspect_source("asm")
    assert assembly.count("fmla\tv") >= 4
    assert "fmadd\ts" not in assembly
