"""Single fp32 convolutions, each compiled with a kernel of one's choice, for the benchmarks of kernels."""

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import tvm
from tvm import relax
from tvm.target import Target

from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.schedules import winograd
from tvm_compress.schedules.apply import lower_to_kernels
from tvm_compress.schedules.winograd_algorithm import ALGORITHMS

# "direct", and Winograd's algorithms.
KERNELS = ("direct", *ALGORITHMS)


def conv_module(height: int, width: int, in_channels: int, out_channels: int, seed: int = 0) -> tvm.IRModule:
    """Return a 3 x 3 convolution at stride 1 with padding 1, bias and ReLU on one image."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((out_channels, in_channels, 3, 3)).astype(np.float32)
    bias = rng.standard_normal((1, 1, 1, out_channels)).astype(np.float32)
    x = relax.Var("x", relax.TensorType((1, height, width, in_channels), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = relax.op.nn.conv2d(
                x, relax.const(weight), padding=1, data_layout="NHWC", kernel_layout="OIHW"
            )
            y = builder.emit(relax.op.add(builder.emit(y), relax.const(bias)))
            out = builder.emit_output(relax.op.nn.relu(y))
        builder.emit_func_output(out)
    return builder.get()


def build_conv(shape: Sequence[int], kernel: str, target: Target, path: Path) -> Path:
    """Compile a convolution of (H, W, IC, OC) with the kernel of that name; returns the library."""
    with patch.object(winograd, "choose_algorithm", lambda info, rules: ALGORITHMS.get(kernel)):
        lowered = lower_to_kernels(conv_module(*shape), target)
    compiler = export_fcompile(str(target.attrs.get("mtriple", "")))
    relax.build(lowered, target=target).export_library(str(path), fcompile=compiler)
    return path
