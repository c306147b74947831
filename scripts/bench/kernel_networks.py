"""The networks that the benchmarks of kernels run: with random weights, in Relax, as libraries."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tvm
from networks import MobileNetV2, ResNet18
from torch import nn

from tvm_compress.calibration import calibrate
from tvm_compress.compression import uniform_policy
from tvm_compress.compressor import realize
from tvm_compress.model import Model
from tvm_compress.passes.pipeline import build, compress
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.samples.load import sample_module
from tvm_compress.samples.resnet8 import ResNet8
from tvm_compress.schedules.target_rules import parse_target

TARGETS = {"local": "host", "emulated-a72": "raspberry-pi/4b-aarch64"}
# Blocks of each stage of ResNet-50, and their channels inside.
_STAGES = ((3, 64), (4, 128), (6, 256), (3, 512))
_CIFAR = (1, 3, 32, 32)
# Bits of weights and activations.
BITS = {"fp32": (32, 32), "int8": (8, 8)}


class _Bottleneck(nn.Module):
    """1 x 1 convolution to fewer channels, 3 x 3 with the stride, 1 x 1 to four times as many; a shortcut."""

    def __init__(self, ins: int, inside: int, stride: int) -> None:
        super().__init__()
        outs = 4 * inside
        shapes = ((ins, inside, 1, 1), (inside, inside, 3, stride), (inside, outs, 1, 1))
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, kernel, step, kernel // 2, bias=False) for i, o, kernel, step in shapes
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in shapes)
        self.short = nn.Sequential()
        if stride != 1 or ins != outs:
            self.short = nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        y = x
        for place, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(torch.relu(y) if place else y))
        return torch.relu(y + self.short(x))


class ResNet50(nn.Module):
    """ResNet-50 of He et al. 2016, with the strides on the 3 x 3 convolutions, as usual today."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        blocks: list[nn.Module] = []
        ins = 64
        for stage, (count, inside) in enumerate(_STAGES):
            for block in range(count):
                blocks.append(_Bottleneck(ins, inside, 2 if stage and not block else 1))
                ins = 4 * inside
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(ins, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, 224, 224] -> logits [N, classes]."""
        return self.fc(self.blocks(self.stem(x)).mean(dim=(2, 3)))


# Name: (how it is made, shape of the input). The first is the sample with its trained weights.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-8": (partial(sample_module, "resnet8-fashion"), (1, 1, 28, 28)),
    "ResNet-8 32x32x3": (partial(ResNet8, 3), _CIFAR),
    "ResNet-18 w32": (partial(ResNet18, 32), _CIFAR),
    "ResNet-18 w64": (partial(ResNet18, 64), _CIFAR),
    "MobileNetV2 96": (MobileNetV2, (1, 3, 96, 96)),
    "MobileNetV2 224": (MobileNetV2, (1, 3, 224, 224)),
    "ResNet-50 224": (ResNet50, (1, 3, 224, 224)),
}


def make(name: str) -> tuple[nn.Module, np.ndarray]:
    """Return a network in evaluation mode and an input of one image."""
    build_network, shape = NETWORKS[name]
    torch.manual_seed(0)
    network = build_network()
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    if network.training:
        _normalize(network, x)
    return network.eval(), x


def _normalize(network: nn.Module, x: np.ndarray) -> None:
    """Let batch norms see one image: untrained ones would let what flows through a deep network vanish."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None  # the mean of what was seen, that is, this
    with torch.no_grad():
        network(torch.from_numpy(np.concatenate([x, -x])))


def realized(
    network: nn.Module, x: np.ndarray, weight_bits: int = 32, activation_bits: int = 32
) -> tvm.IRModule:
    """Return the network in Relax, ready for the kernels: in float32, or in integers of so many bits.

    Sites that cannot have so few bits (the first and the last layer) are INT8.
    """
    model = Model.from_torch(network, (torch.zeros(x.shape),))
    if weight_bits == activation_bits == 32:
        return model.module
    policy = uniform_policy(model, target="host", weight_bits=weight_bits, activation_bits=activation_bits)
    return realize(compress(model.module, policy, calibration=lambda module: calibrate(module, x)))


def compile_library(module: tvm.IRModule, device: str, path: Path) -> Path:
    """Write the library of a module for a device of TARGETS, with the kernels that its target chooses."""
    target = parse_target(TARGETS[device])
    return build(module, target).export(path, export_fcompile(str(target.attrs.get("mtriple", ""))))
