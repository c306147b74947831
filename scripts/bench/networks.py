"""The networks of the benchmarks as plain torch modules; `train.py` trains and loads them.

Widths are reduced to what one processor core trains in twelve minutes; `NETWORKS` says by how much.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional


@dataclass(frozen=True)
class NetworkSpec:
    """How a network is built and trained.

    Attributes
    ----------
    build
        Gives the module with fresh weights.
    data
        "cifar10" or "fashion".
    epochs, optimizer, learning_rate, weight_decay
        Optimizer "sgd" (Nesterov momentum 0.9) or "adam"; the rate rises for the first fifth of the steps to
        `learning_rate`, then falls to 0.
    bits
        Bits per weight of the network when stored: 32, or 1 for the binary ones.
    deployed
        Name of the float network that the trained weights are loaded into, "" where the module itself is
        used: binary weights are ordinary numbers there.
    note
        What was reduced against the paper, and what its authors report.
    """

    build: Callable[[], nn.Module]
    data: str
    epochs: int
    note: str
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    bits: int = 32
    deployed: str = ""


class _Sign(torch.autograd.Function):
    """Sign, +1 at 0; the gradient passes where |x| <= 1."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= 1)


class SignActivation(nn.Module):
    """Activations of -1 and +1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        return _Sign.apply(x)


def binary_weight(weight: torch.Tensor) -> torch.Tensor:
    """Return +-mean|w| of the layer, with straight-through gradients to `weight`."""
    return _Sign.apply(weight) * weight.detach().abs().mean()


class BinaryConv2d(nn.Conv2d):
    """Convolution with weights of +-a."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        return self._conv_forward(x, binary_weight(self.weight), self.bias)


class BinaryLinear(nn.Linear):
    """Dense layer with weights of +-a."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        return functional.linear(x, binary_weight(self.weight), self.bias)


def binarize_weights(module: nn.Module) -> None:
    """Replace, in place, the real weights of binary layers by the +-a that they compute with."""
    for layer in module.modules():
        if isinstance(layer, BinaryConv2d | BinaryLinear):
            layer.weight.data = binary_weight(layer.weight.data).contiguous()


class ConvNet(nn.Module):
    """Convolutions (with max pooling between), flatten, dense layers, ReLU throughout.

    Parameters
    ----------
    plan
        Output channels of each convolution, or "M" for 2 x 2 max pooling.
    hidden
        Widths of the dense layers before the classifier.
    shape
        (C, H, W) of the input.
    kernel, padding
        Of every convolution.
    batch_norm
        Whether convolutions carry one instead of a bias.
    weights
        "float" or "binary" (BinaryConnect with scaled weights: importable after `binarize_weights`).
    """

    def __init__(
        self,
        plan: Sequence[int | str],
        hidden: Sequence[int],
        shape: tuple[int, int, int],
        kernel: int = 3,
        padding: int = 1,
        batch_norm: bool = True,
        weights: str = "float",
    ) -> None:
        super().__init__()
        convolution, dense = (BinaryConv2d, BinaryLinear) if weights == "binary" else (nn.Conv2d, nn.Linear)
        layers: list[nn.Module] = []
        channels, height, _ = shape
        for step in plan:
            if step == "M":
                layers.append(nn.MaxPool2d(2))
                height //= 2
                continue
            layers.append(convolution(channels, step, kernel, padding=padding, bias=not batch_norm))
            layers += [nn.BatchNorm2d(step)] if batch_norm else []
            layers.append(nn.ReLU())
            channels, height = step, height + 2 * padding - kernel + 1
        self.features = nn.Sequential(*layers)
        widths = [channels * height * height, *hidden, 10]
        classifier: list[nn.Module] = []
        for ins, outs in itertools.pairwise(widths):
            classifier += [dense(ins, outs), nn.ReLU()]
        self.classifier = nn.Sequential(*classifier[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits."""
        return self.classifier(torch.flatten(self.features(x), 1))


