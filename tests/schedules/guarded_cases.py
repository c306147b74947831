"""Kernels of every family, of odd sizes and channel counts, for test_guard_pages.py; and wrong ones."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import tvm
from tvm import relax, te

from tests.schedules import (
    test_bitserial,
    test_depthwise,
    test_elementwise,
    test_fp32,
    test_int8,
    test_sparse,
    test_winograd,
    test_winograd_int8,
)
from tvm_compress.schedules import ops, reference, target_rules, winograd
from tvm_compress.schedules.apply import lower_to_kernels
from tvm_compress.schedules.intrin.narrow import narrow_dot_for
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.schedules.winograd_algorithm import F2, F4, INTEGER_ALGORITHMS, S4

HOST = parse_target("host")
# The kernels of 16-byte vectors, where the host is an x86 too.
NARROWEST = parse_target("llvm -mcpu=x86-64-v2") if HOST.attrs["mtriple"].startswith("x86") else HOST
PADDINGS = ([1, 1, 1, 1], [0, 1, 2, 0])


@dataclass(frozen=True)
class Case:
    """Scheduled kernels, what they are given, and what they have to compute of it."""

    name: str
    lowered: tvm.IRModule
    inputs: tuple[np.ndarray, ...]
    expected: np.ndarray
    kernel: str = ""  # What stands in the name of one of them.


def fp32() -> Iterator[Case]:
    """Direct, grouped, depthwise and dense kernels, and those of vector-pruned dense layers."""
    rng = np.random.default_rng(0)
    shapes: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
        ((1, 5, 7, 3), (5, 3, 3, 3), {"padding": PADDINGS[0]}),
        ((2, 9, 6, 16), (37, 16, 3, 3), {"padding": PADDINGS[1], "strides": (2, 2)}),
        ((1, 4, 5, 9), (67, 9, 1, 1), {}),
        ((1, 7, 8, 24), (24, 24, 2, 2), {"dilation": (2, 1)}),
        ((1, 7, 5, 6), (10, 3, 3, 3), {"padding": PADDINGS[0], "groups": 2}),
        ((1, 9, 7, 37), (37, 1, 3, 3), {"padding": PADDINGS[0], "groups": 37}),
        ((1, 8, 9, 24), (48, 1, 5, 5), {"padding": [2, 2, 2, 2], "groups": 24, "strides": (2, 2)}),
    ]  # fmt: skip
    for x_shape, w_shape, attrs in shapes:
        x, w = (rng.standard_normal(shape).astype(np.float32) for shape in (x_shape, w_shape))
        bias = rng.standard_normal(w_shape[0]).astype(np.float32)
        with patch.object(winograd, "choose_algorithm", lambda *arguments: None):
            module = lower_to_kernels(test_fp32.conv_module(x_shape, w, bias, True, **attrs), HOST)
        expected = np.maximum(reference.convolution(x, w, **attrs) + bias, 0)
        kernel = "depthwise_fp32" if w.shape[1] == 1 else "conv2d_fp32"
        yield Case(f"convolution of {x_shape} with {w_shape}", module, (x,), expected, kernel)
    lanes = rules_for(HOST).fp32_lanes
    for rows, w in [
        (1, rng.standard_normal((10, 37)).astype(np.float32)),
        (3, rng.standard_normal((67, 50)).astype(np.float32)),
        (1, test_sparse.pruned(37, 50, lanes, 0.2)),
        (1, test_sparse.pruned(130, 99, lanes, 0.1)),
    ]:
        x, bias = (rng.standard_normal(s).astype(np.float32) for s in ((rows, w.shape[1]), len(w)))
        kernel = "dense_fp32_sparse" if (w == 0).any() else "dense_fp32"
        module = lower_to_kernels(test_fp32.dense_module(rows, w, bias, True), HOST)
        yield Case(f"{kernel} of {rows} x {w.shape}", module, (x,), x @ w.T + bias, kernel)


def winograd_fp32() -> Iterator[Case]:
    for algorithm, x_shape, outs, padding in [
        (F2, (1, 8, 9, 24), 24, PADDINGS[0]),
        (F4, (2, 6, 11, 5), 37, PADDINGS[1]),
        (S4, (1, 13, 16, 21), 21, PADDINGS[0]),
    ]:
        stride = algorithm.stride
        x, w, other = test_winograd.operands(x_shape, outs, padding, stride=stride)
        module = test_winograd.conv_module(x_shape, w, padding, stride)
        sums = reference.convolution(x, w, (stride, stride), padding) + np.linspace(-1, 1, outs) + other
        yield Case(
            f"{algorithm.name} of {x_shape} to {outs}",
            test_winograd.lower(module, HOST, algorithm),
            (x, other),
            np.maximum(sums, 0),
            "conv2d_fp32_winograd",
        )


def int8() -> Iterator[Case]:
    """Direct, grouped and dense kernels."""
    rng = np.random.default_rng(0)
    shapes: list[tuple[tuple[int, ...], tuple[int, ...], str, dict[str, Any]]] = [
        ((1, 5, 7, 3), (5, 3, 3, 3), "int8", {"padding": PADDINGS[0], "zero_point": 3}),
        ((2, 9, 6, 13), (37, 13, 3, 3), "uint8", {"padding": PADDINGS[1], "strides": [2, 2]}),
        ((1, 4, 5, 9), (67, 9, 1, 1), "int8", {"zero_point": -128}),
        ((1, 7, 5, 6), (10, 3, 3, 3), "int8", {"padding": PADDINGS[0], "groups": 2}),
        ((1, 8, 8, 16), (24, 16, 3, 3), "uint8", {"padding": PADDINGS[0]}),
        ((3, 37), (13, 37), "int8", {"zero_point": 7}),
        ((1, 50), (67, 50), "uint8", {"zero_point": 7}),
    ]  # fmt: skip
    for target in (HOST, NARROWEST):
        for x_shape, w_shape, dtype, attrs in shapes if target is HOST else shapes[:2]:
            x, w, b = test_int8.random_site(rng, x_shape, w_shape, dtype)
            with patch.object(winograd, "choose_algorithm", lambda *arguments: None):
                module = lower_to_kernels(test_int8.make_site(x, w, b, **attrs), target)
            compute = reference.conv2d if len(w_shape) == 4 else reference.dense
            name = f"{dtype} layer of {x_shape} with {w_shape} for {target.attrs['mcpu']}"
            yield Case(name, module, (x,), compute(x, w, b, **attrs), "_int8")


def integer_winograd() -> Iterator[Case]:
    """With requantization."""
    for target, name, x_shape, outs in [
        (HOST, "F2", (1, 9, 14, 5), 21),
        (HOST, "F4", (2, 7, 8, 16), 24),
        (NARROWEST, "F4", (1, 9, 7, 5), 21),
        (HOST, "S2", (2, 10, 13, 5), 21),
    ]:
        x, w, b = test_int8.random_site(np.random.default_rng(0), x_shape, (outs, x_shape[3], 3, 3))
        multiplier = np.random.default_rng(1).integers(1 << 29, 1 << 30, outs).astype(np.int32)
        stride = INTEGER_ALGORITHMS[name].stride
        module = test_winograd_int8.requantized(x, w, b, multiplier, stride)
        sums = reference.conv2d(x, w, b, -128, [stride, stride], test_winograd_int8.SAME)
        yield Case(
            f"integer {name} of {x_shape} to {outs} for {target.attrs['mcpu']}",
            test_winograd_int8.lower(module, target, INTEGER_ALGORITHMS[name]),
            (x,),
            reference.requantize(sums, multiplier, 38, -128, -128, 127),
            "conv2d_int8_winograd",
        )


def integer_depthwise() -> Iterator[Case]:
    for target in (HOST, NARROWEST):
        for channels, times, stride in [(37, 1, 1), (24, 1, 2), (5, 3, 1)][: 3 if target is HOST else 1]:
            layer: dict[str, Any] = {
                "x": (1, 7, 9, channels),
                "w": (channels * times, 1, 3, 3),
                "geometry": {"strides": [stride, stride], "padding": PADDINGS[1], "groups": channels},
                "dtype": "int8",
                "zero_point": 3,
                "seed": channels,
            }
            layer["geometry"]["dilation"] = [1, 1]
            x, w, b = test_depthwise.integers(layer)
            multiplier = np.full(len(w), 1 << 30, np.int32)
            settings = {k: v for k, v in test_depthwise.REQUANTIZATION.items() if k != "dtype"}
            sums = reference.conv2d(x, w, b, 3, **layer["geometry"])
            yield Case(
                f"INT8 depthwise of {channels} channels, {times} times, for {target.attrs['mcpu']}",
                lower_to_kernels(test_depthwise.integer_module(layer, w, b, multiplier), target),
                (x,),
                reference.requantize(sums, multiplier, **settings),
                "depthwise_int8",
            )


# Shapes of data and weights, bits, and attributes.
LOW_BITS: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, int], dict[str, Any]]] = [
    ((1, 5, 7, 32), (24, 32, 3, 3), (2, 2), {"padding": PADDINGS[1], "zero_point": 1}),
    ((1, 7, 5, 96), (8, 96, 3, 3), (5, 3), {"padding": PADDINGS[0], "strides": [2, 2]}),
    ((2, 3, 3, 64), (40, 64, 1, 1), (1, 1), {}),
    ((3, 96), (24, 96), (3, 2), {"zero_point": 1}),
]


def low_bits() -> Iterator[Case]:
    """Narrow and bit-serial kernels, with their packing."""
    rng = np.random.default_rng(0)
    for target, counts in ((HOST, (True, False)), (NARROWEST, (True,))):
        for count in counts:
            for x_shape, w_shape, bits, attrs in LOW_BITS:
                x, w, b = test_bitserial.random_site(rng, x_shape, w_shape, bits)
                most = dict.fromkeys(target_rules._POPCOUNT_BITS, 36 if count else 0)
                with patch.object(target_rules, "_POPCOUNT_BITS", most):
                    module = lower_to_kernels(test_bitserial.make_site(x, w, b, bits, **attrs), target)
                compute = reference.conv2d if len(w_shape) == 4 else reference.dense
                narrow = "_narrow" if narrow_dot_for(rules_for(target).isa, w_shape[0]) else "_int8"
                kernel = "_bitserial" if count else narrow
                yield Case(
                    f"{'counted' if count else 'multiplied'} bits {bits} of {x_shape} with {w_shape} "
                    f"for {target.attrs['mcpu']}",
                    module,
                    (x,),
                    compute(x, w, b, **attrs),
                    kernel,
                )


def elementwise() -> Iterator[Case]:
    """What stands between the sites."""
    for shape in [(2, 5, 3, 37), (1, 7, 7, 3)]:
        yield from _elementwise(shape)


def _elementwise(shape: tuple[int, ...]) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) * 3).astype(np.float32)
    attrs: dict[str, Any] = {"scale": 0.025, "zero_point": 3, "qmin": -128, "qmax": 127, "dtype": "int8"}
    integers = reference.quantize(x, **attrs)
    scale = rng.uniform(0.1, 1, shape[-1]).astype(np.float32)
    values = rng.integers(-128, 128, 256).astype(np.int8)
    largest = np.maximum(x[:, :-1], x[:, 1:])
    for name, value, operation, expected in [
        ("quantize", x, lambda v: ops.call("quantize", [v], **attrs), integers),
        (
            "dequantize",
            integers,
            lambda v: ops.call("dequantize", [v, relax.const(scale)], zero_point=3),
            reference.dequantize(integers, scale, 3),
        ),
        (
            "table",
            integers,
            lambda v: ops.call("table", [v, relax.const(values)]),
            reference.table(integers, values),
        ),
        ("max_pool", x, lambda v: relax.op.nn.max_pool2d(v, (2, 1), layout="NHWC"), largest),
        ("mean", x, lambda v: relax.op.mean(v, [1, 2]), x.mean(axis=(1, 2))),
        ("transpose", x, lambda v: relax.op.permute_dims(v, [0, 3, 1, 2]), x.transpose(0, 3, 1, 2)),
    ]:
        module = test_elementwise.unary(shape, str(value.dtype), lambda _, v, make=operation: make(v))
        yield Case(f"{name} of {shape}", lower_to_kernels(module, HOST), (value,), expected)


def faults() -> Iterator[Case]:
    """Kernels that read and write where they must not, to see that it is found."""
    x = np.arange(48, dtype=np.float32)
    for name, offset in (("reads behind", 1), ("reads in front of", -1)):

        def shifted(a: te.Tensor, offset: int = offset) -> te.Tensor:
            return te.compute((48,), lambda i: a[i + offset], "shifted")

        module = test_elementwise.unary((48,), "float32", lambda bb, v: bb.call_te(shifted, v))
        yield Case(name, module, (x,), x)
    for name, script in _WRITERS.items():
        func = tvm.script.from_source(script)
        bb = relax.BlockBuilder()
        data = relax.Var("x", relax.TensorType((48,), "float32"))
        with bb.function("main", [data]):
            with bb.dataflow():
                call = relax.call_tir(
                    bb.add_func(func, "writer"), data, out_ty=relax.TensorType((48,), "float32")
                )
                out = bb.emit_output(call)
            bb.emit_func_output(out)
        yield Case(name, bb.get(), (x,), x)


def _writer(statement: str) -> str:
    return f"""
@T.prim_func(s_tir=True)
def writer(a: T.handle, b: T.handle) -> None:
    A = T.match_buffer(a, (48,), "float32")
    B = T.match_buffer(b, (48,), "float32")
    for i in range(48):
        {statement}
"""


_WRITERS = {
    "writes behind": _writer("B[i + 1] = A[i]"),
    "writes in front of": _writer("B[i - 1] = A[i]"),
    "writes its input": _writer("A[i] = B[i]"),
}

BATCHES: Mapping[str, Callable[[], Iterator[Case]]] = {
    function.__name__: function
    for function in (
        fp32, winograd_fp32, int8, integer_winograd, integer_depthwise, low_bits, elementwise, faults,
    )
}  # fmt: skip
