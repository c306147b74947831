"""Stack frames as aligned as the vectors that LLVM spills into them.

The System V ABI aligns the stack to 16 bytes. LLVM keeps vectors on it that do not fit into the registers,
and aligns the frame for them only if it knew of an aligned variable before it chose the registers. Otherwise
each of 32 or 64 bytes may lie across two cache lines: whether it does is drawn when the process starts, and
kernels took up to 2.2 times as long where it did.
"""

from tvm import s_tir, tirx

# Of `llvm.prefetch`: for reading, to keep in all caches, data.
_PREFETCH = (0, 3, 1)
_ABI_BITS = 128


def align_stack(func: tirx.PrimFunc, vector_bits: int) -> tirx.PrimFunc:
    """Give a scheduled function, and the body of each of its parallel loops, a stack frame for its vectors.

    Each gets a variable of one vector, which LLVM cannot remove because it is prefetched.

    Parameters
    ----------
    func
        Scheduled, before TVM's passes.
    vector_bits
        Of the target's registers; up to 128 the ABI's alignment is enough.
    """
    if vector_bits <= _ABI_BITS:
        return func
    root = func.body
    if not isinstance(root, s_tir.SBlockRealize):
        return func.with_body(_with_variable(_in_parallel_loops(root, vector_bits), vector_bits))
    block = root.block
    body = _with_variable(_in_parallel_loops(block.body, vector_bits), vector_bits)
    aligned = s_tir.SBlock(
        block.iter_vars,
        block.reads,
        block.writes,
        block.name_hint,
        body,
        block.init,
        block.alloc_buffers,
        block.match_buffers,
        block.annotations,
    )
    return func.with_body(s_tir.SBlockRealize(root.iter_values, root.predicate, aligned))


def _in_parallel_loops(stmt: tirx.Stmt, vector_bits: int) -> tirx.Stmt:
    """As `align_stack`, of the parallel loops alone: TVM makes a function of each one's body."""
    if isinstance(stmt, tirx.SeqStmt):
        return tirx.SeqStmt([_in_parallel_loops(part, vector_bits) for part in stmt.seq])
    if not isinstance(stmt, tirx.For):
        return stmt
    if stmt.kind == tirx.ForKind.PARALLEL:
        body = _with_variable(stmt.body, vector_bits)
    else:
        body = _in_parallel_loops(stmt.body, vector_bits)
    return tirx.For(
        stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, stmt.thread_binding, stmt.annotations
    )


def _with_variable(body: tirx.Stmt, vector_bits: int) -> tirx.Stmt:
    """A statement with an aligned variable that lives as long as it: TVM shares its memory with no other."""
    # A vector's own alignment is what TVM gives it; small and global, it is on the stack.
    buffer = tirx.decl_buffer((1,), f"float32x{vector_bits // 32}", name="aligned")
    arguments = [tirx.const(value, "int32") for value in _PREFETCH]
    touch = tirx.Evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", buffer.data, *arguments))
    return tirx.SeqStmt([tirx.AllocBuffer(buffer), touch, body, touch])
