"""A kernel that does nothing but read: what a byte takes, by how many are read again and again."""

from tvm import s_tir, te
from tvm.target import Target

from tvm_compress.schedules.apply import KernelInfo
from tvm_compress.schedules.kernel_key import kernel_key

# Sums side by side: enough vectors of any target that none waits for the one before.
LANES = 64


def reading_kernel(size: int, target: Target) -> KernelInfo:
    """Kernel that adds up `size` bytes of int32, a multiple of 4 * LANES, into LANES sums.

    Its time tells of the device, not of a network: it has no features for a latency model.
    """
    rows = size // (4 * LANES)
    data = te.placeholder((rows, LANES), "int32", name="data")
    row = te.reduce_axis((0, rows), name="row")
    sums = te.compute((LANES,), lambda lane: te.sum(data[row, lane], axis=row), name="sums")
    sch = s_tir.Schedule(te.create_prim_func([data, sums]))
    block = sch.get_sblock("sums")
    lane_loop, row_loop = sch.get_loops(block)
    sch.reorder(row_loop, lane_loop)
    sch.vectorize(lane_loop)
    sch.decompose_reduction(block, row_loop)
    func = sch.mod["main"]
    return KernelInfo(f"read{size}", "read", 1, kernel_key(func, target), {}, func)