class BinarizedNet(nn.Module):
    """The network of Hubara et al. 2016 (BNN): weights and activations of -1 and +1 (batch norm, then sign).

    Parameters as for `ConvNet`. The first layer sees real pixels; pooling comes before the batch norm.
    """

    def __init__(
        self,
        plan: Sequence[int | str],
        hidden: Sequence[int],
        shape: tuple[int, int, int],
        kernel: int = 3,
        padding: int = 1,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, height, _ = shape
        for place, step in enumerate(plan):
            if step == "M":
                continue
            layers.append(BinaryConv2d(channels, step, kernel, padding=padding, bias=False))
            channels, height = step, height + 2 * padding - kernel + 1
            if plan[place + 1 : place + 2] == ["M"]:
                layers.append(nn.MaxPool2d(2))
                height //= 2
            layers += [nn.BatchNorm2d(step), SignActivation()]
        self.features = nn.Sequential(*layers)
        widths = [channels * height * height, *hidden, 10]
        classifier: list[nn.Module] = []
        for ins, outs in itertools.pairwise(widths):
            classifier += [BinaryLinear(ins, outs, bias=False), nn.BatchNorm1d(outs), SignActivation()]
        self.classifier = nn.Sequential(*classifier[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits."""
        return self.classifier(torch.flatten(self.features(x), 1))


class Mlp(nn.Module):
    """Two dense layers on images averaged over 2 x 2 pixels: 196 - 77 - 10, 15,949 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2)
        self.hidden = nn.Linear(196, 77)
        self.output = nn.Linear(77, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits."""
        return self.output(torch.relu(self.hidden(torch.flatten(self.pool(x), 1))))


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outs)
        self.conv2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.short = nn.Sequential()
        if stride != 1 or ins != outs:
            self.short = nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.short(x))


class ResNet18(nn.Module):
    """ResNet-18 for 32 x 32 images: stem of 3 x 3 without pooling, widths w, 2 w, 4 w, 8 w."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        ins = width
        for stage in range(4):
            outs, stride = width << stage, 1 if stage == 0 else 2
            blocks = nn.Sequential(_Block(ins, outs, stride), _Block(outs, outs, 1))
            self.add_module(f"layer{stage + 1}", blocks)
            ins = outs
        self.fc = nn.Linear(ins, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))


class _PlainBlock(nn.Module):
    """Two 3 x 3 convolutions; the shortcut drops every other pixel and adds channels of zeros (option A).

    It is written as the 1 x 1 convolution that does this, so that every importer knows it.
    """

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outs)
        self.conv2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.short: nn.Module = nn.Sequential()
        if ins != outs:
            self.short = nn.Conv2d(ins, outs, 1, stride, bias=False)
            first = (outs - ins) // 2
            self.short.weight.data.zero_()
            self.short.weight.data[first : first + ins, :, 0, 0] = torch.eye(ins)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.short(x))


class ResNet20(nn.Module):
    """ResNet-20 of He et al. 2016 for 32 x 32 images: widths 16, 32, 64, shortcuts without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        ins = 16
        for stage in range(3):
            outs, stride = 16 << stage, 1 if stage == 0 else 2
            blocks = [_PlainBlock(ins, outs, stride), _PlainBlock(outs, outs, 1), _PlainBlock(outs, outs, 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            ins = outs
        self.linear = nn.Linear(ins, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits."""
        x = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean(dim=(2, 3)))


