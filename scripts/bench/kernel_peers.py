"""ONNX Runtime beside our kernels, for `kernels.py`: a network in fp32, and quantized by its own tools."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

WARM_UP = 10


def version() -> str:
    """Name and version, or nothing where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return ""
    return f"ONNX Runtime {onnxruntime.__version__}"


def sampler(
    module: torch.nn.Module, x: np.ndarray, scheme: str, threads: int, calls: int, folder: Path
) -> Callable[[], float] | None:
    """Function that starts ONNX Runtime, times its inferences and ends it: seconds. None without it."""
    if not version():
        return None
    import onnxruntime

    path = folder / "network.onnx"
    torch.onnx.export(module, (torch.from_numpy(x),), path, dynamo=True, external_data=False, verbose=False)
    if scheme == "int8":
        path = _quantized(path, x)

    def sample() -> float:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {session.get_inputs()[0].name: x}
        times = []
        for _ in range(WARM_UP + calls):
            start = time.perf_counter()
            session.run(None, feed)
            times.append(time.perf_counter() - start)
        return min(times[WARM_UP:])

    return sample


def _quantized(path: Path, x: np.ndarray) -> Path:
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
