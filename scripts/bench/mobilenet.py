"""MobileNetV2 (width 1, random weights) in fp32 and INT8, on this machine and on the emulated Cortex-A72.

usage: python scripts/bench/mobilenet.py --json PATH [--quick] [--seeds N] [--before TREE]

`--before` names a checkout of an earlier version: its libraries are timed interleaved with this one's.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from figures import Figure, write
from networks import MobileNetV2

from tvm_compress.calibration import calibrate
from tvm_compress.compression import compressed_model, uniform_policy
from tvm_compress.compressor import realize
from tvm_compress.model import Model
from tvm_compress.passes.pipeline import build, compress
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import MeasurementSettings, Session, open_device
from tvm_compress.rpc.measure import measure
from tvm_compress.schedules.apply import KernelInfo
from tvm_compress.schedules.target_rules import parse_target
from tvm_compress.twin import Twin

DEVICES = {"local": "host", "emulated-a72": "raspberry-pi/4b-aarch64"}
SCHEMES = ("fp32", "int8")
# M cycles of the fastest of ONNX Runtime, XNNPACK, ncnn and MNN, counted with the same emulator and block
# model, without the memory term.
PEERS = {(96, "fp32"): 18.8, (96, "int8"): 11.7, (224, "fp32"): 91.0, (224, "int8"): 61.6}
PEER = "counted: fastest of ONNX Runtime 1.22.1, LiteRT 2.0.2, ncnn, MNN 3.6.1, instructions only"
IMAGES = 2


def models(size: int, seed: int) -> dict[str, Model]:
    """Give the float network and its INT8 form."""
    torch.manual_seed(seed)
    network = MobileNetV2().eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
    dense = Model.from_torch(network, (torch.zeros(1, 3, size, size),))
    policy = uniform_policy(dense, target="host", weight_bits=8, activation_bits=8)
    module = compress(dense.module, policy, calibration=lambda m: calibrate(m, images(size, seed)))
    return {"fp32": dense, "int8": compressed_model(dense, policy, module)}


def images(size: int, seed: int) -> np.ndarray:
    """Normalised random images [N, 3, size, size]."""
    return np.random.default_rng(seed).standard_normal((IMAGES, 3, size, size)).astype(np.float32)


def build_libraries(
    folder: Path, size: int, seed: int, devices: list[str]
) -> tuple[dict[str, Model], dict[str, list[KernelInfo]]]:
    """Write `SCHEME-DEVICE.so` for each scheme and device; give the models and the libraries' kernels."""
    built = models(size, seed)
    kernels = {}
    for scheme, model in built.items():
        for device in devices:
            target = parse_target(DEVICES[device])
            compiled = build(realize(model.module), target)
            name = f"{scheme}-{device}"
            compiled.export(folder / f"{name}.so", export_fcompile(str(target.attrs.get("mtriple", ""))))
            kernels[name] = compiled.kernels
    return built, kernels


def build_before(tree: Path, folder: Path, size: int, seed: int, devices: list[str]) -> None:
    """Have another checkout's package write the libraries into `folder`."""
    command = [sys.executable, __file__, "--only-build", str(folder), str(size), str(seed), *devices]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(tree)})


def verify(session: Session, library: Path, model: Model, scheme: str, x: np.ndarray) -> float:
    """Largest difference from the twin's logits, relative to the largest logit."""
    expected = Twin(realize(model.module)).predict(x)
    found = np.concatenate([out for (out,) in session.run_many(library, [[one[None]] for one in x])])
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if scheme == "int8" and difference:
        # The integers are the same; the last step may round a float differently.
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    return difference


def kind_of(info: KernelInfo | None) -> str:
    """Depthwise, 1x1, another site, or the rest."""
    if info is None or "is_conv2d" not in info.features or info.kind == "elementwise":
        return "rest"
    if info.features["groups"] > 1:
        return "depthwise"
    if info.features["is_conv2d"]:
        return "1x1" if info.features["KH"] == 1 else "first"
    return "dense"


