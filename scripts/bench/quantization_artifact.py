"""What `quantization.py` measures of built libraries: every site's integers against the twin's, and sizes."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from quantization_training import Task
from tvm import relax

from tvm_compress.compression import uniform_policy
from tvm_compress.compressor import Compressor, realize
from tvm_compress.metrics.cost import parameter_bytes
from tvm_compress.passes.graph import bindings, operator, substitute
from tvm_compress.passes.params import with_main
from tvm_compress.passes.pipeline import lower
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.passes.sites import find_sites
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import open_device
from tvm_compress.schedules.target_rules import parse_target
from tvm_compress.twin import Twin

TARGETS = {"local": "host", "emulated-a72": "raspberry-pi/4b-aarch64"}
POLICIES = ("W8A8", "W4A4", "W2A2", "W1A1", "mixed")
# The mixed policy goes through these, site by site.
MIXTURE = ((8, 8), (4, 4), (2, 2), (32, 32), (1, 1), (3, 5))


def named_policy(task: Task, name: str, target: str) -> CompressionPolicy:
    """Give one of `POLICIES` for a task's network."""

    def uniform(bits: tuple[int, int]) -> CompressionPolicy:
        return uniform_policy(task.model, target=target, weight_bits=bits[0], activation_bits=bits[1])

    if name != "mixed":
        weight_bits, activation_bits = name[1:].split("A")
        return uniform((int(weight_bits), int(activation_bits)))
    kinds = [uniform(bits) for bits in MIXTURE]
    sites = {site: kinds[i % len(kinds)][site] for i, site in enumerate(kinds[0].sites)}
    return replace(kinds[0], sites=sites)


def compare(task: Task, name: str, device: str, images: int) -> dict[str, Any]:
    """Run a library that also gives every integer tensor between its kernels; find the twin's in them."""
    target = parse_target(TARGETS[device])
    policy = named_policy(task, name, TARGETS[device])
    compressor = Compressor(task.model.module, task.calibration, None)
    module = realize(compressor.quantize(task.model.module, policy))
    lowered, compact = lower(module, target), lower(module, target, compact=True)
    x = task.split.test.take(slice(0, images)).normalized()
    with tempfile.TemporaryDirectory() as folder:
        plain, small, exposed = (Path(folder) / f"{kind}.so" for kind in ("plain", "small", "exposed"))
        fcompile = export_fcompile(str(target.attrs.get("mtriple", "")))
        relax.build(lowered, target).export_library(str(plain), fcompile=fcompile)
        relax.build(compact, target).export_library(str(small), fcompile=fcompile)
        relax.build(_exposed(lowered), target).export_library(str(exposed), fcompile=fcompile)
        with open_device(device).open() as session:
            found = session.run_many(exposed, [(image[None],) for image in x])
            logits = session.run_many(plain, [(image[None],) for image in x])
        rodata = _section_size(small.read_bytes(), b".rodata")
    twin = Twin(module)
    wanted, twin_logits = twin.site_inputs(x), twin.predict(x)
    kinds = {s: value.dtype.kind for s, value in wanted.items()}
    integer = [site for site in wanted if kinds[site] in "iu" or not policy[site].quantized]
    differing = [
        site
        for site in integer
        if policy[site].quantized
        and any(not _holds(outputs, wanted[site][i]) for i, outputs in enumerate(found))
    ]
    quantized = [site for site in wanted if policy[site].quantized]
    if missing := [site for site in quantized if kinds[site] not in "iu"]:
        raise SystemExit(f"The twin gives floats for the integers of {missing[0]}.")
    constants = _constant_bytes(compact)
    return {
        "kind": "artifact",
        "policy": name,
        "device": device,
        "images": images,
        "sites": len(quantized),
        "differing_sites": len(differing),
        "differing": differing,
        "logits_differ_by": float(max(np.abs(out[0] - twin_logits[i]).max() for i, out in enumerate(found))),
        "exposing_changes_logits": any(
            not np.array_equal(one[0], other[0]) for one, other in zip(found, logits, strict=True)
        ),
        "policy_bytes": parameter_bytes(find_sites(task.model.module), policy),
        "constant_bytes": constants,
        "float32_weight_bytes": _constant_bytes(compact, "float32", 2),
        "fastest_constant_bytes": _constant_bytes(lowered),
        "rodata_bytes": rodata,
    }


def _exposed(lowered: tvm.IRModule) -> tvm.IRModule:
    """Let `main` give, after its result, every integer tensor that a kernel writes to memory."""
    function = lowered["main"]
    builder = relax.BlockBuilder()
    replaced: dict[relax.Var, relax.Expr] = {}
    kept: list[relax.Expr] = []
    with builder.function("main", list(function.params)):
        with builder.dataflow():
            for var, value in bindings(function):
                replaced[var] = builder.emit(substitute(value, replaced))
                if operator(value) == "relax.call_tir" and str(var.ty.dtype) in ("int8", "uint8"):
                    kept.append(replaced[var])
            result = replaced[function.body.body]
            outputs = builder.emit_output(relax.Tuple([result, *kept]))
        builder.emit_func_output(outputs)
    made = builder.finalize()["main"].with_attrs(dict(function.attrs))
    return with_main(lowered, made)


def _holds(outputs: Sequence[np.ndarray], wanted: np.ndarray) -> bool:
    """Whether one of a library's tensors holds these integers, in this order."""
    flat = wanted.astype(np.int32).ravel()
    return any(
        out.size == flat.size and np.array_equal(out.ravel().astype(np.int32), flat) for out in outputs[1:]
    )


def _constant_bytes(lowered: tvm.IRModule, dtype: str = "", rank: int = 0) -> int:
    """Bytes of the constants in a lowered module, of one dtype and this rank or more."""
    total = 0
    for _, value in bindings(lowered["main"]):
        arguments = value.args[1].fields if operator(value) == "relax.call_tir" else ()
        for argument in arguments:
            if isinstance(argument, tvm.ir.GenericConst):
                array = argument.value.numpy()
                fits = array.dtype.name == dtype or not dtype
                total += array.nbytes if fits and array.ndim >= rank else 0
    return total


def _section_size(library: bytes, name: bytes) -> int:
    """Size of a section of a 64-bit little-endian ELF file."""

    def number(at: int, width: int) -> int:
        return int.from_bytes(library[at : at + width], "little")

    table, size, count, names = number(0x28, 8), number(0x3A, 2), number(0x3C, 2), number(0x3E, 2)
    strings = number(table + size * names + 0x18, 8)
    for index in range(count):
        header = table + size * index
        start = strings + number(header, 4)
        if library[start : library.index(b"\0", start)] == name:
            return number(header + 0x20, 8)
    raise SystemExit(f"The library has no section {name.decode()}.")
