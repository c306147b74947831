"""Weights of fp32 kernels: constants, or indices into a codebook, which a kernel of its own expands."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax, s_tir, te
from tvm.tirx import PrimFunc

from tvm_compress.errors import KernelError
from tvm_compress.schedules import kernel
from tvm_compress.schedules.kernel import INFO
from tvm_compress.schedules.ops import PREFIX

LOOKUP = PREFIX + "lookup"
# op_pattern of TVM's fusion: nothing is fused with it.
_OPAQUE = 8

Pack = Callable[[np.ndarray], np.ndarray]
# From the indices of a packed weight to its output channel.
Channel = Callable[..., Any]


@dataclass(frozen=True)
class Weights:
    """Constant weights, as they are (`codebook` None), or as indices into the rows of a codebook [R, K].

    Attributes
    ----------
    array
        float32 weights, or uint8 indices.
    axis
        Which axis counts the codebook's rows, where there are several.
    """

    array: np.ndarray
    codebook: np.ndarray | None = None
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights."""
        return self.array.shape

    def transposed(self) -> "Weights":
        """Matrix of weights with its two axes exchanged."""
        return Weights(self.array.T, self.codebook, 1 - self.axis)

    def packed(self, bb: relax.BlockBuilder, pack: Pack, channel: Channel, channels: int) -> relax.Expr:
        """Give the packed weights: a constant, or what the kernel gives that is emitted to expand them.

        Parameters
        ----------
        pack
            Brings OIHW (or [O, I]) into the kernel's layout; may fill up with zeros.
        channel, channels
            Output channel at a place of that layout, and how many there are, those that only fill up too.
        """
        if self.codebook is None:
            return relax.const(np.ascontiguousarray(pack(self.array)))
        assert self.axis == 0
        return _emit_expansion(bb, pack(self.array), self.codebook, channel, channels)


def read_weights(bb: relax.BlockBuilder | None, expr: relax.Expr, what: str) -> Weights:
    """Read the weights of a site's call.

    Raises
    ------
    KernelError
        Where they are neither constant nor looked up with constants.
    """
    bound = bb.lookup_binding(expr) if bb is not None and isinstance(expr, relax.Var) else expr
    if not is_lookup(bound):
        return Weights(kernel.constant_array(expr, what))
    indices, codebook = (kernel.constant_array(arg, what) for arg in bound.args)
    return Weights(indices, codebook, int(bound.attrs["axis"]))


def is_lookup(expr: relax.Expr) -> bool:
    """Whether an expression is a call of `lookup`."""
    return isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == LOOKUP


def stored_bits(entries: int) -> int:
    """Bits in which an index into so many entries is stored: 1, 2, 4 or 8."""
    bits = next((b for b in (1, 2, 4, 8) if entries <= 2**b), 0)
    if not bits:
        raise KernelError(f"A codebook has 256 entries at most, not {entries}.")
    return bits


def pack_indices(indices: np.ndarray, bits: int) -> np.ndarray:
    """Pack the last axis into n bytes: byte j holds the indices j, j + n, j + 2 n, ..., lowest bits first."""
    per_byte = 8 // bits
    parts = np.split(indices, per_byte, axis=-1)
    packed = np.zeros_like(parts[0])
    for place, part in enumerate(parts):
        packed |= part << np.uint8(bits * place)
    return packed


def _emit_expansion(
    bb: relax.BlockBuilder, indices: np.ndarray, codebook: np.ndarray, channel: Channel, channels: int
) -> relax.Expr:
    bits = stored_bits(codebook.shape[1])
    while indices.shape[-1] % (8 // bits):
        bits *= 2
    packed = pack_indices(np.ascontiguousarray(indices), bits)
    rows = codebook.shape[0]
    if rows > 1:
        # What only fills up reads some row: its results are cropped.
        codebook = np.pad(codebook, ((0, channels - rows), (0, 0)), mode="edge")
    func = bb.add_func(_expansion_kernel(packed.shape, codebook.shape, bits, channel), "lookup_weights")
    args = [relax.const(packed), relax.const(np.ascontiguousarray(codebook))]
    return bb.emit(relax.call_tir(func, args, out_ty=relax.TensorType(indices.shape, "float32")))


def _expansion_kernel(
    packed: tuple[int, ...], codebook: tuple[int, ...], bits: int, channel: Channel
) -> PrimFunc:
    """Return the scheduled PrimFunc (packed indices, codebook) -> weights."""
    width, mask = packed[-1], 2**bits - 1
    shape = (*packed[:-1], width * (8 // bits))
    stored = te.placeholder(packed, "uint8", name="stored")
    values = te.placeholder(codebook, "float32", name="values")

    def value(*place: Any) -> Any:
        *outer, last = place
        byte = stored(*outer, last % width).astype("int32")
        index = (byte >> (last // width * bits)) & mask if bits < 8 else byte
        return values[channel(*place) if codebook[0] > 1 else 0, index]

    sch = s_tir.Schedule(te.create_prim_func([stored, values, te.compute(shape, value, name="lookup")]))
    loops = sch.get_loops(sch.get_sblock("lookup"))
    # Cut where the shift changes: then shift and byte follow from the loops, without a division.
    part, _ = sch.split(loops[-1], [8 // bits, width])
    sch.unroll(part)
    info = {"operator": "lookup", "weight_bits": bits}
    func = sch.mod["main"].without_attr("global_symbol").with_attr("tirx.noalias", True)
    return (
        func.with_attr("op_pattern", _OPAQUE)
        .with_attr("tirx.is_scheduled", True)
        .with_attr(INFO, json.dumps(info))
    )
