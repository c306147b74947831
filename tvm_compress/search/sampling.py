"""Kernels to fit a latency model to: those of random policies, on given networks and on random ones."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tvm_compress.compressor import Compressor
from tvm_compress.errors import DataError
from tvm_compress.model import Model
from tvm_compress.passes.groups import find_coupled_sets
from tvm_compress.passes.pipeline import lower
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.passes.sites import find_sites
from tvm_compress.schedules.apply import KernelInfo, kernel_infos
from tvm_compress.schedules.target_rules import TargetRules, rules_for
from tvm_compress.search.latency import LatencyMeter
from tvm_compress.search.problem import PolicyDraft, SearchProblem

# So many networks are drawn in search of one with kernels: with random weights and a random policy, all that
# a layer gives may be 0, which has no range to quantize.
MOST_DRAWS = 100
# Random images that calibrate: latency does not depend on the ranges.
CALIBRATION_IMAGES = 4
# Random networks are drawn as often as given ones, each for some policies.
RANDOM_SHARE = 0.5
POLICIES_OF_A_NETWORK = 4
# Images larger than this are pooled before a random network flattens them.
LARGEST_FLATTENED = 4
# A random network's widths begin where a 3 x 3 convolution between two of them takes no more than this: wide
# networks of large images would take most of the time for a few kernels.
MOST_MACS = 20e6


@dataclass(frozen=True)
class _Subject:
    """A network that policies are drawn for."""

    compressor: Compressor
    problem: SearchProblem


def random_policy(problem: SearchProblem, rng: np.random.Generator) -> CompressionPolicy:
    """Policy with uniform actions; one in three keeps all channels, one in three is all in fp32."""
    draft = PolicyDraft(problem)
    left_alone = {0: ("pruning",), 1: ("activation", "weight")}.get(int(rng.integers(3)), ())
    names = [name for name in problem.actions if name not in left_alone]
    for site in problem.decision_sites():
        draft.decide(site, {name: float(rng.random()) for name in names})
    return draft.to_policy("random")


class KernelSampler:
    """Draws networks with random policies, and gives their kernels.

    Parameters
    ----------
    models
        Dense networks of the user; may be none, as random ones are drawn too.
    meter
        Whose target the kernels are for.
    """

    def __init__(self, models: Sequence[Model], meter: LatencyMeter, seed: int = 0) -> None:
        self._target = meter.target
        self._rng = np.random.default_rng(seed)
        self._subjects = [self._subject(model) for model in models]
        self._random: tuple[_Subject, int] | None = None

    def draw(self) -> list[KernelInfo]:
        """Kernels of a network that was not drawn before, most likely.

        Raises
        ------
        DataError
            If no network could be quantized, of MOST_DRAWS.
        """
        for _ in range(MOST_DRAWS - 1):
            with contextlib.suppress(DataError):
                return self._draw()
            self._random = None
        return self._draw()

    def _draw(self) -> list[KernelInfo]:
        if self._subjects and self._rng.random() >= RANDOM_SHARE:
            subject = self._subjects[int(self._rng.integers(len(self._subjects)))]
        else:
            subject = self._random_subject()
        candidate = subject.compressor.apply(random_policy(subject.problem, self._rng))
        return kernel_infos(lower(candidate.integer_module, self._target), self._target)

    def _random_subject(self) -> _Subject:
        subject, left = self._random or (self._subject(random_network(self._rng)), POLICIES_OF_A_NETWORK)
        self._random = (subject, left - 1) if left > 1 else None
        return subject

    def _subject(self, model: Model) -> _Subject:
        return _Subject(*subject_of(model, rules_for(self._target), self._rng))


def subject_of(
    model: Model, rules: TargetRules, rng: np.random.Generator
) -> tuple[Compressor, SearchProblem]:
    """What policies need that are drawn for their latency alone: no data, no sensitivities."""
    x = rng.normal(size=(CALIBRATION_IMAGES, *model.input_spec.shape[1:])).astype(np.float32)
    problem = SearchProblem(
        sites=find_sites(model.module),
        sets=find_coupled_sets(model.module),
        agent="joint",
        bitserial_rule=rules.bitserial_legal,
        rounding=8,
        criterion="l1",
    )
    return Compressor(model.module, x, None), problem


def random_network(rng: np.random.Generator) -> Model:
    """Convolutional network of random widths, for images of 8 to 64 pixels.

    Its blocks are plain, residual or inverted residual, and it ends as residual networks do or as VGG.
    """
    size = int(rng.choice([8, 12, 16, 24, 28, 32, 48, 64]))
    inputs = int(rng.choice([1, 3]))
    with torch.random.fork_rng():
        torch.manual_seed(int(rng.integers(2**31)))
        body, width, left = _random_body(inputs, size, rng)
        network = nn.Sequential(*body, *_random_head(width, left, rng)).eval()
    return Model.from_torch(network, (torch.zeros(1, inputs, size, size),))


def _random_body(inputs: int, size: int, rng: np.random.Generator) -> tuple[list[nn.Module], int, int]:
    """Convolutions; the channels and the image size that they end with."""
    widest = int((MOST_MACS / 9) ** 0.5 / size)
    width = 8 * int(rng.integers(1, 1 + widest // 8))
    layers: list[nn.Module] = [*_layer(inputs, width, 3, 1)]
    for _ in range(int(rng.integers(2, 4))):
        wider = min(256, width + 8 * int(rng.integers(0, 1 + width // 8)))
        stride = int(rng.integers(1, 3))
        block = rng.choice(["plain", "residual", "inverted"], p=[0.4, 0.4, 0.2])
        if block == "plain":
            layers += _layer(width, wider, int(rng.choice([1, 3, 3, 5])), 1)
            layers += [nn.MaxPool2d(2)] if stride == 2 else []
            size //= stride
        elif block == "residual":
            layers.append(_Residual(width, wider, stride))
            size = -(-size // stride)
        else:
            layers.append(_inverted(width, wider, stride, int(rng.choice([1, 3, 6]))))
            size = -(-size // stride)
        width = wider
    return layers, width, size


def _random_head(width: int, size: int, rng: np.random.Generator) -> list[nn.Module]:
    """Mean or pooling and flattening, then one or two dense layers."""
    head: list[nn.Module] = []
    if rng.random() < 0.5:
        head += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    else:
        while size > LARGEST_FLATTENED:
            head.append(nn.MaxPool2d(2))
            size //= 2
        head.append(nn.Flatten())
        width *= size * size
    if rng.random() < 0.7:
        hidden = 32 * int(rng.integers(1, 9))
        head += [nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    return [*head, nn.Linear(width, int(rng.choice([10, 100])))]


def _layer(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def _inverted(inputs: int, outputs: int, stride: int, expansion: int) -> nn.Sequential:
    """MobileNetV2's block (Sandler et al. 2018) without its shortcut: wider, each channel alone, narrower."""
    wide = inputs * expansion
    alone = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
    return nn.Sequential(
        *([*_layer(inputs, wide, 1, 1)[:-1], nn.ReLU6()] if expansion > 1 else []),
        alone,
        nn.BatchNorm2d(wide),
        nn.ReLU6(),
        *_layer(wide, outputs, 1, 1)[:-1],
    )


class _Residual(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(*_layer(inputs, outputs, 3, stride), *_layer(outputs, outputs, 3, 1)[:-1])
        self.short: nn.Module = nn.Identity()
        if inputs != outputs or stride > 1:
            self.short = nn.Sequential(*_layer(inputs, outputs, 1, stride)[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of both, rectified."""
        return torch.relu(self.main(x) + self.short(x))
