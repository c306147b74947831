"""What a target can do: TVM targets from text, and the facts that the schedules choose by."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tvm.target import Target, codegen

from tvm_compress.errors import TargetError
from tvm_compress.schedules.choices import NO_CHOICES, Choices

ACCEPTED = (
    'Accepted are "host", "raspberry-pi/4b-aarch64" (or any other tag of TVM for a CPU), '
    '"llvm -mtriple=... -mcpu=... -mattr=+a,-b -num-cores=N", and a dict (or its JSON) such as '
    '{"kind": "llvm", "mcpu": "cortex-a72", "mtriple": "aarch64-linux-gnu"}.'
)

# Widest bit-serial operand (Galen's largest; beyond it INT8 is always faster).
MAX_BITSERIAL_BITS = 6

# What the kernels need of an x86 processor, most capable first: (isa, LLVM's features).
_X86_LEVELS = (
    ("avx512vnni", ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")),
    ("avx512", ("avx512f", "avx512bw", "avx512vl", "avx512dq")),
    ("avx2", ("avx2", "fma")),
    ("x86", ()),
)

# Up to this activation_bits * weight_bits counting bits is faster than multiplying bytes: counting takes a
# step per pair of bit planes, a product always the same. Measured on Zen 3 (AVX2) against the narrow kernel,
# 3x3 layers of 32 and 64 channels: 1x1 bits 2.0 times as fast, 2x1 bits 1.0 to 1.4, 2x2 bits 0.55 to 0.9.
# Without a narrow kernel (x86: SSE2's INT8 kernel) and on the A72 (cycle model) it pays for longer. Wider
# vectors change both sides alike; VNNI multiplies more at once.
_POPCOUNT_BITS = {"avx512vnni": 2, "avx512": 2, "avx2": 2, "x86": 4, "a72": 9, "neon": 9, "neon_dot": 4}


@dataclass(frozen=True)
class _LookupCosts:
    """Multiply-accumulates a cycle of what computes 3x3 convolutions of few bits, beside the epilogue.

    Attributes
    ----------
    lookups
        Of table lookups with weights of 1 bit, by the most activation bits; w bits take w times as long.
    table
        Cycles of building tables, for an activation of up to 6 bits; twice that for more.
    products
        Of the INT8 kernel.
    counts
        Of counting bits, 1 x 1; a x w bits take a * w times as long.
    """

    lookups: tuple[tuple[int, float], ...]
    table: float
    products: float
    counts: float


# Measured on the emulated Cortex-A72 (scripts/bench/lookup.py: 16x16x128, 8x8x256, 4x4x512): what a further
# bit of weights takes; tables by 1x1 convolutions. Counting is faster with a = 1, INT8 from w = 5, 4 and 3 on
# (a <= 5, 6, 8), and where a table serves few outputs.
_LOOKUP = {"a72": _LookupCosts(((5, 35.0), (6, 26.0), (8, 17.5)), table=1.1, products=7.8, counts=56.0)}


@dataclass(frozen=True)
class TargetRules:
    """The facts about a target that the schedules and the policies follow.

    Attributes
    ----------
    name
        Short description of the target, for messages and reports.
    isa
        "avx512vnni", "avx512", "avx2", "x86" (SSE2), "a72" (Armv8.0 NEON, no dot product, scheduled for the
        Cortex-A72), "neon_dot" or "neon".
    vector_bits, vector_registers
        Width and number of the vector registers.
    threads
        Number of cores that a kernel may use at once.
    round_multiples
        Channel counts for pruned layers that keep the kernels' vectors full, small to large.
    l1_bytes, l2_bytes
        Data caches of one core.
    compact
        Whether weights are to take no more bytes than their numbers need.
    choices
        How to compute single layers, where the rules are not to decide.
    """

    name: str
    isa: str
    vector_bits: int
    vector_registers: int
    threads: int
    round_multiples: tuple[int, ...]
    l1_bytes: int
    l2_bytes: int
    compact: bool = False
    choices: Choices = NO_CHOICES

    @property
    def fp32_lanes(self) -> int:
        """Number of float32 values in a vector register."""
        return self.vector_bits // 32

    @property
    def is_arm(self) -> bool:
        """Whether the instruction set is Arm's."""
        return self.isa in ("a72", "neon_dot", "neon")

    def popcount_pays(self, activation_bits: int, weight_bits: int, speedup: float = 1.0) -> bool:
        """Whether counting bits is faster than multiplying bytes, for a site of scheme "bitserial".

        The integers are the same, so this is a question of speed alone; see _POPCOUNT_BITS for the figures.
        `speedup` says how many times as fast as by the kernel of those figures the products are.
        """
        return activation_bits * weight_bits * speedup <= _POPCOUNT_BITS[self.isa]

    def lookup_cost(self, activation_bits: int, weight_bits: int, reuse: float) -> float | None:
        """Cycles of a multiply-accumulate of a convolution by table lookup; None where there is no kernel.

        Parameters
        ----------
        activation_bits, weight_bits
            1 to 8 and 1 to 4.
        reuse
            Multiply-accumulates of the layer for each of its (padded) activations.
        """
        costs = _LOOKUP.get(self.isa)
        if costs is None:
            return None
        rate = next(rate for most, rate in costs.lookups if activation_bits <= most)
        table = costs.table * (1 if activation_bits <= 6 else 2)
        return weight_bits / rate + table / reuse

    def lookup_pays(
        self, activation_bits: int, weight_bits: int, reuse: float, counted: bool, speedup: float = 1.0
    ) -> bool:
        """Whether table lookups are faster than multiplying bytes and, if `counted`, than counting bits.

        `speedup` is that of popcount_pays, the other parameters those of `lookup_cost`. The integers are the
        same.
        """
        cost = self.lookup_cost(activation_bits, weight_bits, reuse)
        if cost is None:
            return False
        costs = _LOOKUP[self.isa]
        others = [1 / (costs.products * speedup)]
        if counted and self.popcount_pays(activation_bits, weight_bits, speedup):
            others.append(activation_bits * weight_bits / costs.counts)
        return cost < min(others)

    def bitserial_legal(
        self,
        kind: str,
        in_channels: int,
        out_channels: int,
        groups: int = 1,
        out_height: int = 2,
        out_width: int = 2,
    ) -> str | None:
        """Return the rule that forbids a bit-serial kernel, or None where it is legal.

        Parameters
        ----------
        kind
            "conv2d" or "dense"; for "dense" the spatial extents do not count.
        in_channels, out_channels, groups
            Of the site as it will be after pruning.
        out_height, out_width
            Spatial extents of the output.
        """
        if in_channels % 32:
            return f"bit-serial needs input channels in multiples of 32, not {in_channels}"
        if out_channels % 8:
            return f"bit-serial needs output channels in multiples of 8, not {out_channels}"
        if kind == "dense":
            return None
        if groups != 1:
            return f"bit-serial needs 1 group, not {groups}"
        if out_height < 2 or out_width < 2:
            return f"bit-serial needs a spatial output of at least 2 x 2, not {out_height} x {out_width}"
        return None


