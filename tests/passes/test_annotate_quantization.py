"""AnnotateQuantization: who quantizes a tensor, and with how many bits."""

import json

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.passes.numpy_interpreter import operators
from tests.passes.quantized_networks import INT8, Net, Ranges, bits, policy, residual, sequential
from tvm_compress.errors import DataError, ModelError, PolicyError
from tvm_compress.passes.annotate_quantization import (
    QUANTIZATION,
    AnnotateQuantization,
    count_uses,
    quantization_of,
    site_calls,
)
from tvm_compress.passes.params import get_stage
from tvm_compress.passes.policy import SitePolicy


def annotate(module, sites, ranges=None):
    return AnnotateQuantization(sites, ranges or Ranges())(module)


def siblings(also_added: bool = False):
    """Two convolutions that read one tensor, which an addition may read as well."""

    def build(net: Net, x):
        x = net.emit(relax.op.nn.relu(net.conv(x, "stem", 4)))
        y = net.emit(relax.op.add(net.conv(x, "left", 4), net.conv(x, "right", 4)))
        return net.emit(relax.op.add(y, x)) if also_added else y

    return Net((1, 3, 6, 6)).module(build)


def held(module) -> dict[str, tuple[str | None, str | None]]:
    """Site -> (dtype of what it stores, dtype and bits of what it quantizes for itself)."""

    def describe(parameters):
        return None if parameters is None else f"{parameters.dtype}:{parameters.qmax - parameters.qmin}"

    return {name: (describe(s.stored), describe(s.input)) for name, s in quantization_of(module).items()}


def test_only_the_attribute_and_the_stage_change():
    module = sequential()
    annotated = annotate(module, policy(conv1=INT8, fc2=bits(2, 3)))
    assert get_stage(module) == "float"
    assert get_stage(annotated) == "annotated"
    bare = [
        m["main"].without_attr(QUANTIZATION).without_attr("tvm_compress.stage") for m in (module, annotated)
    ]
    tvm.ir.assert_structural_equal(*bare)


def test_a_single_reader_quantizes_its_input_itself():
    annotated = annotate(sequential(), policy(conv1=INT8, conv2=bits(2, 3), fc2=bits(1, 6)))
    assert held(annotated) == {
        "conv1": (None, "int8:255"),
        "conv2": (None, "uint8:7"),
        "fc2": (None, "uint8:63"),
    }


def test_the_attribute_is_deterministic_json():
    sites = policy(conv1=INT8, conv2=bits(2, 3))
    texts = [str(annotate(sequential(), sites)["main"].attrs[QUANTIZATION]) for _ in range(2)]
    assert texts[0] == texts[1]
    values = json.loads(texts[0])
    assert values["version"] == 2
    assert json.dumps(values, sort_keys=True) == texts[0]
    assert values["sites"]["conv2"]["weight_bits"] == 2
    assert values["sites"]["conv2"]["input"]["zero_point"] == 0


def test_several_int8_readers_share_one_stored_tensor():
    annotated = annotate(siblings(), policy(left=INT8, right=INT8))
    assert held(annotated) == {"left": ("int8:255", None), "right": (None, None)}


def test_readers_of_different_bits_quantize_the_stored_value_again():
    annotated = annotate(siblings(), policy(left=bits(2, 2), right=bits(3, 4)))
    assert held(annotated) == {"left": ("int8:255", "uint8:3"), "right": (None, "uint8:15")}
    annotated = annotate(siblings(), policy(left=bits(2, 2), right=INT8))
    assert held(annotated) == {"left": ("int8:255", "uint8:3"), "right": (None, None)}


def test_bitserial_readers_of_the_same_bits_share_those_bits():
    annotated = annotate(siblings(), policy(left=bits(1, 2), right=bits(4, 2)))
    assert held(annotated) == {"left": (None, "uint8:3"), "right": (None, None)}


@pytest.mark.parametrize("other", [SitePolicy(), bits(4, 2)])
def test_any_other_reader_asks_for_eight_bits(other):
    added = annotate(siblings(also_added=True), policy(left=bits(1, 2), right=other))
    assert held(added)["left"] == ("int8:255", "uint8:3")
    beside_fp32 = annotate(siblings(), policy(left=bits(1, 2)))
    assert held(beside_fp32) == {"left": ("int8:255", "uint8:3")}


def test_the_first_quantized_reader_names_the_stored_tensor():
    assert held(annotate(siblings(), policy(right=INT8))) == {"right": ("int8:255", None)}


def test_residual_blocks_store_their_outputs():
    names = ("stem", "a.conv1", "a.conv2", "b.conv1", "b.conv2", "b.down", "fc")
    annotated = annotate(residual(), policy(**{name.replace(".", "__"): bits(4, 4) for name in names}))
    assert held(annotated) == {
        "stem": (None, "uint8:15"),
        "a.conv1": ("int8:255", "uint8:15"),  # an addition reads it as well
        "a.conv2": (None, "uint8:15"),
        "b.conv1": (None, "uint8:15"),  # shared by the shortcut, with the same bits
        "b.down": (None, None),
        "b.conv2": (None, "uint8:15"),
        "fc": (None, "uint8:15"),
    }


def test_ranges_are_asked_per_site_and_bits():
    ranges = Ranges({"left": (0.0, 2.55)})
    annotated = annotate(siblings(), policy(left=INT8, right=bits(3, 4)), ranges)
    assert ranges.asked == [("left", 8), ("right", 4)]
    stored = quantization_of(annotated)["left"].stored
    assert stored is not None
    assert stored.zero_point == -128
    np.testing.assert_allclose(stored.scale, 0.01, rtol=1e-6)


def test_a_range_below_zero_gives_low_bits_a_zero_point():
    annotated = annotate(sequential(), policy(conv1=bits(2, 4)), Ranges(default=(-1.0, 2.0)))
    held_input = quantization_of(annotated)["conv1"].input
    assert held_input is not None
    assert (held_input.zero_point, held_input.qmax) == (5, 15)


@pytest.mark.parametrize("bad", [(1.0, 1.0), (np.nan, 1.0), (0.0, np.inf)])
def test_impossible_ranges_name_the_site(bad):
    with pytest.raises(DataError, match="'conv2'"):
        annotate(sequential(), policy(conv1=INT8, conv2=INT8), Ranges({"conv2": bad}))


def test_unknown_sites_and_wrong_stages_are_refused():
    with pytest.raises(PolicyError, match="'conv9'"):
        annotate(sequential(), policy(conv9=INT8))
    with pytest.raises(ModelError, match="AnnotateQuantization"):
        annotate(annotate(sequential(), policy(conv1=INT8)), policy(conv1=INT8))
    with pytest.raises(ModelError, match="AnnotateQuantization first"):
        quantization_of(sequential())


def test_it_runs_in_a_sequential():
    pipeline = tvm.transform.Sequential([AnnotateQuantization(policy(conv1=INT8), Ranges())])
    assert "nn.conv2d" in operators(pipeline(sequential()))
    assert held(pipeline(sequential())) == {"conv1": (None, "int8:255")}


def test_sites_and_uses_of_a_function():
    function = siblings(also_added=True)["main"]
    calls = site_calls(function)
    assert [call.name for call in calls] == ["stem", "left", "right"]
    assert [call.weight.name for call in calls] == ["stem.weight", "left.weight", "right.weight"]
    assert calls[1].tensor.same_as(calls[2].tensor)
    assert count_uses(function)[calls[1].tensor] == 3
    assert [call.name for call in site_calls(sequential()["main"])] == ["conv1", "conv2", "fc1", "fc2"]
