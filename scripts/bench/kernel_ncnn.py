"""Writes a network as ncnn takes it, in float32 or INT8, so that it can be a peer (`kernel_peers.py`).

pnnx converts. ncnn's own tools for INT8 are not in its wheels: this writes what its loader wants, weights in
float32 with scales behind them, from which it quantizes when it loads.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

# Layers with INT8 kernels, and where each has its output channels, its number of weights, and "has a bias".
_QUANTIZED = {
    "Convolution": ("0", "6", "5"),
    "ConvolutionDepthWise": ("0", "6", "5"),
    "InnerProduct": ("0", "2", "1"),
}
_TERM = "8"
# ncnn holds weights of 3 x 3 convolutions of stride 1 in 6 bits, so that Winograd's fit into 16.
_LARGEST, _LARGEST_WINOGRAD = 127, 31
_LEAST = 1e-9


@dataclass
class _Layer:
    """A line of the .param file."""

    type: str
    name: str
    inputs: list[str]
    outputs: list[str]
    settings: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, line: str) -> "_Layer":
        kind, name, ins, outs, *rest = line.split()
        first, second = int(ins), int(ins) + int(outs)
        settings = dict(setting.split("=", 1) for setting in rest[second:])
        return cls(kind, name, rest[:first], rest[first:second], settings)

    def __str__(self) -> str:
        counts = (str(len(self.inputs)), str(len(self.outputs)))
        settings = (f"{key}={value}" for key, value in self.settings.items())
        return " ".join((self.type, self.name, *counts, *self.inputs, *self.outputs, *settings))


def write_ncnn(network: nn.Module, x: np.ndarray, scheme: str, folder: Path) -> Path:
    """Write a network of one input [1, C, H, W]; give its .param file, the .bin file lies beside it.

    Parameters
    ----------
    x
        The input that ranges follow from.
    scheme
        "fp32" or "int8"; inputs and outputs are float32 in either.
    """
    import pnnx

    image = torch.from_numpy(x)
    pnnx.export(network, str(folder / "network.pt"), inputs=(image,), fp16=False)
    path = folder / "network.ncnn.param"
    return path if scheme == "fp32" else _quantize(path, x)


def _quantize(path: Path, x: np.ndarray) -> Path:
    head = path.read_text().splitlines()[:2]
    layers = [_Layer.read(line) for line in path.read_text().splitlines()[2:] if line.strip()]
    largest = _largest(path, layers, x)
    content = path.with_suffix(".bin").read_bytes()
    parts: list[bytes] = []
    at = 0
    for layer in layers:
        if layer.type not in _QUANTIZED:
            continue
        channels, weights, bias = (int(layer.settings.get(key, 0)) for key in _QUANTIZED[layer.type])
        # Four bytes say that the weights are float32; the bias has no such mark.
        size = 4 + 4 * weights + 4 * channels * bias
        kernel = np.frombuffer(content, "<f4", weights, at + 4).reshape(channels, -1)
        scales = _weight_limit(layer) / np.maximum(np.abs(kernel).max(1), _LEAST)
        known = [127 / max(largest[layer.inputs[0]], _LEAST)]
        term = 1 if layer.type == "ConvolutionDepthWise" else 2
        if _stays_int8(layer, layers):
            term += 100
            known.append(127 / max(largest[layer.outputs[0]], _LEAST))
        layer.settings[_TERM] = str(term)
        parts += [content[at : at + size], scales.astype("<f4").tobytes(), np.array(known, "<f4").tobytes()]
        at += size
    if at != len(content):
        raise RuntimeError(f"{path.name}: {len(content) - at} bytes of the weights are of unknown layers.")
    quantized = path.with_name("quantized.ncnn.param")
    quantized.write_text("\n".join([*head, *map(str, layers)]) + "\n")
    quantized.with_suffix(".bin").write_bytes(b"".join(parts))
    return quantized


def _weight_limit(layer: _Layer) -> int:
    is_winograd = layer.type == "Convolution" and layer.settings.get("1") == "3"
    return _LARGEST_WINOGRAD if is_winograd and layer.settings.get("3", "1") == "1" else _LARGEST


def _largest(path: Path, layers: list[_Layer], x: np.ndarray) -> dict[str, float]:
    """Largest magnitude of every blob on one image."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = 1
    net.load_param(str(path))
    net.load_model(str(path.with_suffix(".bin")))
    extractor = net.create_extractor()
    extractor.set_light_mode(False)
    extractor.input("in0", ncnn.Mat(x[0]))
    names = [name for layer in layers for name in layer.outputs]
    found = {name: float(np.abs(np.array(extractor.extract(name)[1])).max()) for name in names}
    return found | {"in0": float(np.abs(x).max())}


def _stays_int8(layer: _Layer, layers: list[_Layer]) -> bool:
    """Whether only convolutions read what a convolution gives, so that it may requantize at once."""
    readers = list(_readers(layer.outputs[0], layers))
    is_convolution = [reader.type.startswith("Convolution") for reader in (layer, *readers)]
    return len(readers) > 0 and all(is_convolution)


def _readers(blob: str, layers: list[_Layer]) -> Iterator[_Layer]:
    """Layers that read a blob, through copies of it."""
    for layer in layers:
        if blob not in layer.inputs:
            continue
        if layer.type != "Split":
            yield layer
        for copy in layer.outputs if layer.type == "Split" else ():
            yield from _readers(copy, layers)
