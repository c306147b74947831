"""Single convolutions in fp32 and INT8, compiled with a kernel of one's choice, for benchmarks of kernels."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import tvm
from tvm import relax
from tvm.target import Target

from tvm_compress.errors import KernelError
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.schedules import ops, winograd
from tvm_compress.schedules.apply import lower_to_kernels
from tvm_compress.schedules.target_rules import TargetRules
from tvm_compress.schedules.winograd_algorithm import ALGORITHMS, INTEGER_ALGORITHMS, Algorithm

_ALGORITHMS: Mapping[str, Mapping[str, Algorithm]] = {
    "conv2d_fp32": ALGORITHMS,
    "conv2d_int8": INTEGER_ALGORITHMS,
}
# Those of bytes are for layers of few bits.
FEW_BITS = tuple(name for name, algorithm in INTEGER_ALGORITHMS.items() if algorithm.data == "int8")


def kernels(operator: str, stride: int) -> list[str]:
    """Names of the kernels that there are: "direct", and Winograd's algorithms."""
    algorithms = _ALGORITHMS[operator].items()
    return ["direct", *(name for name, algorithm in algorithms if algorithm.stride == stride)]


def fp32_module(
    height: int, width: int, in_channels: int, out_channels: int, stride: int = 1
) -> tvm.IRModule:
    """Return a 3 x 3 convolution with padding 1, bias and ReLU on one image."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((out_channels, in_channels, 3, 3)).astype(np.float32)
    bias = rng.standard_normal((1, 1, 1, out_channels)).astype(np.float32)
    x = relax.Var("x", relax.TensorType((1, height, width, in_channels), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = relax.op.nn.conv2d(
                x, relax.const(weight), strides=stride, padding=1, data_layout="NHWC", kernel_layout="OIHW"
            )
            y = builder.emit(relax.op.add(builder.emit(y), relax.const(bias)))
            out = builder.emit_output(relax.op.nn.relu(y))
        builder.emit_func_output(out)
    return builder.get()


def int8_module(
    height: int, width: int, in_channels: int, out_channels: int, stride: int = 1, few_bits: bool = False
) -> tvm.IRModule:
    """Return the same in integers: what follows is a ReLU's requantization, of a multiplier per channel.

    The weights are of a normal distribution, as are trained ones: those of an equal one would need more bits.
    With `few_bits` they have 4, and the activations 5.
    """
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((out_channels, in_channels, 3, 3))
    scale = (7 if few_bits else 127) / np.abs(drawn).max(axis=(1, 2, 3), keepdims=True)
    weight = np.rint(drawn * scale).astype(np.int8)
    bias = rng.integers(-1000, 1000, out_channels).astype(np.int32)
    multiplier = rng.integers(1 << 29, 1 << 30, out_channels).astype(np.int32)
    dtype, bits = ("uint8", {"scheme": "bitserial", "activation_bits": 5, "weight_bits": 4})
    if not few_bits:
        dtype, bits = ("int8", {"scheme": "int8", "activation_bits": 8, "weight_bits": 8})
    x = relax.Var("x", relax.TensorType((1, height, width, in_channels), dtype))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = ops.call(
                "conv2d", [x, relax.const(weight), relax.const(bias)],
                strides=[stride, stride], padding=[1, 1, 1, 1], dilation=[1, 1], groups=1,
                zero_point=int(np.iinfo(dtype).min), **bits,
            )  # fmt: skip
            bound = int(255 * np.abs(weight.astype(np.int64)).sum(axis=(1, 2, 3)).max() + 1000)
            y = ops.call(
                "requantize", [builder.emit(y), relax.const(multiplier)],
                shift=41, zero_point=-128, qmin=-128, qmax=127, dtype="int8", bound=bound,
            )  # fmt: skip
            out = builder.emit_output(y)
        builder.emit_func_output(out)
    return builder.get()


MODULES: dict[str, Callable[..., tvm.IRModule]] = {"conv2d_fp32": fp32_module, "conv2d_int8": int8_module}


def build_conv(
    operator: str, shape: Sequence[int], stride: int, kernel: str, target: Target, path: Path
) -> Path | None:
    """Compile a convolution of (H, W, IC, OC) with the kernel of that name; returns the library.

    None where the kernel cannot compute it: integers that may not fit, or channels that few bits do not take.
    """
    fits = True

    def choose(
        info: dict, rules: object, operator: str, algorithms: Mapping[str, Algorithm]
    ) -> Algorithm | None:
        nonlocal fits
        fits = kernel == "direct" or kernel in algorithms
        return algorithms.get(kernel)

    options = {"few_bits": True} if kernel in FEW_BITS else {}
    with (
        patch.object(winograd, "choose_algorithm", choose),
        patch.object(TargetRules, "lookup_pays", lambda *_, **__: False),
        patch.object(TargetRules, "popcount_pays", lambda *_: False),
    ):
        try:
            lowered = lower_to_kernels(MODULES[operator](*shape, stride, **options), target)
        except KernelError:
            # Few bits are for whole words of channels.
            return None
    if not fits:
        return None
    compiler = export_fcompile(str(target.attrs.get("mtriple", "")))
    relax.build(lowered, target=target).export_library(str(path), fcompile=compiler)
    return path
