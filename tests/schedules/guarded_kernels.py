"""Runs kernels over guarded memory, each in its own process: `-m tests.schedules.guarded_kernels BATCH`.

Kernels are called as functions of their library, not by the VM, which allocates tensors itself. What a kernel
allocates for itself inside stays unguarded. Prints a JSON list: `case`, `placement`, `kernels` that were
started, and `outcome`, which is "right", or what went wrong.
"""

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax, tirx

from tests.schedules.guarded_cases import BATCHES, HOST, Case
from tests.schedules.guarded_memory import GuardedArray, Placement


def any_address(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Let the arguments lie anywhere; else they start at multiples of 64, and few of them end at a page.

    Only the instructions that move aligned vectors change, not what is read and written.
    """
    text = re.sub(r'("data_alignment": *)\d+', r"\g<1>1", tvm.ir.save_json(func))
    return tvm.ir.load_json(text)


def guarded_copy(values: np.ndarray, placement: Placement) -> GuardedArray:
    guarded = GuardedArray(values.shape, str(values.dtype), placement)
    guarded.array[...] = values
    guarded.make_read_only()
    return guarded


def as_tensor(guarded: GuardedArray) -> Any:
    """Give TVM the array's own memory; DLPack gives no read-only arrays, so the flag is not told."""
    array = guarded.array
    tensor = tvm_ffi.from_dlpack(array)
    assert np.from_dlpack(tensor).ctypes.data == array.ctypes.data
    return tensor


def run_kernels(
    lowered: tvm.IRModule,
    library: Any,
    inputs: tuple[np.ndarray, ...],
    placement: Placement,
    started: Callable[[str], None],
) -> tuple[np.ndarray, list[GuardedArray]]:
    """Call the kernels in the order of `main`; gives its output, and all guarded arrays."""
    main = lowered["main"]
    values: dict[relax.Expr, GuardedArray] = {
        parameter: guarded_copy(value, placement)
        for parameter, value in zip(main.params, inputs, strict=True)
    }
    every = list(values.values())
    last = None
    for block in main.body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, relax.Var):
                values[binding.var] = values[call]
                continue
            arguments = []
            for argument in call.args[1].fields:
                if isinstance(argument, tvm.ir.GenericConst):
                    every.append(guarded_copy(argument.value.numpy(), placement))
                    arguments.append(every[-1])
                else:
                    arguments.append(values[argument])
            shape = tuple(int(extent) for extent in call.ty.shape)
            last = GuardedArray(shape, str(call.ty.dtype), placement)
            name = call.args[0].name_hint
            started(name)
            library[name](*map(as_tensor, [*arguments, last]))
            last.make_read_only()
            values[binding.var] = last
            every.append(last)
    assert last is not None
    return last.array, every


def build(lowered: tvm.IRModule) -> Any:
    functions = {
        gv: any_address(func).with_attr("global_symbol", gv.name_hint)
        for gv, func in lowered.functions.items()
        if isinstance(func, tirx.PrimFunc)
    }
    return tvm.compile(tvm.IRModule(functions), target=HOST)


def attempt(case: Case, library: Any, placement: Placement) -> dict[str, Any]:
    """Run a case in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _run_in_child(case, library, placement, writer)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as stream:
        lines = stream.read().split()
    _, status = os.waitpid(child, 0)
    outcome = "the process failed"
    if os.WIFSIGNALED(status):
        outcome = f"died of {signal.Signals(os.WTERMSIG(status)).name}"
    elif os.WEXITSTATUS(status) == 0:
        outcome = lines.pop().replace("_", " ")
    return {"case": case.name, "placement": placement, "kernels": lines, "outcome": outcome}


def _run_in_child(case: Case, library: Any, placement: Placement, writer: int) -> None:
    def tell(word: str) -> None:
        os.write(writer, f"{word}\n".encode())

    output, every = run_kernels(case.lowered, library, case.inputs, placement, tell)
    close = np.allclose(output, case.expected, rtol=1e-3, atol=1e-3)
    exact = output.dtype.kind == "f" or np.array_equal(output, case.expected)
    if not all(guarded.surroundings_are_untouched for guarded in every):
        tell("wrote_beside_an_array")
    else:
        tell("right" if close and exact else "wrong_result")
    os._exit(0)


def main(names: list[str]) -> None:
    results = []
    for name in names:
        for case in BATCHES[name]():
            names_found = [gv.name_hint for gv in case.lowered.functions]
            assert any(case.kernel in found for found in names_found), (case.name, names_found)
            library = build(case.lowered)
            for placement in ("end", "begin"):
                results.append(attempt(case, library, placement))
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
