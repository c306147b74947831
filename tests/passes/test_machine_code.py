import os
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.support import cc
from tvm.tirx import PrimFunc

from tvm_compress.passes.machine_code import MOST_PARTS, object_files
from tvm_compress.passes.pipeline import build, lower
from tvm_compress.rpc.cross_compile import export_fcompile
from tvm_compress.schedules.target_rules import parse_target

RPI4 = "raspberry-pi/4b-aarch64"


def kernels_of(network):
    lowered = lower(network.module, "host")
    return {v.name_hint: f for v, f in lowered.functions.items() if isinstance(f, PrimFunc)}


def test_every_kernel_is_in_one_part(residual, tmp_path):
    kernels = kernels_of(residual)
    parts = object_files(kernels, parse_target("host"), tmp_path)
    assert 1 < len(parts) <= MOST_PARTS
    assert sorted(name for names in parts.values() for name in names) == sorted(kernels)
    cc.create_shared(str(tmp_path / "kernels.so"), [str(path) for path in parts])
    library = tvm.runtime.load_module(str(tmp_path / "kernels.so"))
    assert all(library.get_function(name) is not None for name in kernels)


@pytest.mark.parametrize("target", ["host", RPI4])
def test_a_library_does_not_depend_on_the_number_of_processors(residual, tmp_path, monkeypatch, target):
    link = export_fcompile(str(parse_target(target).attrs.get("mtriple", "")))
    made = []
    for processors in ({0}, {0, 1, 2}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, found=processors: found)
        path = build(residual.module, target).export(tmp_path / f"{len(processors)}.so", link)
        made.append(path.read_bytes())
    assert made[0] == made[1]


def test_the_parts_compute_what_one_module_does(residual):
    lowered = lower(residual.module, "host")
    results = [
        relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(residual.x)).numpy()
        for executable in (build(lowered, "host").executable, relax.build(lowered, parse_target("host")))
    ]
    np.testing.assert_array_equal(*results)


def test_constants_are_not_linked_as_c(residual, tmp_path):
    seen = []

    def link(output, objects, options=None):
        seen.extend(objects)
        cc.create_shared(output, objects, options)

    build(residual.module, "host").export(tmp_path / "net.so", fcompile=link)
    # TVM itself adds an empty C file where all kernels are objects.
    assert sum(Path(name).suffix == ".o" for name in seen) == len(seen) - 1
    assert not any(Path(name).name == "devc.c" for name in seen)
