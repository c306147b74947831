import numpy as np
import pytest
import tvm
from tvm import relax

from tvm_compress.errors import ModelError, PolicyError
from tvm_compress.passes.canonicalize import Canonicalize
from tvm_compress.passes.params import (
    bind_params,
    get_params,
    get_stage,
    require_stage,
    set_params,
    with_main,
    with_stage,
)
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.prune_channels import PruneChannels


def test_set_and_get(sequential):
    before = get_params(sequential.module)
    changed = set_params(sequential.module, {"features.0.bias": np.arange(8, dtype="float32")})
    after = get_params(changed)
    assert list(after) == list(before)
    np.testing.assert_array_equal(after["features.0.bias"], np.arange(8))
    np.testing.assert_array_equal(get_params(sequential.module)["features.0.bias"], before["features.0.bias"])
    np.testing.assert_array_equal(after["features.0.weight"], before["features.0.weight"])


def test_values_are_copies(sequential):
    get_params(sequential.module)["features.0.bias"][:] = 7
    assert not (get_params(sequential.module)["features.0.bias"] == 7).any()


def test_new_shapes_retype_what_follows(sequential):
    weight, bias = (get_params(sequential.module)[f"classifier.3.{name}"] for name in ("weight", "bias"))
    module = set_params(sequential.module, {"classifier.3.weight": weight[:4], "classifier.3.bias": bias[:4]})
    assert [int(extent) for extent in module["main"].ret_ty.shape] == [1, 4]


def test_unknown_name_and_dtype_are_refused(sequential):
    with pytest.raises(ModelError, match="no parameter 'nothing'"):
        set_params(sequential.module, {"nothing": np.zeros(1, "float32")})
    with pytest.raises(ModelError, match=r"'features.0.bias' is float32, not float64"):
        set_params(sequential.module, {"features.0.bias": np.zeros(8)})


def test_missing_values_are_refused(sequential):
    module = with_main(sequential.module, sequential.module["main"].without_attr("params"))
    with pytest.raises(ModelError, match="12 parameters, but values for 0"):
        get_params(module)


def test_bound_module_takes_the_inputs_only(residual):
    bound = bind_params(residual.module)
    assert [var.name for var in bound["main"].params] == ["x"]
    assert "params" not in bound["main"].attrs
    assert get_stage(bound) == "float"
    assert get_params(bound) == {}
    tvm.ir.assert_structural_equal(bind_params(bound), bound)


def test_stage(residual):
    assert get_stage(residual.imported) == ""
    assert get_stage(with_stage(residual.module, "qdq")) == "qdq"
    assert get_stage(residual.module) == "float"
    with pytest.raises(ValueError, match="nonsense"):
        with_stage(residual.module, "nonsense")
    with pytest.raises(ModelError, match="Nothing takes a module of stage 'qdq' or 'integer', not 'float'"):
        require_stage(residual.module, "qdq", "integer", what="Nothing")
    with pytest.raises(ModelError, match="Apply Canonicalize"):
        require_stage(residual.imported, "float", what="Nothing")


def test_names_survive_json(residual):
    again = tvm.ir.load_json(tvm.ir.save_json(residual.module))
    assert [var.name for var in again["main"].params] == [var.name for var in residual.module["main"].params]
    tvm.ir.assert_structural_equal(Canonicalize()(again), residual.module)


def test_our_errors_leave_a_sequence_of_passes_as_themselves(residual):
    policy = CompressionPolicy(sites={"nowhere": SitePolicy()})
    with pytest.raises(PolicyError, match="names site 'nowhere'"):
        tvm.ir.transform.Sequential([relax.transform.DeadCodeElimination(), PruneChannels(policy)])(
            residual.module
        )
