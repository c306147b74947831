"""From scheduled kernels to object files: LLVM works on several parts of a module at once."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import tvm
from tvm import IRModule, relax
from tvm.ir.transform import PassContext
from tvm.target import Target
from tvm.tirx import PrimFunc

from tvm_compress.passes.aligned_stack import align_stack
from tvm_compress.schedules.target_rules import rules_for

# So many object files at most: the same on every machine, however many threads make them, so that a library
# is the same too.
MOST_PARTS = 8


def code_generation() -> PassContext:
    """Settings that kernels are compiled by, in networks and alone: the current ones but two passes.

    A kernel does not check its arguments, which would take a fifth of a small network's code: the VM's `main`
    checks the inputs, and all other shapes are fixed. Common subexpressions are left to LLVM.
    """
    current = PassContext.current()
    left_out = {"tirx.disable_assert": True, "tirx.disable_cse_tir": True}
    return PassContext(
        current.opt_level,
        current.required_pass,
        current.disabled_pass,
        current.instruments,
        {**current.config, **left_out},
    )


def object_files(functions: Mapping[str, PrimFunc], target: Target, folder: Path) -> dict[Path, list[str]]:
    """Compile functions into object files in a folder; the names of the functions in each.

    Parameters
    ----------
    functions
        Scheduled, by the names that become their symbols.
    """
    names = sorted(functions)
    count = min(MOST_PARTS, len(names))
    parts = {folder / f"part{i}.o": names[i::count] for i in range(count)}
    context = code_generation()  # those of other threads are not this one's
    bits = rules_for(target).vector_bits

    def compile_part(path: Path) -> None:
        with context:
            aligned = {name: align_stack(functions[name], bits) for name in parts[path]}
            kernels = {name: func.with_attr("global_symbol", name) for name, func in aligned.items()}
            module = tvm.tirx.build(IRModule(kernels), target)
        module.write_to_file(str(path), "o")

    # TVM and LLVM let other threads run while they work.
    with ThreadPoolExecutor(min(len(parts), len(os.sched_getaffinity(0))) or 1) as threads:
        list(threads.map(compile_part, parts))
    return parts


def build_executable(lowered: IRModule, target: Target) -> relax.VMExecutable:
    """Build what `relax.build` does, in less time where there are several processors."""
    pipeline = tvm.transform.Sequential([relax.get_pipeline("default"), _with_compiled_kernels(target)])
    with code_generation():
        return relax.build(lowered, target, relax_pipeline=pipeline)


def _with_compiled_kernels(target: Target) -> tvm.transform.Pass:
    """Make the pass that puts machine code in the place of the kernels."""

    def compiled(module: IRModule, context: PassContext) -> IRModule:
        del context
        kernels = {v.name_hint: f for v, f in module.functions.items() if isinstance(f, PrimFunc)}
        with TemporaryDirectory(prefix="tvm-compress-") as folder:
            parts = object_files(kernels, target, Path(folder))
            libraries = [_library(path, names) for path, names in parts.items()]
        functions = {
            variable: relax.ExternFunc(variable.name_hint) if variable.name_hint in kernels else function
            for variable, function in module.functions.items()
        }
        return IRModule(functions, attrs=module.attrs).with_attr("external_mods", libraries)

    return tvm.transform.module_pass(compiled, opt_level=0, name="tvm_compress.machine_code")


def _library(path: Path, names: Sequence[str]) -> tvm.runtime.Module:
    return tvm.runtime.load_static_library(str(path), list(names))