def parse_target(text_or_dict: str | Mapping[str, Any] | Target) -> Target:
    """Make a TVM target from what a user writes.

    Raises
    ------
    TargetError
        Where the text is none of the accepted forms, or not a CPU that LLVM knows.
    """
    if isinstance(text_or_dict, Target):
        return text_or_dict
    if isinstance(text_or_dict, Mapping):
        return _target_from_dict(dict(text_or_dict))
    text = text_or_dict.strip()
    if text == "host":
        return host_target()
    if text.startswith("{"):
        try:
            return _target_from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise TargetError(f"The target {text!r} is not valid JSON: {error}.", ACCEPTED) from error
    if text == "llvm" or text.startswith("llvm "):
        return _target_from_dict(_options(text))
    try:
        return _checked(Target(text), text)
    except ValueError as error:
        raise TargetError(f"The target {text!r} is unknown.", ACCEPTED) from error


def _options(text: str) -> dict[str, Any]:
    """Read "llvm -mcpu=... -mattr=+a,-b" as the dict that TVM takes."""
    kind, *words = text.split()
    options: dict[str, Any] = {"kind": kind}
    for word in words:
        key, equals, value = word.lstrip("-").partition("=")
        if not word.startswith("-") or not equals or not value:
            raise TargetError(
                f"The target {text!r} holds {word!r}, which is not of the form -key=value.", ACCEPTED
            )
        if key == "mattr":
            options[key] = value.split(",")
        elif key in ("num-cores", "vector-width", "opt-level"):
            if not value.isdigit():
                raise TargetError(f"The target {text!r} needs a number for -{key}, not {value!r}.", ACCEPTED)
            options[key] = int(value)
        else:
            options[key] = value
    return options


