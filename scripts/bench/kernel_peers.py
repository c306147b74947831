"""Other runtimes beside our kernels, for `kernels.py`: timed on this machine, counted on the Cortex-A72.

A network is given to each in float32, or quantized: activations to 8 bits by what one image shows (to U8 for
ONNX Runtime, with which it is fast on x86), weights to 8 bits per channel.
"""

import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

WARM_UP = 5
# Gives, for a number of threads, a function that computes one inference.
Start = Callable[[int], Callable[[], Any]]
# (network, scheme): the peer with the least M estimated cycles, and these: of ONNX Runtime 1.22.1, LiteRT
# 2.0.2 (XNNPACK), ncnn and MNN 3.6.1, counted with the same emulator and block model, instructions only.
COUNTED = {
    ("ResNet-18 w64", "fp32"): ("ncnn", 58.9),
    ("ResNet-18 w64", "int8"): ("ncnn", 45.6),
    ("ResNet-18 w32", "fp32"): ("ncnn", 18.6),
    ("ResNet-18 w32", "int8"): ("ncnn", 13.4),
    ("ResNet-8 32x32x3", "fp32"): ("MNN", 2.35),
    ("ResNet-8 32x32x3", "int8"): ("ncnn", 2.08),
    ("MobileNetV2 96", "fp32"): ("ncnn", 18.8),
    ("MobileNetV2 96", "int8"): ("XNNPACK", 11.7),
    ("MobileNetV2 224", "fp32"): ("XNNPACK", 91.0),
    ("MobileNetV2 224", "int8"): ("XNNPACK", 61.6),
}


# Packages of each peer.
PACKAGES = {"ONNX Runtime": ("onnxruntime",), "XNNPACK": ("ai-edge-litert",)}


def versions(peer: str) -> str:
    """Packages of a peer with their versions; nothing where it is not installed, or is none of PACKAGES."""
    try:
        return ", ".join(f"{name} {version(name)}" for name in PACKAGES.get(peer, ()))
    except PackageNotFoundError:
        return ""


def fastest(run: Callable[[], Any], calls: int) -> float:
    """Fastest of so many calls, after some more: seconds."""
    times = []
    for _ in range(WARM_UP + calls):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[WARM_UP:])


def onnx_runtime(network: nn.Module, x: np.ndarray, scheme: str, folder: Path) -> Start:
    """ONNX Runtime, as its releases come."""
    import onnxruntime

    path = folder / "network.onnx"
    torch.onnx.export(network, (torch.from_numpy(x),), path, dynamo=True, external_data=False, verbose=False)
    if scheme == "int8":
        path = _quantized_onnx(path, x)

    def start(threads: int) -> Callable[[], Any]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: x}
        return lambda: session.run(None, feed)

    return start


def _quantized_onnx(path: Path, x: np.ndarray) -> Path:
    """Quantize statically: U8 activations, with which it is fast on x86, and weights per channel."""
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
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )
    return quantized


def xnnpack(network: nn.Module, x: np.ndarray, scheme: str, folder: Path) -> Start:
    """XNNPACK as LiteRT brings it along, which delegates to it whatever it can."""
    from ai_edge_litert.interpreter import Interpreter
    from kernel_tflite import write_tflite

    path = write_tflite(network, x, scheme, folder / "network.tflite")

    def start(threads: int) -> Callable[[], Any]:
        interpreter = Interpreter(str(path), num_threads=threads)
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x.transpose(0, 2, 3, 1))
        return interpreter.invoke

    return start


PEERS: dict[str, Callable[[nn.Module, np.ndarray, str, Path], Start]] = {
    "ONNX Runtime": onnx_runtime,
    "XNNPACK": xnnpack,
}
