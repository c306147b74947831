"""PrimFuncs are reused only where a te function cannot have made another one."""

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, te

from tvm_compress.schedules import apply, ops, te_cache
from tvm_compress.schedules.target_rules import parse_target
from tvm_compress.schedules.te_cache import ReusingBuilder, frozen

TARGETS = ("host", "raspberry-pi/4b-aarch64")


@dataclasses.dataclass
class Pair:
    first: Any
    second: Any = 0


def adder(value: Any) -> Any:
    return lambda x: x + value


@pytest.mark.parametrize(
    "values",
    [
        (1, 1.0, True, "1", None),
        (0.0, -0.0, np.float32(0), np.float64(0)),
        ((1, 2), [1, 2], (2, 1), (1, (2,))),
        ({"a": 1}, {"a": 2}, {"b": 1}),
        (np.arange(3), np.arange(3.0), np.arange(3)[::-1], np.arange(3)[:, None]),
        (Pair(1), Pair(2), Pair(1, 1), (1, 0)),
        (adder(1), adder(2), adder(1.0), lambda x: x - 1),
        (partial(adder, 1), partial(adder, 2), partial(adder, value=1), adder),
    ],
)
def test_what_differs_is_told_apart(values):
    assert len({frozen(value) for value in values}) == len(values)


def test_what_is_equal_is_equal():
    for make in (
        lambda: adder(np.arange(4)),
        lambda: Pair([1, {"a": 2.5}]),
        lambda: partial(adder, (1, "b")),
    ):
        assert frozen(make()) == frozen(make())


def test_nothing_is_claimed_of_unknown_types():
    for value in (object(), {1, 2}, adder(iter([]))):
        with pytest.raises(TypeError, match="is not known"):
            frozen(value)


def called(compute: Any, shape: tuple[int, ...] = (4,)) -> tuple[tvm.IRModule, Any]:
    """A module that calls a te function by a ReusingBuilder, and the call's PrimFunc."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(ReusingBuilder(builder).call_te(compute, x, primfunc_name_hint="f"))
        builder.emit_func_output(out)
    module = builder.get()
    return module, module["f"]


def scale(factor: Any) -> Any:
    def compute(x: te.Tensor) -> te.Tensor:
        return te.compute(x.shape, lambda *i: x(*i) * factor, name="scaled")

    return compute


def test_only_an_equal_call_gives_the_same_function():
    first = called(scale(2.0))[1]
    assert called(scale(2.0))[1].same_as(first)
    for compute, shape in ((scale(3.0), (4,)), (scale(2.0), (5,))):
        module, other = called(compute, shape)
        assert not other.same_as(first)
        relax.analysis.well_formed(module)


def test_what_cannot_be_compared_is_made_anew():
    # A te expression as the factor: its type says nothing of its value.
    factors = [te.const(2.0, "float32"), te.const(3.0, "float32")]
    texts = [called(scale(factor))[1].script() for factor in factors]
    assert texts[0] != texts[1]


@st.composite
def sites(draw: st.DrawFn) -> dict[str, Any]:
    channels = draw(st.sampled_from([3, 8, 32]))
    depthwise = draw(st.booleans())
    scheme = draw(st.sampled_from(["int8", "bitserial"])) if channels == 32 and not depthwise else "int8"
    return {
        "channels": channels,
        "out": channels if depthwise else draw(st.sampled_from([16, 32])),
        "groups": channels if depthwise else 1,
        "scheme": scheme,
        "bits": 8 if scheme == "int8" else draw(st.integers(1, 3)),
        "zero_point": draw(st.sampled_from([0, 3])) if scheme == "int8" else 0,
        "shift": draw(st.sampled_from([9, 31])),
        "padding": draw(st.integers(0, 1)),
    }


def network(site: dict[str, Any], seed: int) -> tvm.IRModule:
    """A convolution and its requantization, with weights and multipliers of a seed."""
    rng = np.random.default_rng(seed)
    bits = site["bits"]
    dtype = "int8" if site["scheme"] == "int8" else "uint8"
    limit = 2 ** (bits - 1) - 1
    shape = (site["out"], site["channels"] // site["groups"], 3, 3)
    w = rng.choice([-1, 1], shape) if bits == 1 else rng.integers(-limit, limit + 1, shape)
    b = rng.integers(-5000, 5000, site["out"]).astype(np.int32)
    # Odd, as twos in a multiplier may decide how it is multiplied.
    factors = rng.integers(2**29, 2**30, site["out"]).astype(np.int32) | 1
    x = relax.Var("x", relax.TensorType((1, 6, 6, site["channels"]), dtype))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            sums = ops.call(
                "conv2d", [x, relax.const(w.astype(np.int8)), relax.const(b)],
                zero_point=site["zero_point"], scheme=site["scheme"], activation_bits=bits, weight_bits=bits,
                strides=[1, 1], padding=[site["padding"]] * 4, dilation=[1, 1], groups=site["groups"],
            )  # fmt: skip
            rounded = ops.call(
                "requantize", [builder.emit(sums), relax.const(factors)],
                shift=site["shift"], zero_point=1, qmin=-128, qmax=127, dtype="int8",
            )  # fmt: skip
            out = builder.emit_output(rounded)
        builder.emit_func_output(out)
    return builder.get()


@settings(max_examples=12, deadline=None)
@given(site=sites(), other=sites(), target=st.sampled_from(TARGETS))
def test_reused_functions_are_those_that_would_have_been_made(site, other, target):
    parsed = parse_target(target)
    te_cache._MADE.clear()
    fresh = apply.lower_to_kernels(network(site, 0), parsed)
    te_cache._MADE.clear()
    # Other weights, biases and multipliers in the same site, and another site with the same ones.
    apply.lower_to_kernels(network(site, 1), parsed)
    apply.lower_to_kernels(network(other, 0), parsed)
    made = len(te_cache._MADE)
    reused = apply.lower_to_kernels(network(site, 0), parsed)
    tvm.ir.assert_structural_equal(reused, fresh)
    # Weights of few bits decide how far sums may be narrow.
    assert len(te_cache._MADE) == made or site["scheme"] == "bitserial"