class _InvertedResidual(nn.Module):
    """1 x 1 convolution to `expansion` times the channels, depthwise 3 x 3, 1 x 1 without activation."""

    def __init__(self, ins: int, outs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = ins * expansion
        layers = _unit(ins, hidden, 1) if expansion != 1 else []
        layers += _unit(hidden, hidden, 3, stride, groups=hidden)
        layers += [nn.Conv2d(hidden, outs, 1, bias=False), nn.BatchNorm2d(outs)]
        self.conv = nn.Sequential(*layers)
        self.residual = stride == 1 and ins == outs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer."""
        return x + self.conv(x) if self.residual else self.conv(x)


def _unit(ins: int, outs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(ins, outs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outs),
        nn.ReLU6(),
    ]


# (expansion, channels, blocks, stride of the first) of each stage: table 2 of the paper.
_MOBILENET_V2_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1 (Sandler et al. 2018): inverted residuals with ReLU6."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        layers, ins = _unit(3, 32, 3, 2), 32
        for expansion, outs, blocks, stride in _MOBILENET_V2_STAGES:
            for block in range(blocks):
                layers.append(_InvertedResidual(ins, outs, stride if block == 0 else 1, expansion))
                ins = outs
        self.features = nn.Sequential(*layers, *_unit(ins, 1280, 1))
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits."""
        return self.classifier(self.features(x).mean(dim=(2, 3)))


CIFAR, FASHION = (3, 32, 32), (1, 28, 28)
VGG_SIMPLE = [16, 16, "M", 32, 32, "M", 64, 64, "M"]
VGG13 = [16, 16, "M", 32, 32, "M", 64, 64, "M", 128, 128, "M", 128, 128, "M"]
LENET5 = [20, "M", 50, "M"]
_VGG_NOTE = (
    "The simplified VGG of Hubara et al. 2016 (convolutions 2x128-2x256-2x512, dense 2x1024) with an eighth "
    "of its channels and a quarter of its dense widths; few epochs. TOCO reports 90 % on CIFAR-10 at full "
    "width."
)
_LENET_NOTE = (
    "Convolutions 20-50 of 5 x 5, dense 500, on Fashion-MNIST; TOCO reports 99.3 % on MNIST, which is easier."
)

NETWORKS = {
    "vgg-simple": NetworkSpec(lambda: ConvNet(VGG_SIMPLE, [256, 256], CIFAR), "cifar10", 8, _VGG_NOTE),
    "vgg13": NetworkSpec(
        lambda: ConvNet(VGG13, [128, 128], CIFAR),
        "cifar10",
        7,
        "VGG-13 with a quarter of its channels (16 to 128) and dense layers of 128; few epochs. Fast LC "
        "shows its error on CIFAR-10 in a figure only.",
    ),
    "lenet5-fashion": NetworkSpec(
        lambda: ConvNet(LENET5, [500], FASHION, 5, 0, batch_norm=False),
        "fashion",
        12,
        _LENET_NOTE,
        learning_rate=0.05,
    ),
    "mlp16k-fashion": NetworkSpec(
        Mlp,
        "fashion",
        15,
        "15,949 parameters; TOCO compares with optimal brain damage on a two-layer MLP of 16,000.",
        learning_rate=0.05,
        weight_decay=1e-5,
    ),
    "vgg-simple-binaryconnect": NetworkSpec(
        lambda: ConvNet(VGG_SIMPLE, [256, 256], CIFAR, weights="binary"),
        "cifar10",
        8,
        _VGG_NOTE
        + " BinaryConnect at full width: 90.1 % (its authors). Here deterministic, weights of +-mean|w|.",
        optimizer="adam",
        learning_rate=3e-3,
        weight_decay=0.0,
        bits=1,
        deployed="vgg-simple",
    ),
    "vgg-simple-bnn": NetworkSpec(
        lambda: BinarizedNet(VGG_SIMPLE, [256, 256], CIFAR),
        "cifar10",
        8,
        _VGG_NOTE + " BNN at full width: 89.85 % (its authors).",
        optimizer="adam",
        learning_rate=5e-3,
        weight_decay=0.0,
        bits=1,
    ),
    "lenet5-fashion-binaryconnect": NetworkSpec(
        lambda: ConvNet(LENET5, [500], FASHION, 5, 0, batch_norm=False, weights="binary"),
        "fashion",
        12,
        _LENET_NOTE + " Deterministic BinaryConnect, weights of +-mean|w|.",
        optimizer="adam",
        learning_rate=2e-3,
        weight_decay=0.0,
        bits=1,
        deployed="lenet5-fashion",
    ),
    "lenet5-fashion-bnn": NetworkSpec(
        lambda: BinarizedNet(LENET5, [500], FASHION, 5, 0),
        "fashion",
        12,
        _LENET_NOTE,
        optimizer="adam",
        learning_rate=5e-3,
        weight_decay=0.0,
        bits=1,
    ),
}
