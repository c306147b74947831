import re
from functools import cache

import pytest
import torch
import tvm
from torch import nn

from tvm_compress.model import Model
from tvm_compress.passes.aligned_stack import align_stack
from tvm_compress.passes.pipeline import lower
from tvm_compress.schedules.apply import KernelInfo, kernel_infos
from tvm_compress.schedules.target_rules import parse_target, rules_for

REALIGNED = re.compile(r"andq\s+\$-(\d+), %rsp")
PARALLEL = re.compile(r"^\S*__tvm_parallel_lambda\S*:", re.MULTILINE)
# Stores of a kind of vectors to the stack, the unaligned ones.
STORED = {kind: re.compile(rf"vmovup[sd]\s+%{kind}mm\d+, -?\d*\(%r[sb]p\)") for kind in "yz"}


@cache
def kernels(text: str) -> list[KernelInfo]:
    """Convolutions that keep more vectors than there are registers."""
    layers = [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 96, 3, padding=1)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    target = parse_target(text)
    return kernel_infos(lower(Model.from_torch(network, (torch.zeros(1, 64, 8, 8),)).module, target), target)


def assembly(processor: str, cores: int, align: bool) -> str:
    text = f"llvm -mtriple=x86_64-linux-gnu -mcpu={processor} -num-cores={cores}"
    target = parse_target(text)
    bits = rules_for(target).vector_bits if align else 0
    functions = {one.name: align_stack(one.func, bits) for one in kernels(text)}
    named = {name: func.with_attr("global_symbol", name) for name, func in functions.items()}
    return tvm.tirx.build(tvm.IRModule(named), target).inspect_source("asm")


@pytest.mark.parametrize(("processor", "kind", "size"), [("skylake-avx512", "z", 64), ("haswell", "y", 32)])
def test_no_vector_is_kept_across_two_cache_lines(processor, kind, size):
    before, after = (assembly(processor, 1, align) for align in (False, True))
    assert len(STORED[kind].findall(before)) > 10
    # One is no spill, but copies arguments.
    assert len(STORED[kind].findall(after)) <= 1
    assert not REALIGNED.findall(before)
    assert {int(bytes_) for bytes_ in REALIGNED.findall(after)} == {size}


def test_each_threads_part_has_its_own_frame():
    one, four = (assembly("skylake-avx512", cores, align=True) for cores in (1, 4))
    assert not PARALLEL.findall(one)
    assert PARALLEL.findall(four)
    assert len(REALIGNED.findall(four)) == len(REALIGNED.findall(one)) + len(PARALLEL.findall(four))


def test_vectors_of_16_bytes_need_nothing():
    target = "raspberry-pi/4b-aarch64"
    bits = rules_for(parse_target(target)).vector_bits
    assert all(align_stack(one.func, bits).same_as(one.func) for one in kernels(target))
