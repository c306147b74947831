"""What hard-swish costs behind an INT8 convolution: as a table in vectors, value by value, and in float.

usage: python scripts/bench/tables.py [--json FILE] [--quick] [--seeds N]

A 1x1 convolution of 40 to 240 channels at 28x28 with requantization to 8 bits, alone and with what follows.
Weights and data are random: they change no time. `--quick` takes fewer samples on this machine.
"""

import argparse
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import tvm
from figures import Figure, write
from tvm import relax

from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import MeasurementSettings, open_device
from tvm_compress.rpc.measure import measure
from tvm_compress.schedules import ops, table
from tvm_compress.schedules.apply import lower_to_kernels
from tvm_compress.schedules.target_rules import parse_target

ROOT = Path(__file__).resolve().parents[2]
DEVICES = {"local": "host", "emulated-a72": "raspberry-pi/4b-aarch64"}
SIZE, INPUTS, OUTPUTS = 28, 40, 240
# Reals of 8 bits before and after the function.
SCALE, RESULT_SCALE, RESULT_ZERO = 12 / 255, 6.5 / 255, -113
FORMS = ("without", "table", "value by value", "float")


def hard_swish(x: np.ndarray) -> np.ndarray:
    """Give x * clip(x + 3, 0, 6) / 6."""
    return x * np.clip(x + 3, 0, 6) / 6


def emit(builder: relax.BlockBuilder, sums: relax.Var, form: str, rng: np.random.Generator) -> relax.Expr:
    """What follows the convolution."""
    limits = {"qmin": -128, "qmax": 127, "dtype": "int8"}
    if form == "float":
        scale = relax.const(rng.uniform(1e-4, 3e-4, OUTPUTS).astype(np.float32))
        x = builder.emit(ops.call("dequantize", [sums, scale], zero_point=0))
        gate = builder.emit(relax.op.clip(builder.emit(relax.op.add(x, relax.const(3.0))), 0, 6))
        product = builder.emit(relax.op.multiply(x, gate))
        real = builder.emit(relax.op.multiply(product, relax.const(np.float32(1 / 6))))
        return ops.call("quantize", [real], scale=RESULT_SCALE, zero_point=RESULT_ZERO, **limits)
    multipliers = relax.const(rng.integers(1 << 29, 1 << 30, OUTPUTS).astype(np.int32))
    x = ops.call(
        "requantize", [sums, multipliers], shift=37, zero_point=0, bound=127 * 128 * INPUTS, **limits
    )
    if form == "without":
        return x
    reals = hard_swish(np.arange(-128, 128) * SCALE)
    values = np.clip(np.rint(reals / RESULT_SCALE) + RESULT_ZERO, -128, 127).astype(np.int8)
    return ops.call("table", [builder.emit(x), relax.const(values)])


def layer(form: str, seed: int) -> tvm.IRModule:
    """The convolution and what follows it."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, (OUTPUTS, INPUTS, 1, 1)).astype(np.int8)
    bias = rng.integers(-999, 999, OUTPUTS).astype(np.int32)
    x = relax.Var("x", relax.TensorType((1, SIZE, SIZE, INPUTS), "int8"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            sums = ops.call(
                "conv2d", [x, relax.const(weight), relax.const(bias)],
                scheme="int8", weight_bits=8, activation_bits=8, zero_point=0,
                strides=[1, 1], padding=[0] * 4, dilation=[1, 1], groups=1,
            )  # fmt: skip
            result = builder.emit_output(emit(builder, builder.emit(sums), form, rng))
        builder.emit_func_output(result)
    return builder.get()


def measure_forms(device: str, seed: int, repeat: int) -> dict[str, dict[str, Any]]:
    """Latency of each form, in one interleaved run, and its ratio to the form that it is held against."""
    target = parse_target(DEVICES[device])
    x = np.random.default_rng(seed).integers(-128, 128, (1, SIZE, SIZE, INPUTS)).astype(np.int8)
    with tempfile.TemporaryDirectory() as folder:
        libraries = {}
        for form in FORMS:
            slow = patch.object(table, "byte_table_for", lambda _: None)
            with slow if form == "value by value" else nullcontext():
                lowered = lower_to_kernels(layer(form, seed), target)
            libraries[form] = Path(folder) / f"{len(libraries)}.so"
            relax.build(lowered, target=target).export_library(
                str(libraries[form]), fcompile=export_fcompile(str(target.attrs.get("mtriple", "")))
            )
        settings = MeasurementSettings(warmup=2, repeat=repeat, min_repeat_ms=20)
        if device != "local":
            settings = MeasurementSettings(warmup=0, repeat=1, min_repeat_ms=0)
        found = measure(open_device(device), libraries, [x], settings, reference="without")
    rows = {}
    for form, one in found.items():
        if not one.result.ok:
            raise SystemExit(f"{form} on {device}: {one.result.error}")
        rows[form] = {"value": one.result.value, "unit": one.result.unit, "ratio": one.ratio}
    return rows


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "figures" / "tables.json")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    figures, data = [], []
    for device in DEVICES:
        runs = [measure_forms(device, seed, 11 if arguments.quick else 41) for seed in range(arguments.seeds)]
        data += [{"device": device, "forms": run} for run in runs]
        unit = "of the time" if device == "local" else "of the estimated Cortex-A72 cycles (emulated)"
        scale, short = (1e3, "ms") if device == "local" else (1e-6, "M")
        name = f"1x1, 28x28, 40 to 240 channels, {device}: with hard-swish as a table"
        for other in FORMS[2:]:
            worst = max(runs, key=lambda run: run["table"]["ratio"] / run[other]["ratio"])
            note = ", ".join(f"{form} {worst[form]['value'] * scale:.3g} {short}" for form in FORMS)
            value = worst["table"]["ratio"] / worst[other]["ratio"]
            figures.append(Figure(f"{name} over {other}", value, unit, 1.0, "<=", note=note))
    write(arguments.json, "tables", {"quick": arguments.quick, "seeds": arguments.seeds}, figures, data)


if __name__ == "__main__":
    main()
