import numpy as np
import pytest

from tests.tvm_compress.twin_networks import random_resnet8, resnet8_module
from tvm_compress.calibration import calibrate
from tvm_compress.passes.annotate_quantization import AnnotateQuantization
from tvm_compress.passes.insert_qdq import InsertQDQ
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.realize_integer import RealizeInteger
from tvm_compress.passes.sites import find_sites
from tvm_compress.twin import Twin


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (6, 6)])
def test_the_stages_that_the_passes_make_compute_the_same(weight_bits, activation_bits):
    """One network and one policy through every stage: integers are nearer to QDQ than QDQ is to floats."""
    module = resnet8_module(random_resnet8())
    x = np.random.default_rng(0).normal(size=(40, 1, 28, 28)).astype(np.float32)
    scheme = "int8" if weight_bits == 8 else "bitserial"
    site_policy = SitePolicy(scheme=scheme, weight_bits=weight_bits, activation_bits=activation_bits)
    policy = CompressionPolicy({site.name: site_policy for site in find_sites(module)})
    annotated = AnnotateQuantization(policy, calibrate(module, x))(module)
    qdq = InsertQDQ()(annotated)
    twins = {t.stage: t for t in map(Twin, (module, annotated, qdq, RealizeInteger()(qdq)))}
    assert list(twins) == ["float", "annotated", "qdq", "integer"]
    logits = {stage: twin.predict(x) for stage, twin in twins.items()}
    np.testing.assert_array_equal(logits["annotated"], logits["float"])
    rounding = np.abs(logits["qdq"] - logits["float"]).mean()
    assert 0 < np.abs(logits["integer"] - logits["qdq"]).mean() < rounding
    assert np.mean(logits["integer"].argmax(1) == logits["qdq"].argmax(1)) >= 0.9
    traced = twins["integer"].trace(x[:2])
    assert list(traced) == list(twins["qdq"].sites)
    assert {str(value.dtype) for value in traced.values()} == {"int32"}