def by_kind(kernels: list[KernelInfo], breakdown: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Cycles and multiply-accumulates by kind of kernel; a part of a kernel's code bears its name."""
    found: dict[str, dict[str, float]] = {}
    macs: dict[str, float] = {}
    for info in kernels:
        macs[kind_of(info)] = macs.get(kind_of(info), 0.0) + info.features["macs"] * info.count
    for name, part in breakdown.items():
        info = next((k for k in kernels if name in (k.name, f"{k.name}_compute_")), None)
        kind = found.setdefault(kind_of(info), {"cycles": 0.0, "compute_cycles": 0.0, "memory_cycles": 0.0})
        for key in kind:
            kind[key] += part[key]
    for name, kind in found.items():
        kind["macs"] = macs.get(name, 0.0)
        kind["macs_per_cycle"] = kind["macs"] / kind["compute_cycles"] if kind["compute_cycles"] else 0.0
    return found


def measure_size(
    size: int, seed: int, before: Path | None, devices: list[str], repeat: int
) -> list[dict[str, Any]]:
    """All of one input size and one seed."""
    data = []
    with tempfile.TemporaryDirectory() as directory:
        folder, earlier = Path(directory), Path(directory) / "before"
        built, kernels = build_libraries(folder, size, seed, devices)
        if before is not None:
            earlier.mkdir()
            build_before(before, earlier, size, seed, devices)
        x = images(size, seed)
        for device in devices:
            libraries = {scheme: folder / f"{scheme}-{device}.so" for scheme in SCHEMES}
            if before is not None:
                libraries |= {f"{scheme} before": earlier / f"{scheme}-{device}.so" for scheme in SCHEMES}
            settings = MeasurementSettings(warmup=2, repeat=repeat, min_repeat_ms=30, timeout_s=280)
            if device != "local":
                settings = MeasurementSettings(warmup=0, repeat=1, min_repeat_ms=0, timeout_s=280)
            with open_device(device).open(settings) as session:
                errors = {s: verify(session, libraries[s], built[s], s, x) for s in SCHEMES}
                found = {}
                for scheme in SCHEMES:
                    some = {n: path for n, path in libraries.items() if n.startswith(scheme)}
                    found |= measure(session, some, [x[:1]], reference=scheme)
            for name, one in found.items():
                scheme, _, version = name.partition(" ")
                if not one.result.ok:
                    raise SystemExit(f"{name} at {size} on {device}: {one.result.error}")
                row: dict[str, Any] = {
                    "size": size, "seed": seed, "device": device, "scheme": scheme,
                    "version": version or "this", "value": one.result.value, "unit": one.result.unit,
                    "spread": one.result.spread, "ratio": one.ratio, "error": errors[scheme],
                }  # fmt: skip
                if one.result.breakdown and not version:
                    parts = by_kind(kernels[f"{scheme}-{device}"], one.result.breakdown)
                    row["kinds"] = parts
                    row["compute_cycles"] = sum(part["compute_cycles"] for part in parts.values())
                data.append(row)
    return data


def figures_of(data: list[dict[str, Any]]) -> list[Figure]:
    """Cycles against the fastest peer, and times against the earlier version."""
    found = []
    for size, scheme in PEERS:
        rows = [d for d in data if (d["size"], d["scheme"]) == (size, scheme)]
        name = f"MobileNetV2 {size} {scheme}"
        emulated = [d for d in rows if d["device"] != "local" and d["version"] == "this"]
        if emulated:
            cycles = float(np.median([d["compute_cycles"] for d in emulated])) / 1e6
            whole = float(np.median([d["value"] for d in emulated])) / 1e6
            found.append(
                Figure(
                    f"{name}: estimated Cortex-A72 cycles (emulated), instructions only",
                    cycles,
                    "M",
                    PEERS[size, scheme],
                    "<=",
                    PEER,
                    f"with memory {whole:.1f} M",
                )
            )
        for device in DEVICES:
            ratios = [d["ratio"] for d in rows if d["device"] == device and d["version"] == "before"]
            values = [d["value"] for d in rows if d["device"] == device and d["version"] == "this"]
            if not ratios:
                continue
            what = "time" if device == "local" else "estimated Cortex-A72 cycles (emulated)"
            value = float(np.median(values))
            note = f"{value * 1e3:.2f} ms now" if device == "local" else f"{value / 1e6:.1f} M now"
            found.append(
                Figure(
                    f"{name}: {what}, this over before",
                    1 / float(np.median(ratios)),
                    "ratio",
                    1.0,
                    "<=",
                    "",
                    note,
                )
            )
    worst = max((d["error"] for d in data if d["scheme"] == "fp32"), default=math.nan)
    found.append(Figure("largest error of fp32 logits against the twin", worst, "relative", 1e-4, "<="))
    return found


def main() -> None:
    """Run and write."""
    if "--only-build" in sys.argv:
        folder, size, seed, *devices = sys.argv[sys.argv.index("--only-build") + 1 :]
        build_libraries(Path(folder), int(size), int(seed), devices)
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("mobilenet.json"))
    parser.add_argument("--quick", action="store_true", help="only 96 x 96 images")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--before", type=Path, help="checkout of an earlier version")
    arguments = parser.parse_args()
    sizes = (96,) if arguments.quick else (96, 224)
    data = []
    for seed in range(arguments.seeds):
        for size in sizes:
            data += measure_size(size, seed, arguments.before, list(DEVICES), 11)
    settings = {"quick": arguments.quick, "seeds": arguments.seeds, "threads": 1}
    write(arguments.json, "mobilenet", settings, figures_of(data), data)


if __name__ == "__main__":
    main()
