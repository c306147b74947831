"""Measures candidates and their kernels on a device, each beside the dense model, through the store."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tvm
from tvm.support.cc import create_shared

from tvm_compress.errors import DeviceError
from tvm_compress.passes.machine_code import object_files
from tvm_compress.passes.pipeline import Compiled, build
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.rpc.device import ArgumentSpecs, Device, LatencyResult, MeasurementSettings, Session
from tvm_compress.rpc.measure import measure
from tvm_compress.rpc.store import MeasurementStore
from tvm_compress.schedules.apply import KernelInfo
from tvm_compress.schedules.reading import reading_kernel
from tvm_compress.search.network_overhead import (
    read_from_afar,
    sizes_to_read,
    touched_bytes_of,
    weight_bytes_of,
)

# How the search times a library: short, since the dense model is timed along with each candidate.
SHORT = MeasurementSettings(repeat=9, min_repeat_ms=8.0)
# How it times those that may win: the best of many short measurements is the luckiest one too.
THOROUGH = MeasurementSettings(repeat=30, min_repeat_ms=20.0)
# The same for a single kernel. A clock times all kernels so many times over, and the fastest of the medians
# counts: what others do on the machine only adds to a time, and lasts longer than a few samples in a row.
KERNEL_SAMPLES = 3
KERNEL_SAMPLE_MS = 1.0
KERNEL_PASSES = 6
# The same where a latency model is fitted or judged: its errors shall be its own.
THOROUGH_PASSES = 18
# Networks are timed in such passes by so many at a time.
NETWORK_GROUP = 8
# Of kernels' keys in the store.
KERNEL_PREFIX = "kernel-"


def structure_key(policy: CompressionPolicy, model: str, where: str) -> str:
    """Key of all that a policy's latency depends on: model, channels, schemes, bits, and where it runs."""
    sites = {
        name: [site.channels, site.scheme, site.weight_bits, site.activation_bits]
        for name, site in sorted(policy.sites.items())
    }
    return hashlib.sha256(json.dumps([model, sites, where]).encode()).hexdigest()[:32]


