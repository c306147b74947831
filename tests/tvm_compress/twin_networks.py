"""Builds canonical, QDQ and integer modules by hand, for the tests of whatever runs them."""

from collections.abc import Callable

import numpy as np
import torch
import tvm
from tvm import relax

from tvm_compress.passes.params import STAGE
from tvm_compress.samples.resnet8 import ResNet8
from tvm_compress.schedules import ops


class Build:
    """A `main` in the making: named parameters with values, and the layers of the canonical form."""

    def __init__(self, shape: tuple[int, ...], stage: str = "float") -> None:
        self.builder = relax.BlockBuilder()
        self.x = relax.Var("x", relax.TensorType(shape, "float32"))
        self.stage = stage
        self.variables: list[relax.Var] = []
        self.values: list[np.ndarray] = []

    def param(self, name: str, value) -> relax.Var:
        value = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
        variable = relax.Var(name, relax.TensorType(value.shape, str(value.dtype)))
        self.variables.append(variable)
        self.values.append(value)
        return variable

    def emit(self, expr) -> relax.Var:
        return self.builder.emit(expr)

    def conv(self, x, w, stride: int = 1, padding: int = 0, **settings) -> relax.Var:
        return self.emit(
            relax.op.nn.conv2d(x, w, stride, padding, data_layout="NHWC", kernel_layout="OIHW", **settings)
        )

    def dense(self, x, w, b) -> relax.Var:
        product = self.emit(relax.op.matmul(x, self.emit(relax.op.permute_dims(w))))
        return self.emit(relax.op.add(product, b))

    def nhwc(self, x) -> relax.Var:
        return self.emit(relax.op.permute_dims(x, [0, 2, 3, 1]))

    def batch_norm(self, x, name: str, layer: torch.nn.BatchNorm2d) -> relax.Var:
        values = [
            self.param(f"{name}.{key}", getattr(layer, key))
            for key in ("weight", "bias", "running_mean", "running_var")
        ]
        triple = self.emit(
            relax.op.nn.batch_norm(x, *values, axis=3, epsilon=layer.eps, momentum=layer.momentum)
        )
        return self.emit(relax.TupleGetItem(triple, 0))

    def fake_quantize(
        self, x, scale, zero_point: int, low: int, high: int, dtype: str = "int8", axis: int = -1
    ):
        shape = tuple(int(v) for v in scale.ty.shape)
        z = relax.const(np.full(shape, zero_point, dtype))
        q = self.emit(relax.op.quantize(x, scale, z, axis=axis, out_dtype=dtype))
        q = self.emit(relax.op.clip(q, low, high))
        return self.emit(relax.op.dequantize(q, scale, z, axis=axis, out_dtype="float32"))

    def fake_binarize(self, w, scale):
        z = relax.const(np.zeros(tuple(int(v) for v in scale.ty.shape), "int8"))
        q = self.emit(ops.call("binarize", [w]))
        return self.emit(relax.op.dequantize(q, scale, z, axis=0, out_dtype="float32"))

    def finish(self, make: Callable[[], relax.Expr]) -> tvm.IRModule:
        with self.builder.function("main", [self.x]):
            with self.builder.dataflow():
                result = self.builder.emit_output(make())
            self.builder.emit_func_output(result)
        function = self.builder.get()["main"]
        function = relax.Function(
            [self.x, *self.variables], function.body, function.ret_ty, attrs=function.attrs
        )
        values = [tvm.runtime.tensor(np.array(value, order="C")) for value in self.values]
        function = function.with_attr("num_input", 1).with_attr("params", values).with_attr(STAGE, self.stage)
        module = tvm.IRModule({"main": function})
        relax.analysis.well_formed(module)
        return module


def resnet8_module(net: ResNet8, bits: int = 0, scales: dict[str, float] | None = None) -> tvm.IRModule:
    """The canonical module of a ResNet-8; with `bits`, the QDQ module with `scales` of the sites' inputs."""
    b = Build((1, 1, 28, 28), "qdq" if bits else "float")

    def weight(name: str, value: torch.Tensor):
        w = b.param(f"{name}.weight", value)
        if not bits:
            return w
        flat = value.detach().numpy().reshape(len(value), -1)
        if bits == 1:
            return b.fake_binarize(w, b.param(f"{name}.weight_scale", np.abs(flat).mean(1)))
        top = 2 ** (bits - 1) - 1
        scale = b.param(f"{name}.weight_scale", (np.abs(flat).max(1) / top).astype(np.float32))
        return b.fake_quantize(w, scale, 0, -top, top, axis=0)

    def quantized(x, name: str):
        if not bits:
            return x
        scale = b.param(f"{name}.input_scale", np.float32((scales or {}).get(name, 0.02)))
        return b.fake_quantize(x, scale, -128 if name != "conv1" else 0, -128, 127)

    def conv_bn(x, prefix: str, conv: str, bn: str, parent, stride: int, padding: int):
        layer, norm = (parent.get_submodule(key) for key in (conv, bn))
        y = b.conv(x, weight(prefix + conv, layer.weight), stride, padding)
        return b.batch_norm(y, prefix + bn, norm)

    def make():
        x = conv_bn(quantized(b.nhwc(b.x), "conv1"), "", "conv1", "bn1", net, 1, 1)
        x = b.emit(relax.op.nn.relu(x))
        for name, stride in (("layer1", 1), ("layer2", 2), ("layer3", 2)):
            block, prefix = net.get_submodule(f"{name}.0"), f"{name}.0."
            x = quantized(x, prefix + "conv1")
            y = conv_bn(x, prefix, "conv1", "bn1", block, stride, 1)
            y = b.emit(relax.op.nn.relu(y))
            y = conv_bn(quantized(y, prefix + "conv2"), prefix, "conv2", "bn2", block, 1, 1)
            if stride > 1:
                x = conv_bn(x, prefix, "short.0", "short.1", block, stride, 0)
            x = b.emit(relax.op.nn.relu(b.emit(relax.op.add(y, x))))
        x = b.emit(relax.op.mean(x, [1, 2]))
        return b.dense(quantized(x, "fc"), weight("fc", net.fc.weight), b.param("fc.bias", net.fc.bias))

    return b.finish(make)


def random_resnet8(seed: int = 0) -> ResNet8:
    """A ResNet-8 with random weights and random statistics in its batch norms."""
    generator = torch.Generator().manual_seed(seed)
    net = ResNet8()
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.dtype == torch.float32:
                noise = torch.randn(value.shape, generator=generator)
                if value.dim() > 1:
                    value.copy_(noise * (2.0 / value[0].numel()) ** 0.5)
                elif "running_var" in name:
                    value.copy_(noise.abs() + 0.5)
                else:
                    value.copy_(noise * 0.1 + float("bn" in name and "weight" in name))
    return net.eval()
