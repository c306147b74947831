"""Fake quantization with straight-through estimators: the QDQ stage, computed and differentiated by torch.

Forward, the integers are exactly those of `schedules.ops`, held in float32 tensors. Backward, rounding passes
its gradient through and clamping passes it inside of the range only, so that gradients reach weights,
activations and scales. The scales' gradients are those of LSQ (Esser et al., "Learned Step Size
Quantization", section 2.1), with its factor 1 / sqrt(n * qmax); unlike LSQ, a value counts as inside of the
range when its *rounded* value is.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tvm_compress.twin.float_ops import BatchNormMode, Build, TensorFunction, unsupported
from tvm_compress.twin.program import Node, Program

FAKE_QUANTIZE = "fake_quantize"
FAKE_BINARIZE = "fake_binarize"
BINARIZE = "tvm_compress.binarize"

INTEGER_RANGES = {"int8": (-128, 127), "uint8": (0, 255), "int32": (-(2**31), 2**31 - 1)}


def along(values: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    """View per-channel values [C] so that they broadcast along `axis`; one value broadcasts anyway."""
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * rank
    shape[axis] = values.numel()
    return values.reshape(shape)


def _sum_products(a: torch.Tensor, b: torch.Tensor, like: torch.Tensor, axis: int) -> torch.Tensor:
    """Sum a * b over everything that `along` broadcast `like` over."""
    if like.numel() == 1:
        if a.is_contiguous() and b.is_contiguous():
            return torch.dot(a.view(-1), b.view(-1)).reshape(like.shape)
        return (a * b).sum().reshape(like.shape)
    dims = [dim for dim in range(a.dim()) if dim != axis % a.dim()]
    return (a * b).sum(dims).reshape(like.shape)


def scale_gradient_factor(values: torch.Tensor, scale: torch.Tensor, qmax: float, per_sample: bool) -> float:
    """LSQ's 1 / sqrt(n * qmax), n being the values that share a scale (activations: in one sample)."""
    n = values.numel() // scale.numel()
    if per_sample:
        n //= values.shape[0]
    return float((max(n, 1) * max(qmax, 1.0)) ** -0.5)


class _FakeQuantize(torch.autograd.Function):
    """`(clamp(round(x / s) + z, qmin, qmax) - z) * s`, with low = qmin - z and high = qmax - z."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, low: float, high: float, axis: int, factor: float
    ) -> torch.Tensor:
        steps = along(scale, axis, x.dim())
        units = x / steps
        if not any(ctx.needs_input_grad[:2]):
            return units.round_().clamp_(low, high).mul_(steps)
        rounded = torch.round(units)
        clamped = rounded.clamp(low, high)
        inside = rounded.eq_(clamped)
        # d/ds of (q - z) * s: q - z, less x / s where the gradient passes through q.
        by_scale = torch.sub(clamped, units.mul_(inside), out=units)
        ctx.save_for_backward(inside, by_scale, scale)
        ctx.axis, ctx.factor = axis, factor
        return clamped.mul_(steps)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        inside, by_scale, scale = ctx.saved_tensors
        gradient_scale = None
        if ctx.needs_input_grad[1]:
            gradient_scale = _sum_products(gradient, by_scale, scale, ctx.axis) * ctx.factor
        return gradient * inside, gradient_scale, None, None, None, None


class _FakeBinarize(torch.autograd.Function):
    """`sign(w) * s` with sign(0) = 1.

    The gradient passes straight through to w where |w| <= 1 (XNOR-Net, section 3.1), without the factor s
    that a literal derivative of `sign(w) * s` would bring: a binary weight then learns at the rate of any
    other.
    """

    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, scale: torch.Tensor, axis: int, factor: float) -> torch.Tensor:
        ctx.save_for_backward(w, scale)
        ctx.axis, ctx.factor = axis, factor
        return torch.where(w >= 0, 1.0, -1.0) * along(scale, axis, w.dim())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        w, scale = ctx.saved_tensors
        gradient_w = gradient * (w.abs() <= 1)
        signs = torch.where(w >= 0, 1.0, -1.0)
        gradient_scale = _sum_products(gradient, signs, scale, ctx.axis) * ctx.factor
        return gradient_w, gradient_scale, None, None


class _Through(torch.autograd.Function):
    """A function of values whose gradient is passed where a mask says, unchanged."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, result: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(mask)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        return gradient * ctx.saved_tensors[0], None, None


def _quantize(node: Node, _: BatchNormMode) -> TensorFunction:
    axis = int(node.attr("axis", -1))
    low, high = _range_of(node, str(node.attr("out_dtype")))

    def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        units = x / along(scale, axis, x.dim())
        rounded = units + (torch.round(units) - units).detach()
        return torch.clamp(rounded + along(zero_point, axis, x.dim()).to(x.dtype), low, high)

    return quantize


