"""AddBias: give layers without a bias one of zeros, for whoever wants to change it."""

from collections.abc import Collection

import numpy as np
import tvm
from tvm import IRModule, relax

from tvm_compress.errors import ModelError
from tvm_compress.passes.graph import bindings, substitute
from tvm_compress.passes.module_pass import ModulePass
from tvm_compress.passes.params import get_params, require_stage, with_main, with_values
from tvm_compress.passes.sites import site_outputs


@tvm.transform.module_pass(opt_level=0, name="tvm_compress.AddBias")
class AddBias(ModulePass):
    """Add a parameter `SITE.bias` of zeros, after all others, to what each named site computes.

    Raises
    ------
    ModelError
        If the module is neither at the stage "float" nor "qdq", or has no such site, or has a parameter of
        that name.
    """

    def __init__(self, sites: Collection[str]) -> None:
        self.sites = tuple(sites)

    def transform_module(self, module: IRModule, _: tvm.transform.PassContext) -> IRModule:
        """Return the module with the additions."""
        require_stage(module, "float", "qdq", what="AddBias")
        function, values = module["main"], get_params(module)
        outputs = site_outputs(function)
        for name in self.sites:
            if name not in outputs:
                raise ModelError(f"The module has no site {name!r}.", f"Its sites are: {', '.join(outputs)}.")
            if f"{name}.bias" in values:
                raise ModelError(f"Site {name!r} has a parameter {name}.bias already.")
        biases: dict[relax.Var, relax.Var] = {}
        for name in self.sites:
            size = int(outputs[name].ty.shape[-1])
            biases[outputs[name]] = relax.Var(f"{name}.bias", relax.TensorType((size,), "float32"))
        zeros = [np.zeros(int(bias.ty.shape[0]), np.float32) for bias in biases.values()]
        function = _with_biases(function, biases)
        return with_main(module, with_values(function, [*values.values(), *zeros]))


def _with_biases(function: relax.Function, biases: dict[relax.Var, relax.Var]) -> relax.Function:
    builder = relax.BlockBuilder()
    replaced: dict[relax.Var, relax.Expr] = {}
    with builder.function("main", [*function.params, *biases.values()]):
        with builder.dataflow():
            for var, value in bindings(function):
                made = builder.emit(substitute(value, replaced), name_hint=var.name)
                if var in biases:
                    made = builder.emit(relax.op.add(made, biases[var]))
                replaced[var] = made
            result = builder.emit_output(substitute(function.body.body, replaced))
        builder.emit_func_output(result)
    module = relax.transform.CanonicalizeBindings()(builder.finalize())
    return module["main"].with_attrs(dict(function.attrs))