def _target_from_dict(options: dict[str, Any]) -> Target:
    try:
        target = Target(options)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = str(error).split(" Target creation")[0].strip().splitlines()[-1]
        raise TargetError(f"TVM rejects the target {options}: {reason}", ACCEPTED) from error
    return _checked(target, str(options))


def _checked(target: Target, text: str) -> Target:
    """Return the target if it is a CPU that LLVM and our kernels know."""
    if target.kind.name != "llvm":
        raise TargetError(
            f"The target {text!r} is of kind {target.kind.name!r}, and there are kernels for CPUs only.",
            ACCEPTED,
        )
    triple = _triple(target)
    mcpu = str(target.attrs.get("mcpu", ""))
    if not codegen.llvm_is_valid_cpu(mcpu or "generic", triple) and mcpu not in ("", "generic"):
        raise TargetError(
            f"LLVM knows no processor {mcpu!r} for {triple!r}, which the target {text!r} names.", ACCEPTED
        )
    if not triple.startswith(("x86_64", "aarch64", "arm64")):
        raise TargetError(
            f"The target {text!r} is for {triple!r}, and there are kernels for x86-64 and AArch64 only.",
            ACCEPTED,
        )
    return target


def _triple(target: Target) -> str:
    return str(target.attrs.get("mtriple", "") or codegen.llvm_get_system_triple())


@cache
def host_target() -> Target:
    """Return the target of the machine this runs on, as LLVM and the kernel's CPU flags describe it."""
    options: dict[str, Any] = {
        "kind": "llvm",
        "mcpu": codegen.llvm_get_system_cpu(),
        "mtriple": _host_triple(),
        "num-cores": _available_cores(),
    }
    missing = _features_the_system_hides(Target(options))
    if missing:
        options["mattr"] = [f"-{feature}" for feature in missing]
    return _checked(Target(options), "host")


def _host_triple() -> str:
    # A wheel's LLVM names the build environment ("x86_64-conda-linux-gnu"): the vendor does not matter, and
    # "unknown" is what every cross compiler understands.
    triple = codegen.llvm_get_system_triple()
    machine = platform.machine().lower()
    architecture = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    return f"{architecture}-unknown-linux-gnu" if "linux" in triple else triple


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _features_the_system_hides(target: Target) -> list[str]:
    """Return the features that the processor's name implies but the operating system does not report.

    A hypervisor may mask AVX-512 while the processor still gives its true name.
    """
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine().lower() not in ("x86_64", "amd64") or not cpuinfo.exists():
        return []
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "").split()
    if not flags:
        return []
    spelt = {flag.replace("_", "") for flag in flags}
    wanted = {feature for _, features in _X86_LEVELS for feature in features}
    known = codegen.llvm_get_cpu_features(target)
    return sorted(feature for feature in wanted if feature in known and feature not in spelt)


def rules_for(target: Target) -> TargetRules:
    """Return the rules of a target: they follow its features, never the machine that builds."""
    triple = _triple(target)
    mcpu = str(target.attrs.get("mcpu", "")) or "generic"
    threads = int(target.attrs.get("num-cores", 1))
    features = codegen.llvm_get_cpu_features(target)
    name = f"{mcpu} ({triple.partition('-')[0]}, {threads} threads)"
    if triple.startswith("x86_64"):
        isa = next(isa for isa, needed in _X86_LEVELS if all(feature in features for feature in needed))
        wide = isa.startswith("avx512")
        bits = 512 if wide else 256 if isa == "avx2" else 128
        return TargetRules(name, isa, bits, 32 if wide else 16, threads, (8, 16, 32), 32 << 10, 512 << 10)
    if "dotprod" in features:
        return TargetRules(name, "neon_dot", 128, 32, threads, (4, 8, 32), 32 << 10, 256 << 10)
    if mcpu == "cortex-a72":
        # The Raspberry Pi 4: 1 MB of L2 shared by four cores.
        return TargetRules(name, "a72", 128, 32, threads, (4, 8, 32), 32 << 10, (1 << 20) // 4)
    return TargetRules(name, "neon", 128, 32, threads, (4, 8, 32), 32 << 10, 256 << 10)
