"""Kernels and whole networks on the emulated Cortex-A72: the integers of the reference and of the twin."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.passes.quantized_networks import pooling
from tests.passes.torch_networks import Gated, example
from tvm_compress.calibration import calibrate
from tvm_compress.cli.main import main
from tvm_compress.compression import compile_model, compress_model, uniform_policy
from tvm_compress.compressor import realize
from tvm_compress.model import Model
from tvm_compress.passes.pipeline import build, compress
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.sites import find_sites
from tvm_compress.rpc import emulated_a72
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import open_device
from tvm_compress.rpc.emulated_a72 import EmulatedA72
from tvm_compress.samples.load import load_sample, load_sample_data
from tvm_compress.schedules import ops, reference
from tvm_compress.schedules.apply import lower_to_kernels
from tvm_compress.schedules.target_rules import parse_target
from tvm_compress.twin import Twin

RPI4 = "raspberry-pi/4b-aarch64"

# (input shape, weight shape, stride, padding, scheme, activation bits, weight bits, zero point).
SITES: list[tuple[Any, ...]] = [
    ((1, 7, 9, 8), (16, 8, 3, 3), 1, 1, "int8", 8, 8, -7),
    ((1, 8, 8, 5), (37, 5, 3, 3), 2, 1, "int8", 8, 8, 3),
    ((1, 6, 6, 16), (24, 16, 1, 1), 2, 0, "int8", 8, 8, 127),
    ((1, 28, 28, 1), (16, 1, 3, 3), 1, 1, "int8", 8, 8, -128),
    ((2, 50), (10, 50), 1, 0, "int8", 8, 8, 5),
    ((1, 7, 7, 32), (16, 32, 3, 3), 1, 1, "bitserial", 2, 2, 0),
    ((1, 6, 8, 64), (8, 64, 3, 3), 2, 1, "bitserial", 1, 1, 0),
    ((1, 5, 5, 32), (24, 32, 1, 1), 1, 0, "bitserial", 4, 3, 6),
    ((1, 4, 4, 96), (16, 96, 3, 3), 1, 1, "bitserial", 6, 6, 0),
    ((1, 64), (16, 64), 1, 0, "bitserial", 3, 1, 0),
    ((1, 6, 8, 64), (24, 64, 3, 3), 1, 1, "int8", 8, 1, -128),
]


def operands(site: tuple[Any, ...], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x_shape, w_shape, _, _, scheme, a_bits, w_bits, _ = site
    low, high = (-128, 128) if scheme == "int8" else (0, 2**a_bits)
    x = rng.integers(low, high, x_shape).astype(np.int8 if scheme == "int8" else np.uint8)
    limit = 2 ** (w_bits - 1) - 1
    w = rng.choice([-1, 1], w_shape) if w_bits == 1 else rng.integers(-limit, limit + 1, w_shape)
    return x, w.astype(np.int8), rng.integers(-900, 900, w_shape[0]).astype(np.int32)


def attributes(site: tuple[Any, ...]) -> dict[str, Any]:
    _, w_shape, stride, padding, scheme, a_bits, w_bits, zero_point = site
    attrs = {"scheme": scheme, "activation_bits": a_bits, "weight_bits": w_bits, "zero_point": zero_point}
    if len(w_shape) == 4:
        attrs |= {"strides": [stride] * 2, "padding": [padding] * 4, "dilation": [1, 1], "groups": 1}
    return attrs


def expected(site: tuple[Any, ...], x: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
    if w.ndim == 2:
        return reference.dense(x, w, b, site[7])
    attrs = attributes(site)
    geometry = {name: attrs[name] for name in ("strides", "padding", "dilation", "groups", "zero_point")}
    return reference.conv2d(x, w, b, **geometry)


# (target, emulated processor): the second has dot products (sdot), as the Raspberry Pi 5 does.
PROCESSORS = [(RPI4, "cortex-a72"), ("llvm -mcpu=cortex-a76 -mtriple=aarch64-linux-gnu", "max")]


@pytest.mark.parametrize(("target_text", "processor"), PROCESSORS)
def test_every_kind_of_integer_kernel_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target_text: str, processor: str
) -> None:
    monkeypatch.setattr(emulated_a72, "_PROCESSOR", processor)
    rng = np.random.default_rng(1)
    values = [operands(site, rng) for site in SITES]
    bb = relax.BlockBuilder()
    inputs = [
        relax.Var(f"x{i}", relax.TensorType(x.shape, str(x.dtype))) for i, (x, _, _) in enumerate(values)
    ]
    with bb.function("main", inputs):
        with bb.dataflow():
            outputs = [
                bb.emit(
                    ops.call(
                        "conv2d" if w.ndim == 4 else "dense",
                        [data, relax.const(w), relax.const(b)],
                        site=f"site{i}",
                        **attributes(site),
                    )
                )
                for i, (site, data, (_, w, b)) in enumerate(zip(SITES, inputs, values, strict=True))
            ]
            result = bb.emit_output(relax.Tuple(outputs))
        bb.emit_func_output(result)
    target = parse_target(target_text)
    executable = relax.build(lower_to_kernels(bb.get(), target), target=target)
    executable.export_library(str(tmp_path / "k.so"), fcompile=export_fcompile("aarch64-linux-gnu"))
    with open_device("emulated-a72").open() as session:
        found = session.run(tmp_path / "k.so", [x for x, _, _ in values])
    for site, (x, w, b), got in zip(SITES, values, found, strict=True):
        np.testing.assert_array_equal(got, expected(site, x, w, b), err_msg=str(site))


# (input shape, its type, the results' type): single values, odd rows, whole steps and what is left of them.
TABLES = [
    ((256,), "int8", "int8"),
    ((2, 5, 3, 37), "uint8", "int8"),
    ((1, 16, 16, 8), "int8", "uint8"),
    ((1, 3, 3, 29), "uint8", "uint8"),
    ((17, 1), "int8", "int8"),
    ((5,), "int8", "int8"),
    ((1, 300), "int8", "int32"),
]


def test_tables_give_the_values_of_all_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    data = [np.resize(np.arange(256, dtype=np.uint8), shape).view(dtype) for shape, dtype, _ in TABLES]
    limits = [np.iinfo(result) for _, _, result in TABLES]
    values = [rng.integers(each.min, each.max, 256, each.dtype, endpoint=True) for each in limits]
    bb = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(x.shape, str(x.dtype))) for i, x in enumerate(data)]
    with bb.function("main", inputs):
        with bb.dataflow():
            outputs = [
                bb.emit(ops.call("table", [x, relax.const(table)]))
                for x, table in zip(inputs, values, strict=True)
            ]
            result = bb.emit_output(relax.Tuple(outputs))
        bb.emit_func_output(result)
    target = parse_target(RPI4)
    executable = relax.build(lower_to_kernels(bb.get(), target), target=target)
    executable.export_library(str(tmp_path / "k.so"), fcompile=export_fcompile("aarch64-linux-gnu"))
    with open_device("emulated-a72").open() as session:
        found = session.run(tmp_path / "k.so", data)
    for case, x, table, got in zip(TABLES, data, values, found, strict=True):
        np.testing.assert_array_equal(got, reference.table(x, table), err_msg=str(case))


@pytest.fixture(scope="module")
def sample() -> Model:
    return load_sample("resnet8-fashion")


def test_quantization_divides_as_a_division_does(tmp_path: Path) -> None:
    """Without a division: next to every step of the result, beyond the range, and at the largest floats."""
    scale = np.float32(0.0235)
    steps = np.concatenate([(np.arange(-131, 132) + 0.5) * scale, [0.0, 1e30, -1e30]]).astype(np.float32)
    bits = steps.view(np.int32)[:, None] + np.arange(-3, 4, dtype=np.int32)
    x = np.append(bits.view(np.float32).ravel(), [np.inf, -np.inf]).astype(np.float32)
    x = x[~np.isnan(x)][None]
    attrs = dict(scale=float(scale), zero_point=3, qmin=-128, qmax=127, dtype="int8")
    builder = relax.BlockBuilder()
    v = relax.Var("x", relax.TensorType(x.shape, "float32"))
    with builder.function("main", [v]):
        with builder.dataflow():
            out = builder.emit_output(ops.call("quantize", [v], **attrs))
        builder.emit_func_output(out)
    target = parse_target(RPI4)
    executable = relax.build(lower_to_kernels(builder.get(), target), target=target)
    assert "fdiv" not in executable.mod.imports[0].inspect_source("asm")
    library = tmp_path / "quantize.so"
    executable.export_library(str(library), fcompile=export_fcompile(str(target.attrs["mtriple"])))
    with EmulatedA72().open() as session:
        (found,) = session.run(library, [x])
    np.testing.assert_array_equal(found, np.clip(np.rint(x / scale) + 3, -128, 127).astype(np.int8))


@pytest.mark.parametrize(("bits", "ratio"), [(8, 0.25), (4, 0.0), (1, 0.5)])
def test_networks_compute_the_twins_integers(sample: Model, tmp_path: Path, bits: int, ratio: float) -> None:
    """The same logits to the bit from the twin, the host's library and the emulated board's."""
    split = load_sample_data("resnet8-fashion")
    policy = uniform_policy(
        sample, target=RPI4, pruning_ratio=ratio, weight_bits=bits, activation_bits=bits, rounding=8
    )
    assert {p.scheme for p in policy.sites.values()} == ({"int8"} if bits == 8 else {"int8", "bitserial"})
    model = compress_model(sample, policy, split, images=64)
    images = split.test.normalized(slice(0, 5))
    twin = Twin(realize(model.module)).predict(images)
    for device, target in (("local", "host"), ("emulated-a72", RPI4)):
        artifact = compile_model(model, target, tmp_path / device)
        np.testing.assert_array_equal(artifact.predict(images, open_device(device)), twin)


@pytest.mark.parametrize("make", [lambda: example(Gated()).module, pooling], ids=["gated", "pooling"])
def test_what_stands_between_sites_is_the_twins_integers(
    tmp_path: Path, make: Callable[[], tvm.IRModule]
) -> None:
    """Tables, products and averages: the logits of a MobileNetV3 block and of one that pools, to the bit."""
    module = make()
    x = np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(np.float32)
    site = SitePolicy(scheme="int8", weight_bits=8, activation_bits=8)
    policy = CompressionPolicy(sites={each.name: site for each in find_sites(module)})
    integer = realize(compress(module, policy, calibration=calibrate(module, x)))
    library = build(integer, RPI4).export(tmp_path / "k.so", export_fcompile("aarch64-linux-gnu"))
    with open_device("emulated-a72").open() as session:
        found = [session.run(library, [one[None]])[0] for one in x]
    np.testing.assert_array_equal(np.concatenate(found), Twin(integer).predict(x))


def test_float_network_and_its_cycles(sample: Model, tmp_path: Path) -> None:
    artifact = compile_model(sample, RPI4, tmp_path / "dense")
    images = load_sample_data("resnet8-fashion").test.normalized(slice(0, 2))
    # Not what an earlier run kept: counted twice.
    device = EmulatedA72(remember=False)
    logits = artifact.predict(images, device)
    np.testing.assert_allclose(logits, Twin(sample.module).predict(images), rtol=1e-4, atol=1e-4)
    first, again = (next(iter(artifact.benchmark(device).values())) for _ in range(2))
    assert first.unit == "estimated_cycles"
    assert first.value == again.value
    assert sum(first.kernels.values()) == pytest.approx(first.value)
    # The float weights alone are more lines than the first cache has: they come anew each time.
    assert first.counters["l1_misses"] > 512
    assert first.counters["l1_misses"] == sum(part["l1_misses"] for part in first.breakdown.values())
    assert first.kernels == {name: part["cycles"] for name, part in first.breakdown.items()}
    # 4 multiply-accumulates a cycle is the core's limit, and Winograd saves three of four at most: less than
    # that many cycles would be a miscount.
    assert first.value > 9.3e6 / 16
    # 1.54 M when this was written; 1.77 M with tiles that overhang and small layers whose stages are shared.
    assert first.value < 1.6e6


def test_benchmark_shows_what_each_kernel_costs(
    sample: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(compile_model(sample, RPI4, tmp_path / "dense").path)
    assert main(["benchmark", path, "--device", "emulated-a72", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["results"]["this"]
    kernels = result["breakdown"]
    assert sum(kernel["cycles"] for kernel in kernels.values()) == pytest.approx(result["value"])
    assert main(["benchmark", path, "--device", "emulated-a72"]) == 0
    printed = capsys.readouterr().out
    assert "L2 misses" in printed
    hottest = max(kernels.values(), key=lambda kernel: kernel["cycles"])
    assert f"{hottest['instructions']:,}" in printed
