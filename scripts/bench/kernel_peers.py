"""Other runtimes beside our kernels, for `kernels.py`: how each gets a network's file, and their times.

A network is given to each in float32, or quantized: activations to 8 bits by what one image shows (to U8 for
ONNX Runtime on x86, where it is fast with them), weights to 8 bits per channel. `kernel_peer_run.py` starts
them.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernel_peer_run import START
from torch import nn

WARM_UP = 5
# Gives, for a number of threads, a function that computes one inference.
Start = Callable[[int], Callable[[], Any]]


@dataclass(frozen=True)
class Peer:
    """Another runtime.

    Parameters
    ----------
    packages
        That it needs; the first of them runs.
    write
        Gives the file that it takes: of a network, an input, a scheme and a device, in a folder.
    schemes
        That it is compared in.
    """

    packages: tuple[str, ...]
    write: Callable[[nn.Module, np.ndarray, str, str, Path], Path]
    schemes: tuple[str, ...] = ("fp32", "int8")


def versions(peer: str) -> str:
    """Packages of a peer with their versions; nothing where one is not installed, or it is none of PEERS."""
    try:
        packages = PEERS[peer].packages if peer in PEERS else ()
        return ", ".join(f"{name} {version(name)}" for name in packages)
    except PackageNotFoundError:
        return ""


def installed(scheme: str) -> dict[str, Peer]:
    """Peers that are here and know the scheme."""
    return {name: peer for name, peer in PEERS.items() if versions(name) and scheme in peer.schemes}


def fastest(run: Callable[[], Any], calls: int) -> float:
    """Fastest of so many calls, after some more: seconds."""
    times = []
    for _ in range(WARM_UP + calls):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[WARM_UP:])


def start_peer(name: str, network: nn.Module, x: np.ndarray, scheme: str, folder: Path) -> Start:
    """Write a peer's file for this machine and make it ready to run."""
    path = PEERS[name].write(network, x, scheme, "local", folder)
    return lambda threads: START[name](path, x, threads)


def _write_onnx(network: nn.Module, x: np.ndarray, scheme: str, device: str, folder: Path) -> Path:
    path = folder / "network.onnx"
    torch.onnx.export(network, (torch.from_numpy(x),), path, dynamo=True, external_data=False, verbose=False)
    return path if scheme == "fp32" else _quantized_onnx(path, x, device)


def _quantized_onnx(path: Path, x: np.ndarray, device: str) -> Path:
    """Quantize statically, weights per channel; activations U8 on x86, where that is fast, else S8."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ready, quantized = (path.with_name(f"{kind}.onnx") for kind in ("ready", "quantized"))
    quant_pre_process(str(path), str(ready))
    name = onnx.load(str(ready)).graph.input[0].name

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches: Iterator[np.ndarray] = iter([x])

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {name: batch}

    quantize_static(
        str(ready),
        str(quantized),
        Images(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8 if device == "local" else QuantType.QInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return quantized


def _write_tflite(network: nn.Module, x: np.ndarray, scheme: str, device: str, folder: Path) -> Path:
    from kernel_tflite import write_tflite

    return write_tflite(network, x, scheme, folder / "network.tflite")


def _write_ncnn(network: nn.Module, x: np.ndarray, scheme: str, device: str, folder: Path) -> Path:
    from kernel_ncnn import write_ncnn

    return write_ncnn(network, x, scheme, folder)


def _write_mnn(network: nn.Module, x: np.ndarray, scheme: str, device: str, folder: Path) -> Path:
    """Convert the ONNX file; the network's names of inputs and outputs lie beside it."""
    import _tools
    import onnx

    source = _write_onnx(network, x, "fp32", device, folder)
    path = folder / "network.mnn"
    command = ["mnnconvert", "-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(path)]
    _tools.mnnconvert([*command, "--bizCode", "bench"])
    graph = onnx.load(str(source)).graph
    names = {"inputs": [i.name for i in graph.input], "outputs": [o.name for o in graph.output]}
    path.with_suffix(".json").write_text(json.dumps(names))
    return path


def _write_torch(network: nn.Module, x: np.ndarray, scheme: str, device: str, folder: Path) -> Path:
    path = folder / "network.pt"
    torch.save(network, path)
    return path


PEERS = {
    "ONNX Runtime": Peer(("onnxruntime",), _write_onnx),
    "XNNPACK": Peer(("ai-edge-litert",), _write_tflite),
    "ncnn": Peer(("ncnn", "pnnx"), _write_ncnn),
    "MNN": Peer(("MNN",), _write_mnn, schemes=("fp32",)),
    "torch": Peer(("torch",), _write_torch, schemes=("fp32",)),
}
