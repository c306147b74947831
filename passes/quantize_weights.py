"""QuantizeWeights: give layers weight scales that somebody else chose, such as the writer of an ONNX file."""

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import IRModule, relax

from tvm_compress.errors import ModelError
from tvm_compress.passes.annotate_quantization import site_calls
from tvm_compress.passes.graph import bindings, substitute
from tvm_compress.passes.insert_qdq import WEIGHT_SCALE, emit_quantized_weight
from tvm_compress.passes.module_pass import ModulePass
from tvm_compress.passes.params import get_params, require_stage, with_main, with_values

WEIGHT_BITS = 8


@tvm.transform.module_pass(opt_level=0, name="tvm_compress.QuantizeWeights")
class QuantizeWeights(ModulePass):
    """Insert quantize -> clip -> dequantize (8 bits) for the weights of some sites: the stage stays qdq.

    Activations are quantized in the module already. New parameters, after all others: `SITE.weight_scale`,
    float32 [O].

    Parameters
    ----------
    scales
        Site -> scale of each output channel, [O].

    Raises
    ------
    ModelError
        If the module is not at the stage "qdq", or has no such site with weights in float.
    """

    def __init__(self, scales: Mapping[str, np.ndarray]) -> None:
        self.scales = dict(scales)

    def transform_module(self, module: IRModule, _: tvm.transform.PassContext) -> IRModule:
        """Return the module with the inserted operators and parameters."""
        require_stage(module, "qdq", what="QuantizeWeights")
        function, values = module["main"], get_params(module)
        weights = {call.name: call.weight for call in site_calls(function)}
        if missing := sorted(set(self.scales) - set(weights)):
            raise ModelError(f"The module has no site {missing[0]!r} with weights in float.")
        scales = {
            weights[name]: relax.Var(name + WEIGHT_SCALE, relax.TensorType(scale.shape, "float32"))
            for name, scale in self.scales.items()
        }
        new = [np.asarray(scale, np.float32) for scale in self.scales.values()]
        return with_main(module, with_values(_rewrite(function, scales), [*values.values(), *new]))


def _rewrite(function: relax.Function, scales: Mapping[relax.Var, relax.Var]) -> relax.Function:
    builder = relax.BlockBuilder()
    replaced: dict[relax.Var, relax.Expr] = {}
    with builder.function("main", [*function.params, *scales.values()]):
        with builder.dataflow():
            for weight, scale in scales.items():
                replaced[weight] = emit_quantized_weight(builder, weight, scale, WEIGHT_BITS)
            for var, value in bindings(function):
                replaced[var] = builder.emit(substitute(value, replaced), name_hint=var.name)
            result = builder.emit_output(substitute(function.body.body, replaced))
        builder.emit_func_output(result)
    module = relax.transform.CanonicalizeBindings()(builder.finalize())
    return module["main"].with_attrs(dict(function.attrs))
