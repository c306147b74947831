"""Which layers of an imported QDQ model compute in integers, and why the others do not."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax

from tvm_compress.importer.onnx_qdq import WeightGrid
from tvm_compress.passes.annotate_quantization import site_calls
from tvm_compress.passes.graph import definitions, operator
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy, fingerprint
from tvm_compress.passes.quantization import weight_limit
from tvm_compress.passes.quantize_weights import WEIGHT_BITS, QuantizeWeights
from tvm_compress.passes.sites import find_sites

# What may stand between dequantize and a layer: it selects and moves integers as well as floats.
_MOVES = ("relax.permute_dims", "relax.reshape", "relax.nn.batch_flatten", "relax.nn.max_pool2d")


class QuantizedImportWarning(UserWarning):
    """A layer that is quantized in the file computes in float here."""


@dataclass(frozen=True)
class QuantizedImport:
    """A QDQ module, with a policy that says which sites are INT8 and, as a note, why the others are not."""

    module: tvm.IRModule
    policy: CompressionPolicy


def quantize_as_imported(
    module: tvm.IRModule, grids: Mapping[str, WeightGrid], refused: Mapping[str, str]
) -> QuantizedImport:
    """Quantize the weights of a canonical module of stage qdq as they were in the file.

    Parameters
    ----------
    grids, refused
        See `onnx_graph.NormalizedGraph`.

    Warns
    -----
    QuantizedImportWarning
        For each layer whose weights are quantized in the file, but in no way that the kernels take.
    """
    function = module["main"]
    defined = definitions(function)
    scales: dict[str, np.ndarray] = {}
    chosen: dict[str, SitePolicy] = {}
    for call in site_calls(function):
        grid = grids.get(call.weight.name)
        reason = refused.get(call.weight.name, "")
        if not reason and not _reads_integers(call.tensor, defined):
            reason = "its input is not quantized"
        if not reason or grid is None:
            reason = _why_not(grid)
        if reason:
            chosen[call.name] = SitePolicy(note=f"FP32: {reason}")
            if grid is not None:
                text = f"Layer {call.name!r} is quantized in the file, but computes in float: {reason}."
                warnings.warn(text, QuantizedImportWarning, stacklevel=2)
        elif grid is not None:
            channels = grid.integers.shape[0]
            scales[call.name] = np.ascontiguousarray(np.broadcast_to(grid.scale, (channels,)))
            chosen[call.name] = SitePolicy(scheme="int8", weight_bits=8, activation_bits=8)
    module = QuantizeWeights(scales)(module)
    policy = CompressionPolicy(sites=chosen, found_by="imported", model=fingerprint(find_sites(module)))
    return QuantizedImport(module, policy)


def _why_not(grid: WeightGrid | None) -> str:
    """Why weights cannot be used as integers; "" where they can."""
    if grid is None:
        return "its weights are not quantized"
    if grid.scale.size > 1 and grid.axis != 0:
        return f"its weights have a scale for each index of axis {grid.axis}, not for each output channel"
    limit, largest = weight_limit(WEIGHT_BITS), int(np.abs(grid.integers).max(initial=0))
    if largest > limit:
        return f"its weights less their zero point reach {largest}; the kernels take -{limit} to {limit}"
    return ""


def _reads_integers(tensor: relax.Var, defined: Mapping[relax.Var, relax.Expr]) -> bool:
    while operator(defined.get(tensor)) in _MOVES:
        tensor = defined[tensor].args[0]
    return operator(defined.get(tensor)) == "relax.dequantize"
