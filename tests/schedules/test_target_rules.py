"""Targets from text, and the facts that follow from their features."""

import dataclasses

import pytest
import tvm

from tvm_compress.errors import TargetError
from tvm_compress.schedules.target_rules import MAX_BITSERIAL_BITS, TargetRules, parse_target, rules_for

A72 = "llvm -mcpu=cortex-a72 -mtriple=aarch64-linux-gnu -mattr=+neon -num-cores=4"


@pytest.mark.parametrize(
    ("text", "isa", "bits", "threads"),
    [
        ("raspberry-pi/4b-aarch64", "a72", 128, 4),
        (A72, "a72", 128, 4),
        ({"kind": "llvm", "mcpu": "cortex-a72", "mtriple": "aarch64-linux-gnu"}, "a72", 128, 1),
        ('{"kind": "llvm", "mcpu": "haswell", "mtriple": "x86_64-linux-gnu"}', "avx2", 256, 1),
        ("llvm -mcpu=znver5 -mtriple=x86_64-linux-gnu", "avx512vnni", 512, 1),
        ("llvm -mcpu=znver5 -mtriple=x86_64-linux-gnu -mattr=-avx512vnni", "avx512", 512, 1),
        ("llvm -mcpu=skylake-avx512 -mtriple=x86_64-linux-gnu -num-cores=8", "avx512", 512, 8),
        ("llvm -mcpu=x86-64 -mtriple=x86_64-linux-gnu", "x86", 128, 1),
        ("llvm -mcpu=cortex-a76 -mtriple=aarch64-linux-gnu", "neon_dot", 128, 1),
        ("llvm -mcpu=cortex-a53 -mtriple=aarch64-linux-gnu", "neon", 128, 1),
    ],
)
def test_rules_follow_the_targets_features(text, isa, bits, threads):
    rules = rules_for(parse_target(text))
    assert (rules.isa, rules.vector_bits, rules.threads) == (isa, bits, threads)
    assert rules.fp32_lanes == bits // 32
    assert rules.is_arm == (isa in ("a72", "neon_dot", "neon"))


def test_host_names_its_processor_and_its_cores():
    target = parse_target("host")
    assert target.kind.name == "llvm"
    assert str(target.attrs["mcpu"]) == tvm.target.codegen.llvm_get_system_cpu()
    rules = rules_for(target)
    assert rules.threads >= 1
    assert rules.isa in ("avx512vnni", "avx512", "avx2", "x86", "a72", "neon_dot", "neon")


def test_a_target_passes_through():
    target = parse_target(A72)
    assert parse_target(target).same_as(target)


@pytest.mark.parametrize(
    "text",
    [
        "nosuch",
        "",
        "llvm -mcpu=nosuch",
        "llvm -frob=1",
        "llvm word",
        "llvm -mcpu=",
        "llvm -num-cores=many",
        "{",
        '{"kind": 1}',
        '{"mcpu": "haswell"}',
        "cuda",
        "riscv/sifive-u74",
        "nvidia/jetson-orin-nano",
    ],
)
def test_an_unknown_target_says_what_is_accepted(text):
    with pytest.raises(TargetError, match="raspberry-pi/4b-aarch64"):
        parse_target(text)


def test_rules_cannot_be_changed():
    rules = rules_for(parse_target(A72))
    with pytest.raises(dataclasses.FrozenInstanceError):
        rules.isa = "avx2"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("site", "broken"),
    [
        (("conv2d", 64, 64, 1, 8, 8), None),
        (("conv2d", 33, 64, 1, 8, 8), "input channels"),
        (("conv2d", 64, 60, 1, 8, 8), "output channels"),
        (("conv2d", 64, 64, 2, 8, 8), "group"),
        (("conv2d", 64, 64, 1, 1, 8), "spatial"),
        (("dense", 64, 16), None),
        (("dense", 64, 10), "output channels"),
        (("dense", 16, 16), "input channels"),
    ],
)
def test_bitserial_rules_name_what_is_broken(site, broken):
    rules: TargetRules = rules_for(parse_target(A72))
    reason = rules.bitserial_legal(*site)
    assert reason is None if broken is None else broken in str(reason)


def test_the_widest_bitserial_operand():
    assert MAX_BITSERIAL_BITS == 6


@pytest.mark.parametrize(
    ("text", "pays"),
    [
        ("llvm -mcpu=haswell -mtriple=x86_64-linux-gnu", {(1, 1): True, (2, 1): True, (2, 2): False}),
        (A72, {(2, 2): True, (4, 2): True, (3, 3): True, (4, 3): False}),
    ],
)
def test_counting_bits_pays_for_few_of_them(text, pays):
    rules = rules_for(parse_target(text))
    assert {bits: rules.popcount_pays(*bits) for bits in pays} == pays
