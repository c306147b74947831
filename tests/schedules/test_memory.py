"""The memory that a module states, against what the VM and LLVM are really asked for."""

import re
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import tvm
from tvm import relax

from tests.schedules.test_apply import residual_network
from tests.schedules.test_winograd import conv_module
from tvm_compress.model import load_model
from tvm_compress.passes.codebook_weights import CodebookWeights
from tvm_compress.passes.params import get_params, set_params
from tvm_compress.passes.pipeline import build
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.sites import find_sites
from tvm_compress.schedules import apply, winograd
from tvm_compress.schedules.memory import memory_use
from tvm_compress.schedules.target_rules import parse_target
from tvm_compress.schedules.winograd_algorithm import F4

HOST = parse_target("host")
ALLOCATE = re.compile(r"@__TVMBackendAllocWorkspace\b.*\n.*call ptr %\S+\(i32 \S+, i32 \S+, i64 (\d+)")


def allocated_by_the_vm(executable: relax.VMExecutable, x: np.ndarray) -> int:
    """Bytes of all storages that one call of `main` asks for."""
    sizes: list[int] = []

    def listen(func: Any, name: str, before: bool, result: Any, *args: Any) -> int:
        del func, result
        if before and name == "vm.builtin.alloc_storage":
            sizes.append(int(args[1][0]))
        return 0

    machine = relax.VirtualMachine(executable, tvm.cpu())
    machine.set_instrument(listen)
    machine["main"](tvm.runtime.tensor(x))
    return sum(sizes)


def test_activations_are_what_the_vm_allocates() -> None:
    module, w, fc = residual_network()
    with patch.object(winograd, "choose_algorithm", lambda *arguments: None):
        lowered = apply.lower_to_kernels(module, HOST)
    used = memory_use(lowered, HOST)
    x = np.zeros((1, 8, 8, 16), np.float32)
    assert used.activations == allocated_by_the_vm(relax.build(lowered, target=HOST), x)
    # Two maps of 8 x 8 x 16, of which the second may not overwrite what it is computed from, and the logits.
    assert 2 * x.nbytes + 40 <= used.activations < 3 * x.nbytes
    # 10 classes are padded to whole vectors.
    weights = sum(part.nbytes for part in w)
    assert weights + fc.nbytes <= used.constants <= weights + 2 * fc.nbytes
    assert used.peak == used.constants + used.activations + used.workspace == used.to_dict()["peak_bytes"]


def test_weights_in_a_codebook_are_constants_as_indices_and_activations_once_expanded() -> None:
    dense = load_model("sample:resnet8-fashion").module
    weights = {site.weight: get_params(dense)[site.weight] for site in find_sites(dense)}
    signs = {name: np.copysign(np.float32(0.1), w) for name, w in weights.items()}
    policy = CompressionPolicy(sites={s.name: SitePolicy(codebook_bits=1) for s in find_sites(dense)})
    compiled = build(CodebookWeights(policy)(set_params(dense, signs)), "host")
    used = memory_use(compiled.module, compiled.target)
    # 32 times less than float32, besides biases, codebooks and the padding of indices to whole bytes.
    stored = sum(w.size for w in weights.values()) / 8
    assert stored < used.constants < 2 * stored
    x = np.zeros((1, 1, 28, 28), np.float32)
    assert used.activations == allocated_by_the_vm(compiled.executable, x)


@pytest.mark.parametrize("cores", [1, 2])
def test_workspace_is_what_the_library_asks_for(cores: int) -> None:
    target = parse_target(f"llvm -mcpu=haswell -mtriple=x86_64-unknown-linux-gnu -num-cores={cores}")
    weight = np.zeros((64, 32, 3, 3), np.float32)
    with patch.object(winograd, "choose_algorithm", lambda *arguments: F4):
        lowered = apply.lower_to_kernels(conv_module((1, 32, 32, 32), weight), target)
    (source,) = (part.inspect_source("ll") for part in relax.build(lowered, target=target).mod.imports)
    padded, *of_each_thread = [int(size) for size in ALLOCATE.findall(source)]
    assert padded == 34 * 34 * 32 * weight.itemsize
    assert len(of_each_thread) == source.count("@__TVMBackendAllocWorkspace,") - 1
    assert memory_use(lowered, target).workspace == padded + cores * sum(of_each_thread)
