"""ONNX Runtime's static quantization for `quantization.py`: QDQ, weights per channel, the same images."""

import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import ResNet18, ResNet20
from quantization_others import CLASSIFIER, EFFICIENTNET, EfficientNetLite0, classifier_onnx
from quantization_training import Task

from tvm_compress.compression import model_policy
from tvm_compress.compressor import realize
from tvm_compress.model import Model
from tvm_compress.passes.params import get_params
from tvm_compress.twin import Twin

# How ONNX Runtime finds ranges: its default, and by KL.
METHODS = ("MinMax", "Entropy")
BATCH = 64
TORCH_NETWORKS = {"resnet20": ResNet20, "resnet18-w32": ResNet18, EFFICIENTNET: EfficientNetLite0}


def _export(task: Task, path: Path) -> None:
    """Write the float network: its own file, or a torch module with the weights that our module has."""
    import onnx.version_converter

    if task.name == CLASSIFIER:
        # Scales for each channel came with opset 13; the file has 11.
        onnx.save(onnx.version_converter.convert_version(classifier_onnx(), 13), str(path))
        return
    network = TORCH_NETWORKS[task.name]()
    state = {name: torch.from_numpy(value) for name, value in get_params(task.model.module).items()}
    unknown = network.load_state_dict(state, strict=False).unexpected_keys
    if unknown:
        raise SystemExit(f"The network has no {unknown[0]}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = (torch.zeros(2, *task.model.input_spec.shape[1:]),)
        dynamic = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(
            network.eval(), example, str(path), dynamo=True, dynamic_shapes=dynamic, verbose=False
        )


def _accuracy(path: Path, task: Task) -> tuple[float, np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name, x = session.get_inputs()[0].name, task.split.test.normalized()
    logits = [session.run(None, {name: x[i : i + BATCH]})[0] for i in range(0, len(x), BATCH)]
    answers = np.concatenate(logits).argmax(axis=1)
    return float(np.mean(answers == task.split.test.y)), answers


def quantize(task: Task, method: str, import_images: int) -> dict[str, Any]:
    """Quantize by ONNX Runtime, measure it, and read its file with our importer."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches: Iterator[np.ndarray] = iter(np.array_split(task.calibration, 16))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {name: batch}

    with tempfile.TemporaryDirectory() as folder:
        dense, ready, quantized = (Path(folder) / f"{kind}.onnx" for kind in ("dense", "ready", "qdq"))
        _export(task, dense)
        # On PaddlePaddle's file the symbolic inference of shapes stops with an assertion; the plain one does.
        quant_pre_process(str(dense), str(ready), skip_symbolic_shape=task.name == CLASSIFIER)
        name = onnx.load(str(ready)).graph.input[0].name
        quantize_static(
            str(ready),
            str(quantized),
            Images(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            # uint8 would saturate 16-bit sums on processors without VNNI: its documentation says so.
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, method),
        )
        before, _ = _accuracy(dense, task)
        accuracy, answers = _accuracy(quantized, task)
        return {
            "kind": "peer",
            "network": task.name,
            "peer": f"ONNX Runtime {onnxruntime.__version__}, {method}",
            "dense_accuracy": before,
            "accuracy": accuracy,
        } | _imported(quantized, task, answers, import_images)


def _imported(path: Path, task: Task, answers: np.ndarray, images: int) -> dict[str, Any]:
    """What our importer makes of ONNX Runtime's file: sites in integers, answers that agree."""
    spec = task.model.input_spec
    model = Model.from_onnx(path, mean=spec.mean, std=spec.std)
    policy = model_policy(model)
    assert policy is not None
    x = task.split.test.normalized(slice(0, images))
    agreed = Twin(realize(model.module)).predict(x).argmax(axis=1) == answers[:images]
    return {
        "imported_sites": len(policy.sites),
        "imported_integer_sites": sum(site.quantized for site in policy.sites.values()),
        "imported_agreement": float(agreed.mean()),
        "imported_images": images,
    }