class LatencyMeter:
    """Measures modules on a device, each interleaved with the dense model, so that drift cancels.

    A context manager; the session with the device is opened when it is first needed. What was measured
    before, by key, comes from the store.

    Parameters
    ----------
    device
        Where libraries run.
    target
        Of the kernels; the dense model's too.
    store
        Of all measurements.
    input_shape
        (1, C, H, W).
    settings
        How libraries are timed; the threads are the device's.
    passes
        How often a clock times a kernel, or one of many networks; the fastest of the medians counts.
    """

    def __init__(
        self,
        device: Device,
        target: tvm.target.Target,
        store: MeasurementStore,
        input_shape: Sequence[int],
        settings: MeasurementSettings = SHORT,
        passes: int = KERNEL_PASSES,
    ) -> None:
        self.device = device
        self._passes = passes
        self.target = target
        self.store = store
        # Latency does not depend on the values, but zeros alone would be unlike any input.
        ramp = np.arange(math.prod(input_shape), dtype=np.float32)
        self._inputs = [np.sin(ramp).reshape(tuple(input_shape))]
        self._settings = replace(settings, threads=device.threads)
        self._kernel_settings = replace(self._settings, repeat=KERNEL_SAMPLES, min_repeat_ms=KERNEL_SAMPLE_MS)
        self._stack = ExitStack()
        self._session: Session | None = None
        self._kernel_session: Session | None = None
        self._dense_library: Path | None = None
        # Library and name there of each kernel that was built, by its key.
        self._built: dict[str, tuple[Path, str]] = {}
        self._dense: LatencyResult | None = None
        # Time of reading so many bytes, None where the device failed.
        self._read: dict[int, float | None] = {}

    def __enter__(self) -> "LatencyMeter":
        self._stack.__enter__()
        self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="tvm-compress-")))
        return self

    def __exit__(self, *details: Any) -> None:
        self._stack.__exit__(*details)

    @property
    def where(self) -> str:
        """Text of all that latencies depend on besides the module."""
        return json.dumps([self.device.name, str(self.target), self._settings.threads, tvm.__version__])

    @property
    def dense(self) -> LatencyResult:
        """Reference latency T_0, once `set_dense` was called."""
        assert self._dense is not None, "set_dense comes first"
        return self._dense

    def set_dense(self, module: tvm.IRModule, key: str) -> LatencyResult:
        """Build the dense module and take its latency; a study that is resumed finds it in the store.

        Raises
        ------
        DeviceError
            If the device cannot run it.
        """
        self._dense_library = self.export(build(module, self.target), "dense")
        found = self._stored(key)
        if found is None:
            found = self._open().time_many({"dense": (self._dense_library, self._inputs)})["dense"]
            if not found.ok:
                raise _failure(self.device, found)
            self._put(key, found, {"what": "dense"})
        self._dense = found
        return found

    def export(self, compiled: Compiled, name: str) -> Path:
        """Write a library for the device into the meter's temporary folder."""
        path = self._folder / f"{name}.so"
        compiled.export(path, fcompile=self._linker())
        return path

    def measured(self, key: str) -> LatencyResult | None:
        """What the store has of a key: a latency that is corrected for drift already."""
        return self._stored(key)

    def measure(self, compiled: Compiled, key: str, kernels: Sequence[KernelInfo] = ()) -> LatencyResult:
        """Latency of a built module: its ratio to the dense one beside it, times T_0; or a failure.

        Parameters
        ----------
        kernels
            Those of the module whose times will be asked for: `time_kernels` then needs no library of its own
            for them, and no time where the device tells each kernel's part of the whole.

        Raises
        ------
        DeviceError
            If the dense model fails too: then the device is to blame.
        """
        library = self.export(compiled, f"network{len(self._built)}" if kernels else "candidate")
        assert self._dense_library is not None
        for _ in range(2):
            timed = measure(
                self._open(),
                {"dense": self._dense_library, "candidate": library},
                self._inputs,
                reference="dense" if self.device.unit == "seconds" else None,
            )
            result, ratio = timed["candidate"].result, timed["candidate"].ratio
            if result.ok:
                break
        if not result.ok and not timed["dense"].result.ok:
            raise _failure(self.device, timed["dense"].result)
        provenance = {"what": "policy", "raw": result.value if result.ok else None, "ratio": ratio}
        if ratio is not None:
            result = replace(result, value=ratio * self.dense.value)
        if result.ok:
            self._put(key, result, provenance)
            self._built |= {k.key: (library, k.name) for k in kernels if k.key not in self._built}
            self._take_apart(result, kernels)
        return result

    def _take_apart(self, result: LatencyResult, kernels: Sequence[KernelInfo]) -> None:
        """Keep the times of a network's kernels, where the device tells them and they are those alone."""
        if not self._stays_in_cache(kernels):
            return
        for kernel in kernels:
            if kernel.name in result.kernels and self._stored_kernel(kernel) is None:
                part = [result.kernels[kernel.name] / kernel.count]
                self._put_kernel(kernel, LatencyResult.from_samples(part, result.unit, self._kernel_settings))

    def time_kernels(self, kernels: Sequence[KernelInfo], again: bool = False) -> dict[str, LatencyResult]:
        """Latency of one call of each kernel, by key; from the store where it has them.

        Those that it lacks, or all if they are to be timed `again`, are built into a library of their own,
        unless they were built before. What the device fails on is not in the result.
        """
        distinct = {kernel.key: kernel for kernel in kernels}
        found: dict[str, LatencyResult] = {}
        if not again:
            stored = {key: self._stored_kernel(kernel) for key, kernel in distinct.items()}
            found = {key: result for key, result in stored.items() if result is not None}
        missing = [kernel for key, kernel in distinct.items() if key not in found]
        self._build_kernels([kernel for kernel in missing if kernel.key not in self._built])
        libraries = sorted({self._built[kernel.key][0] for kernel in missing})
        for library in libraries:
            named = {self._built[k.key][1]: k for k in missing if self._built[k.key][0] == library}
            specs = {name: argument_specs(kernel) for name, kernel in named.items()}
            timed = self._open_for_kernels().time_kernels(library, specs, self._passes)
            for name, result in timed.items():
                if result.ok:
                    found[named[name].key] = result
                    self._put_kernel(named[name], result)
        return found

    def time_networks(self, compiled: Mapping[str, Compiled]) -> dict[str, LatencyResult]:
        """Latency of built networks, by name, taken as kernels' are; what the device fails on is missing.

        A clock times all in several passes, and the fastest of a network's medians counts.
        """
        libraries = {
            name: (self.export(one, f"named-{name}"), self._inputs) for name, one in compiled.items()
        }
        names = list(libraries)
        groups = [names[i : i + NETWORK_GROUP] for i in range(0, len(names), NETWORK_GROUP)]
        fastest: dict[str, LatencyResult] = {}
        for _ in range(self._passes if self.device.unit == "seconds" else 1):
            for group in groups:
                timed = self._open().time_many({name: libraries[name] for name in group})
                for name, result in timed.items():
                    if result.ok and (name not in fastest or result.value < fastest[name].value):
                        fastest[name] = result
        return fastest

    def in_network(self, kernels: Sequence[KernelInfo], times: Mapping[str, float]) -> dict[str, float]:
        """Time of one call of each kernel of a network, by key, as it is there, from what it is alone.

        Alone, a kernel finds in a cache the weights that its run before has left there; in a network, only
        if all kernels' weights fit into it together. Where the device's last cache is known, a kernel of a
        larger network takes at least as long as its weights take from memory. Elsewhere that is added which a
        clock tells of reading.
        """
        cache = self.device.last_cache
        if cache is None:
            reading = self._reading(sizes_to_read(touched_bytes_of(kernels)))
            if not reading:
                return {kernel.key: times[kernel.key] for kernel in kernels}
            return {key: times[key] + more for key, more in read_from_afar(kernels, reading).items()}
        if self._stays_in_cache(kernels):
            return {kernel.key: times[kernel.key] for kernel in kernels}
        floors = {k.key: k.features["weight_bytes"] * cache.time_per_byte for k in kernels}
        return {key: max(times[key], floor) for key, floor in floors.items()}

    def sum_in_network(self, kernels: Sequence[KernelInfo], times: Mapping[str, float]) -> float:
        """Sum of a network's kernels, each as it is there, from what a call of each takes alone, by key."""
        there = self.in_network(kernels, times)
        return sum(there[kernel.key] * kernel.count for kernel in kernels)

    def _reading(self, sizes: Sequence[int]) -> dict[int, float]:
        """Time of reading so many bytes, by size; those that the device fails on are missing."""
        new = [size for size in sizes if size not in self._read]
        kernels = {size: reading_kernel(size, self.target) for size in new}
        times = self.time_kernels(list(kernels.values()))
        self._read |= {size: times[k.key].value if k.key in times else None for size, k in kernels.items()}
        return {size: time for size in sizes if (time := self._read[size]) is not None}

    def _stays_in_cache(self, kernels: Sequence[KernelInfo]) -> bool:
        """Whether a network's weights are known to stay in the device's last cache from run to run."""
        cache = self.device.last_cache
        passed = max((k.features["input_bytes"] + k.features["output_bytes"] for k in kernels), default=0.0)
        return cache is not None and weight_bytes_of(kernels) + passed <= cache.size

    def _build_kernels(self, kernels: Sequence[KernelInfo]) -> None:
        """Build kernels into a new library, under new names: those of several networks may share one."""
        if not kernels:
            return
        path = self._folder / f"kernels{len(self._built)}.so"
        named = {f"kernel{i}": kernel for i, kernel in enumerate(kernels)}
        functions = {name: kernel.func for name, kernel in named.items()}
        objects = object_files(functions, self.target, self._folder)
        (self._linker() or create_shared)(str(path), [str(name) for name in objects])
        self._built |= {kernel.key: (path, name) for name, kernel in named.items()}

    def _linker(self) -> Callable[..., None] | None:
        return export_fcompile(str(self.target.attrs.get("mtriple", "")))

    def _open_for_kernels(self) -> Session:
        if self._kernel_session is None:
            self._kernel_session = self._stack.enter_context(self.device.open(self._kernel_settings))
        return self._kernel_session

    def _open(self) -> Session:
        if self._session is None:
            self._session = self._stack.enter_context(self.device.open(self._settings))
        return self._session

    def _stored(self, key: str, settings: MeasurementSettings | None = None) -> LatencyResult | None:
        found = self.store.get(key, self.device.stored_as, self.device.unit, settings or self._settings)
        return found if found is not None and found.ok else None

    def _stored_kernel(self, kernel: KernelInfo) -> LatencyResult | None:
        return self._stored(KERNEL_PREFIX + kernel.key, self._kernel_settings)

    def _put_kernel(self, kernel: KernelInfo, result: LatencyResult) -> None:
        facts = {"what": "kernel", "kind": kernel.kind, "features": kernel.features}
        self._put(KERNEL_PREFIX + kernel.key, result, facts)

    def _put(self, key: str, result: LatencyResult, provenance: Mapping[str, Any]) -> None:
        self.store.put(key, self.device.stored_as, result, {**self.device.describe(), **provenance})


def _failure(device: Device, result: LatencyResult) -> DeviceError:
    kind, text = result.error or ("crash", "no reason was given")
    return DeviceError(f"The device {device.name} failed on the dense model ({kind}): {text}")


def argument_specs(kernel: KernelInfo) -> ArgumentSpecs:
    """Shape and dtype of each argument of a kernel, outputs last."""
    return [([int(extent) for extent in p.shape], str(p.dtype)) for p in kernel.func.params]
