"""Small torch networks, and what the tests of the passes do with them."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import tvm
from torch import nn
from tvm import IRModule, relax
from tvm.relax.frontend.torch import from_exported_program

from tvm_compress.passes.canonicalize import Canonicalize
from tvm_compress.passes.graph import bindings, substitute
from tvm_compress.passes.params import bind_params


class Sequential(nn.Module):
    """Convolutions with bias, ReLU6, pools, batch norm, flatten, two linear layers; (3, 8, 8) to 10."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU6(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Dropout(),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


class Block(nn.Module):
    """A residual block, with a 1x1 shortcut where the shape changes."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outs)
        self.conv2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.shortcut = nn.Sequential()
        if stride != 1 or ins != outs:
            self.shortcut = nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class Residual(nn.Module):
    """A small ResNet: stem, two blocks, global average pooling, linear; (3, 8, 8) to 10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = Block(8, 8, 1)
        self.layer2 = Block(8, 16, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.flatten(self.pool(self.layer2(self.layer1(x))), 1))


class Branches(nn.Module):
    """Depthwise convolution, squeeze-and-excite, concatenation, hard-swish, SiLU; (3, 8, 8) to 5."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8, affine=False)
        self.gate = nn.Conv2d(8, 8, 1)
        self.side = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(20, 5)
        self.fc_bn = nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = nn.functional.hardswish(self.stem(x))
        b = self.bn(self.depthwise(a))
        b = b * torch.sigmoid(self.gate(b.mean((2, 3), keepdim=True)))
        c = nn.functional.silu(torch.cat([a, b, self.side(x)], 1))
        c = nn.functional.adaptive_avg_pool2d(c, (1, 1)).squeeze(-1).squeeze(-1)
        return torch.softmax(self.fc_bn(self.fc(c)), 1)


class Gated(nn.Module):
    """Blocks of MobileNetV3: hard-swish around depthwise layers, squeeze-and-excite; (3, 8, 8) to 5."""

    def __init__(self, gate: Callable[[torch.Tensor], torch.Tensor] = nn.functional.hardsigmoid) -> None:
        super().__init__()
        self.gate = gate
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.expand = nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32))
        self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32))
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.project = nn.Sequential(nn.Conv2d(32, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.last = nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32))
        self.hidden, self.fc = nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        swish, pool = nn.functional.hardswish, nn.functional.adaptive_avg_pool2d
        x = swish(self.stem(x))
        y = self.depthwise(swish(self.expand(x)))
        y = y * self.gate(self.excite(torch.relu(self.squeeze(pool(y, 1)))))
        x = x + self.project(swish(y))
        x = pool(swish(self.last(x)), 1).flatten(1)
        return self.fc(swish(self.hidden(x)))


@dataclass(frozen=True)
class Example:
    """A torch network and what it was imported as."""

    network: nn.Module
    imported: IRModule
    module: IRModule
    x: np.ndarray

    def expected(self, x: np.ndarray | None = None) -> np.ndarray:
        with torch.no_grad():
            return self.network(torch.from_numpy(self.x if x is None else x)).numpy()


def import_torch(network: nn.Module, shape: tuple[int, ...] = (1, 3, 8, 8)) -> IRModule:
    """Give TVM's import of a network, its parameters renamed to torch's names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(network.eval(), (torch.zeros(shape),))
        module = from_exported_program(program, keep_params_as_input=True, unwrap_unit_return_tuple=True)
    names = {"p_" + name.replace(".", "_"): name for name in network.state_dict()}
    function = module["main"]
    params = [relax.Var(names.get(var.name, var.name), var.ty) for var in function.params]
    replaced: dict = dict(zip(function.params, params, strict=True))
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            for var, value in bindings(function):
                replaced[var] = builder.emit(substitute(value, replaced))
            output = builder.emit_output(replaced[function.body.body])
        builder.emit_func_output(output)
    return tvm.IRModule({"main": builder.finalize()["main"].with_attrs(dict(function.attrs))})


def example(network: nn.Module, seed: int = 0) -> Example:
    """Import a network with random statistics in its batch norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2.0, generator=generator)
            elif value.dtype == torch.float32:
                value.normal_(0.0, 0.3, generator=generator)
    imported = import_torch(network)
    x = np.random.default_rng(seed).normal(size=(1, 3, 8, 8)).astype(np.float32)
    return Example(network, imported, Canonicalize()(imported), x)


def run(module: IRModule, x: np.ndarray) -> np.ndarray:
    """Run a float module as TVM compiles it without us."""
    executable = relax.build(bind_params(module), "llvm")
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()
