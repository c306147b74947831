"""Small canonical networks with random parameters, and calibrations, for the tests of quantization."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tvm import IRModule, relax

from tvm_compress.passes.params import STAGE, with_values
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy

INT8 = SitePolicy(scheme="int8", weight_bits=8, activation_bits=8)
FP32 = SitePolicy()


def bits(weight_bits: int, activation_bits: int) -> SitePolicy:
    return SitePolicy(scheme="bitserial", weight_bits=weight_bits, activation_bits=activation_bits)


def policy(**sites: SitePolicy) -> CompressionPolicy:
    return CompressionPolicy(sites={name.replace("__", "."): site for name, site in sites.items()})


class Ranges:
    """A calibration from a table of ranges, with one range for all others."""

    def __init__(self, ranges: Mapping[str, tuple[float, float]] | None = None, default=(0.0, 4.0)) -> None:
        self.ranges = dict(ranges or {})
        self.default = default
        self.asked: list[tuple[str, int]] = []

    def range(self, site: str, bits: int) -> tuple[float, float]:
        self.asked.append((site, bits))
        return self.ranges.get(site, self.default)


class Net:
    """Builds a canonical float module layer by layer; parameters are random unless given."""

    def __init__(self, in_shape: Sequence[int], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.input = relax.Var("x", relax.TensorType(tuple(in_shape), "float32"))
        self.params: dict[str, np.ndarray] = {}
        self.builder = relax.BlockBuilder()
        self.vars: dict[str, relax.Var] = {}

    def parameter(self, name: str, value: np.ndarray) -> relax.Var:
        self.params[name] = np.asarray(value, dtype=np.float32)
        self.vars[name] = relax.Var(name, relax.TensorType(value.shape, "float32"))
        return self.vars[name]

    def emit(self, call: relax.Expr) -> relax.Var:
        return self.builder.emit(call)

    def conv(self, x, name, out, kernel=3, stride=1, padding=1, groups=1, bias=False, dilation=1):
        channels = int(x.ty.shape[3])
        shape = (out, channels // groups, kernel, kernel)
        weight = self.rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
        w = self.parameter(f"{name}.weight", weight)
        y = self.emit(
            relax.op.nn.conv2d(
                x,
                w,
                strides=[stride, stride],
                padding=[padding] * 4,
                dilation=[dilation, dilation],
                groups=groups,
                data_layout="NHWC",
                kernel_layout="OIHW",
            )
        )
        if bias:
            b = self.parameter(f"{name}.bias", self.rng.normal(size=out) * 0.5)
            y = self.emit(relax.op.add(y, b))
        return y

    def batch_norm(self, x, name, gamma: np.ndarray | None = None):
        channels = int(x.ty.shape[-1])
        draw = self.rng.normal
        gamma = draw(size=channels) + 1.0 if gamma is None else np.asarray(gamma)
        values = {
            "weight": gamma,
            "bias": draw(size=channels) * 0.3,
            "running_mean": draw(size=channels) * 0.3,
            "running_var": self.rng.uniform(0.5, 2.0, size=channels),
        }
        args = [self.parameter(f"{name}.{key}", value) for key, value in values.items()]
        items = self.emit(relax.op.nn.batch_norm(x, *args, axis=3))
        return self.emit(relax.TupleGetItem(items, 0))

    def dense(self, x, name, out, bias=True):
        features = int(x.ty.shape[1])
        w = self.parameter(f"{name}.weight", self.rng.normal(size=(out, features)) / np.sqrt(features))
        y = self.emit(relax.op.matmul(x, self.emit(relax.op.permute_dims(w))))
        if bias:
            y = self.emit(relax.op.add(y, self.parameter(f"{name}.bias", self.rng.normal(size=out) * 0.3)))
        return y

    def module(self, build: Callable[["Net", relax.Var], relax.Expr]) -> IRModule:
        """Make the module whose body `build(net, x)` emits, x being the NHWC (or 2-D) input."""
        with self.builder.function("main"):
            with self.builder.dataflow():
                x: relax.Expr = self.input
                if len(self.input.ty.shape) == 4:
                    x = self.emit(relax.op.permute_dims(x, [0, 2, 3, 1]))
                result = self.builder.emit_output(build(self, x))
            self.builder.emit_func_output(result, params=[self.input, *self.vars.values()])
        function = self.builder.finalize()["main"].with_attrs({"num_input": 1, STAGE: "float"})
        return IRModule({"main": with_values(function, list(self.params.values()))})


def sequential(seed: int = 0) -> IRModule:
    """Conv + BN + ReLU, conv + bias + ReLU + max pooling, flatten, two dense layers."""

    def build(net: Net, x):
        x = net.emit(relax.op.nn.relu(net.batch_norm(net.conv(x, "conv1", 8), "bn1")))
        x = net.emit(relax.op.nn.relu(net.conv(x, "conv2", 6, stride=2, bias=True)))
        x = net.emit(relax.op.nn.max_pool2d(x, [2, 2], [2, 2], layout="NHWC"))
        x = net.emit(relax.op.nn.batch_flatten(net.emit(relax.op.permute_dims(x, [0, 3, 1, 2]))))
        x = net.emit(relax.op.nn.relu(net.dense(x, "fc1", 12)))
        return net.dense(x, "fc2", 5)

    return Net((1, 3, 8, 8), seed).module(build)


def residual(seed: int = 0, gamma: np.ndarray | None = None) -> IRModule:
    """A stem, a plain residual block, one with a strided shortcut, global average pooling, a dense layer."""

    def build(net: Net, x):
        relu = relax.op.nn.relu
        x = net.emit(relu(net.batch_norm(net.conv(x, "stem", 8), "bn")))
        for name, out, stride in (("a", 8, 1), ("b", 12, 2)):
            y = net.emit(
                relu(
                    net.batch_norm(
                        net.conv(x, f"{name}.conv1", out, stride=stride),
                        f"{name}.bn1",
                        gamma if out == 8 else None,
                    )
                )
            )
            y = net.batch_norm(net.conv(y, f"{name}.conv2", out), f"{name}.bn2")
            if stride != 1:
                x = net.batch_norm(
                    net.conv(x, f"{name}.down", out, kernel=1, stride=2, padding=0), f"{name}.bn3"
                )
            x = net.emit(relu(net.emit(relax.op.add(y, x))))
        return net.dense(net.emit(relax.op.mean(x, axis=[1, 2])), "fc", 5)

    return Net((1, 3, 8, 8), seed).module(build)


def average_pool(net: Net, x, window: int, stride: int, padding: int = 0, **attrs):
    """Average pooling that counts the padding, as torch's does, unless `attrs` say otherwise."""
    attrs = {"count_include_pad": True, "layout": "NHWC"} | attrs
    return net.emit(relax.op.nn.avg_pool2d(x, [window] * 2, [stride] * 2, [padding] * 4, **attrs))


def pooling(seed: int = 0) -> IRModule:
    """Average pooling of a table's integers, with padding beside a concatenation, and of all that is left."""

    def build(net: Net, x):
        x = average_pool(net, net.emit(relax.op.nn.silu(net.conv(x, "a", 6, bias=True))), 2, 2)
        x = net.emit(relax.op.nn.relu(net.batch_norm(net.conv(x, "b", 12), "bn")))
        y = average_pool(net, x, 3, 1, 1)
        x = net.conv(net.emit(relax.op.concat([net.conv(x, "c", 4), y], axis=3)), "d", 8)
        x = net.emit(relax.op.nn.batch_flatten(average_pool(net, x, 4, 4)))
        return net.dense(x, "fc", 5)

    return Net((1, 3, 8, 8), seed).module(build)
