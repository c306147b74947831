"""Starts other runtimes on a network's file; as a program, lets the emulator count one inference.

usage, in an emulated aarch64 Python under the counting plugin:
    kernel_peer_run.py PEER FILE INPUT.npy SAID.json

That Python has numpy and the runtimes and nothing else, so this file imports neither torch nor tvm_compress.
"""

import ctypes
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# As in tvm_compress/rpc/native/counting.h.
_SYSCALL, _CODE, _DATA, _BEGIN, _WARM, _END = 0xA72, 1, 2, 3, 4, 5
# By peer that has an aarch64 wheel without CUDA: the module to import, and the library of it that computes.
MODULES = {
    "ONNX Runtime": ("onnxruntime", "onnxruntime_pybind11_state"),
    "XNNPACK": ("ai_edge_litert.interpreter", "libpywrap_litert_common"),
    "ncnn": ("ncnn", "ncnn.cpython"),
    "MNN": ("MNN.nn", "_mnncengine"),
}


def onnx_runtime(path: Path, x: np.ndarray, threads: int) -> Callable[[], Any]:
    """ONNX Runtime, as its releases come."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    return lambda: session.run(None, feed)


def xnnpack(path: Path, x: np.ndarray, threads: int) -> Callable[[], Any]:
    """XNNPACK as LiteRT brings it along, which delegates to it whatever it can."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=threads)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x.transpose(0, 2, 3, 1))
    return interpreter.invoke


def ncnn(path: Path, x: np.ndarray, threads: int) -> Callable[[], Any]:
    """A .param file of ncnn with the .bin file beside it."""
    extractor = _ncnn_extractor(path, x, threads)
    return lambda: extractor().extract("out0")[1]


def ncnn_by_layer(path: Path, x: np.ndarray, after: Callable[[], None]) -> Callable[[], None]:
    """Like `ncnn` with one thread, but calls `after` behind each layer."""
    extractor = _ncnn_extractor(path, x, 1)
    lines = [line.split() for line in path.read_text().splitlines()[2:]]
    results = [parts[4 + int(parts[2])] for parts in lines if parts and parts[0] != "Input"]

    def run() -> None:
        running = extractor()
        for blob in results:
            # As it is, without unpacking its channels.
            running.extract(blob, 1)
            after()

    return run


def _ncnn_extractor(path: Path, x: np.ndarray, threads: int) -> Callable[[], Any]:
    """Gives, at each call, what computes one inference."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    net.opt.use_vulkan_compute = False
    net.load_param(str(path))
    net.load_model(str(path.with_suffix(".bin")))
    image = ncnn.Mat(x[0])

    def make() -> Any:
        extractor = net.create_extractor()
        extractor.input("in0", image)
        return extractor

    return make


def mnn(path: Path, x: np.ndarray, threads: int) -> Callable[[], Any]:
    """MNN, in full float32."""
    from MNN import expr, nn

    settings = {"precision": "high", "backend": "CPU", "numThread": threads}
    manager = nn.create_runtime_manager((settings,))
    names = json.loads(path.with_suffix(".json").read_text())
    network = nn.load_module_from_file(str(path), names["inputs"], names["outputs"], runtime_manager=manager)
    image = expr.const(x, list(x.shape), expr.NCHW)
    return lambda: network.forward(image).read()


def torch(path: Path, x: np.ndarray, threads: int) -> Callable[[], Any]:
    """The network itself, in torch."""
    import torch

    network, image = torch.load(path, weights_only=False), torch.from_numpy(x)
    torch.set_num_threads(threads)

    def run() -> Any:
        with torch.inference_mode():
            return network(image)

    return run


START: dict[str, Callable[[Path, np.ndarray, int], Callable[[], Any]]] = {
    "ONNX Runtime": onnx_runtime,
    "XNNPACK": xnnpack,
    "ncnn": ncnn,
    "MNN": mnn,
    "torch": torch,
}


def _mappings() -> list[tuple[int, int, str]]:
    """First address, address after the last, and file of everything that is mapped."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split()
        first, last = (int(address, 16) for address in fields[0].split("-"))
        found.append((first, last, fields[5] if len(fields) > 5 else ""))
    return found


def main() -> None:
    """Count one inference after another; say which library computed, and where it was loaded.

    The first file of counts is of the whole network; those of layers follow, where a peer tells of them.
    """
    peer, path, inputs, said = sys.argv[1:]
    x = np.load(inputs)
    call = ctypes.CDLL(None).syscall
    call.argtypes = [ctypes.c_long] * 4

    def tell(command: int, first: int = 0, second: int = 0) -> None:
        call(_SYSCALL, command, first, second)

    module, library = MODULES[peer]
    importlib.import_module(module)
    # Before anything of it has computed: what the emulator translated earlier would not count.
    own = [m for m in _mappings() if library in m[2]]
    base = min(first for first, _, _ in own)
    tell(_CODE, base, max(last for _, last, _ in own))
    run = START[peer](Path(path), x, 1)
    run()
    # All that is mapped below the stack, with room for what is allocated later.
    tell(_DATA, 0, max(last for _, last, name in _mappings() if name and "[" not in name) + (1 << 30))
    tell(_BEGIN)
    run()
    tell(_WARM)
    run()
    tell(_END, 0)
    layers = 0

    def next_layer() -> None:
        nonlocal layers
        layers += 1
        tell(_END, layers)
        tell(_WARM)

    if peer == "ncnn":
        run = ncnn_by_layer(Path(path), x, next_layer)
        run()
        layers = 0
        tell(_WARM)
        run()
    Path(said).write_text(json.dumps({"library": own[0][2], "base": base, "layers": layers}))


if __name__ == "__main__":
    main()