def _dequantize(node: Node, _: BatchNormMode) -> TensorFunction:
    axis = int(node.attr("axis", -1))

    def dequantize(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        floats = q.to(torch.float32) - along(zero_point, axis, q.dim()).to(torch.float32)
        return floats * along(scale, axis, q.dim())

    return dequantize


def _binarize(node: Node, _: BatchNormMode) -> TensorFunction:
    def binarize(w: torch.Tensor) -> torch.Tensor:
        return _Through.apply(w, torch.where(w >= 0, 1.0, -1.0), w.abs() <= 1)

    return binarize


def _fake_quantize(node: Node, _: BatchNormMode) -> TensorFunction:
    attrs: dict[str, Any] = node.attrs
    axis, low, high, varying = attrs["axis"], attrs["low"], attrs["high"], node.varying
    qmax = max(high, -low)

    def fake_quantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        factor = scale_gradient_factor(x, scale, qmax, varying)
        return _FakeQuantize.apply(x, scale, low, high, axis, factor)

    return fake_quantize


def _fake_binarize(node: Node, _: BatchNormMode) -> TensorFunction:
    axis: int = node.attrs["axis"]

    def fake_binarize(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return _FakeBinarize.apply(w, scale, axis, scale_gradient_factor(w, scale, 1.0, node.varying))

    return fake_binarize


def _range_of(node: Node, dtype: str) -> tuple[int, int]:
    if dtype not in INTEGER_RANGES:
        raise unsupported(node, f"integers of type {dtype}")
    return INTEGER_RANGES[dtype]


QUANTIZED_OPERATORS: dict[str, Build] = {
    "relax.quantize": _quantize,
    "relax.dequantize": _dequantize,
    BINARIZE: _binarize,
    FAKE_QUANTIZE: _fake_quantize,
    FAKE_BINARIZE: _fake_binarize,
}


def fuse_fake_quantization(program: Program) -> None:
    """Replace quantize -> clip -> dequantize by one node, in place, where nothing else uses the integers.

    One node makes two passes over memory out of eight and brings LSQ's factor to the scale's gradient. What
    does not match is left to the operators one by one: the same values, without that factor.
    """
    uses = program.uses()
    replaced: dict[int, Node] = {}
    dropped: set[int] = set()
    for node in program.nodes:
        chain = _match(program, node, uses)
        if chain is not None:
            replaced[chain[-1].output] = _fused(program, chain)
            dropped.update(link.output for link in chain[:-1])
    program.nodes = [replaced.get(node.output, node) for node in program.nodes if node.output not in dropped]


def _only_use(program: Program, node: Node, uses: dict[int, list[Node]]) -> Node | None:
    consumers = uses.get(node.output, [])
    return consumers[0] if len(consumers) == 1 and node.output != program.output else None


def _match(program: Program, first: Node, uses: dict[int, list[Node]]) -> list[Node] | None:
    if first.op not in ("relax.quantize", BINARIZE):
        return None
    chain = [first]
    last = _only_use(program, first, uses)
    if first.op == "relax.quantize" and last is not None and last.op == "relax.clip":
        chain.append(last)
        last = _only_use(program, last, uses)
    if last is None or last.op != "relax.dequantize":
        return None
    zero_point = _uniform_zero_point(program, last)
    if zero_point is None:
        return None
    if first.op == BINARIZE:
        return [*chain, last] if zero_point == 0 else None
    same = (
        first.inputs[1] == last.inputs[1]
        and _uniform_zero_point(program, first) == zero_point
        and first.attr("axis") == last.attr("axis")
    )
    return [*chain, last] if same else None


def _uniform_zero_point(program: Program, node: Node) -> int | None:
    """Return the zero point of a (de)quantization if it is one constant for all channels."""
    values = program.constants.get(node.inputs[2])
    if values is None or np.unique(values).size != 1:
        return None
    return int(values.flat[0])


def _fused(program: Program, chain: list[Node]) -> Node:
    first, last = chain[0], chain[-1]
    scale = last.inputs[1]
    if first.op == BINARIZE:
        op, attrs = FAKE_BINARIZE, {"axis": int(last.attr("axis"))}
    else:
        low, high = _range_of(first, str(first.attr("out_dtype")))
        if len(chain) == 3:
            clip_low, clip_high = chain[1].immediates
            low, high = max(low, clip_low), min(high, clip_high)
        zero_point = _uniform_zero_point(program, first) or 0
        op = FAKE_QUANTIZE
        attrs = {"axis": int(first.attr("axis")), "low": low - zero_point, "high": high - zero_point}
    return replace(
        first,
        op=op,
        inputs=(first.inputs[0], scale),
        immediates=(),
        output=last.output,
        attrs=attrs,
        info=(first.info[0], last.info[1]),
        output_info=last.output_info,
    )
