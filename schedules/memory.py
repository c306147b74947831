"""What a lowered module keeps in memory while it runs, counted from what TVM makes of it."""

import hashlib
import math
from dataclasses import dataclass

import tvm
from tvm import relax, tirx
from tvm.target import Target

from tvm_compress.schedules.target_rules import rules_for


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that an inference needs, beside the code and the caller's input.

    Attributes
    ----------
    constants
        Weights as the kernels want them, biases, scales; each once.
    activations
        What TVM's static plan allocates between the kernels, with the output. Tensors that are not needed at
        the same time share their storage.
    workspace
        What the kernel that needs most allocates for itself, by all of its threads.
    """

    constants: int
    activations: int
    workspace: int

    @property
    def peak(self) -> int:
        """All three together."""
        return self.constants + self.activations + self.workspace

    def to_dict(self) -> dict[str, int]:
        """Return the parts and their sum, named with their unit."""
        return {
            "constant_bytes": self.constants,
            "activation_bytes": self.activations,
            "workspace_bytes": self.workspace,
            "peak_bytes": self.peak,
        }


def memory_use(lowered: tvm.IRModule, target: Target) -> MemoryUse:
    """Count what a module of scheduled kernels takes when `relax.build` has built it for the target."""
    # As it is built: the pipeline that Relax has for processors computes what is made of constants alone.
    with target:
        module = relax.get_pipeline("default")(lowered)
    constants: dict[tuple[str, tuple[int, ...], bytes], int] = {}
    storages: list[int] = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, tvm.ir.GenericConst) and isinstance(expr.value, tvm.runtime.Tensor):
            # The library holds equal tensors once.
            array = expr.value.numpy()
            digest = hashlib.sha256(array.tobytes()).digest()
            constants[str(array.dtype), array.shape, digest] = array.nbytes
        elif isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "relax.vm.alloc_storage":
            storages.append(int(expr.args[0].values[0]))

    kernels = {}
    for gv, func in module.functions.items():
        if isinstance(func, relax.Function):
            relax.analysis.post_order_visit(func, visit)
        elif isinstance(func, tirx.PrimFunc):
            kernels[gv] = func
    return MemoryUse(sum(constants.values()), sum(storages), _largest_workspace(kernels, target))


def _largest_workspace(kernels: dict[tvm.ir.GlobalVar, tirx.PrimFunc], target: Target) -> int:
    passes, _, _ = tirx.get_default_tir_pipeline(target)
    module = passes(tirx.transform.BindTarget(target.with_host(target))(tvm.IRModule(kernels)))
    threads = rules_for(target).threads
    return max((_allocated(func.body, threads) for func in module.functions.values()), default=0)


def _allocated(stmt: tirx.Stmt, threads: int, copies: int = 1) -> int:
    """Bytes that a statement allocates; in a parallel loop each thread does."""
    if isinstance(stmt, tirx.AllocBuffer):
        buffer = stmt.buffer
        elements = math.prod(int(extent) for extent in buffer.shape)
        return copies * elements * tvm.DataType(str(buffer.dtype)).itemsize
    if isinstance(stmt, tirx.SeqStmt):
        return sum(_allocated(part, threads, copies) for part in stmt.seq)
    if isinstance(stmt, tirx.IfThenElse):
        branches = (stmt.then_case, stmt.else_case)
        return max(_allocated(branch, threads, copies) for branch in branches if branch is not None)
    if isinstance(stmt, tirx.For) and stmt.kind == tirx.ForKind.PARALLEL:
        copies = threads if not isinstance(stmt.extent, tirx.IntImm) else min(threads, int(stmt.extent))
    return _allocated(stmt.body, threads, copies) if hasattr(stmt, "body") else 0
