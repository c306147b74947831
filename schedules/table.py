"""Functions of 8-bit integers as tables of 256 values: a kernel that looks up whole vectors."""

import math
from typing import Any

import numpy as np
from tvm import relax, te
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from tvm_compress.errors import KernelError
from tvm_compress.schedules import kernel
from tvm_compress.schedules.intrin.table import ByteTable, byte_table_for
from tvm_compress.schedules.target_rules import TargetRules

# op_pattern of TVM's fusion: nothing is fused with it.
_OPAQUE = 8

# Vectors of a step: they share what is loaded of the table.
_VECTORS = 2


def legalize(bb: relax.BlockBuilder, call: relax.Call, rules: TargetRules) -> relax.Expr:
    """Replace tvm_compress.table; see schedules.ops for what it computes.

    Raises
    ------
    KernelError
        Where the table or its input are of another form.
    """
    dtype = str(call.args[0].ty.dtype)
    values = kernel.constant_array(call.args[1], "values")
    if dtype not in ("int8", "uint8") or values.shape != (256,):
        raise KernelError(f"A table has 256 values for int8 or uint8, not {values.shape} for {dtype}.")
    lookup = byte_table_for(rules.isa)
    shape = tuple(int(extent) for extent in call.args[0].ty.shape)
    if lookup is None or values.itemsize > 1 or math.prod(shape) < lookup.lanes:
        return _value_by_value(bb, call, dtype)
    # By byte: -1 is byte 255.
    by_byte = values if dtype == "uint8" else np.roll(values, 128)
    func = bb.add_func(vector_kernel(shape, dtype, str(values.dtype), lookup, rules), "table")
    return relax.call_tir(func, [call.args[0], relax.const(lookup.prepare(by_byte))], out_ty=call.ty)


def _value_by_value(bb: relax.BlockBuilder, call: relax.Call, dtype: str) -> relax.Expr:
    lowest = int(np.iinfo(dtype).min)

    def compute(x: te.Tensor, values: te.Tensor) -> te.Tensor:
        return te.compute(x.shape, lambda *i: values[x(*i).astype("int32") - lowest], name="table")

    return bb.call_te(compute, *call.args, primfunc_name_hint="table")


def vector_kernel(
    shape: tuple[int, ...], dtype: str, result: str, lookup: ByteTable, rules: TargetRules
) -> PrimFunc:
    """Return the scheduled PrimFunc (data `dtype` of `shape`, prepared table) -> `result` of `shape`.

    The last step begins early enough to end with the last value, so no value is looked up by itself.
    """
    size, lanes = math.prod(shape), lookup.lanes
    vectors = min(_VECTORS, size // lanes)
    step = vectors * lanes
    steps = -(-size // step)
    entries = lookup.prepare(np.zeros(256, np.uint8)).size
    in_parallel = rules.threads > 1 and size >= kernel.MIN_PARALLEL_ELEMENTS
    loop: Any = T.parallel if in_parallel else T.serial

    # An expression each, as TVMScript keeps what is bound to a name in memory.
    def place(i: Any, vector: Any) -> Any:
        return T.ramp(T.min(i * step, size - step) + vector * lanes, 1, lanes)

    def index(source: Any, i: Any, vector: Any) -> Any:
        return T.reinterpret(source[place(i, vector)], dtype=f"uint8x{lanes}")

    @T.prim_func(s_tir=True)
    def main(data_handle: T.handle, table_handle: T.handle, found_handle: T.handle) -> None:
        T.func_attr({"tirx.noalias": True, "op_pattern": _OPAQUE, "tirx.is_scheduled": True})
        data = T.match_buffer(data_handle, shape, dtype)
        table = T.match_buffer(table_handle, (entries,), "uint8")
        found = T.match_buffer(found_handle, shape, result)
        source = T.decl_buffer((size,), dtype, data=data.data)
        target = T.decl_buffer((size,), result, data=found.data)
        for i in loop(steps):
            for v in T.unroll(vectors):
                target[place(i, v)] = T.reinterpret(
                    lookup.look_up(table, index(source, i, v)), dtype=f"{result}x{lanes}"
                )

    return main.without_attr("global_symbol")
