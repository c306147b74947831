"""Store a site's weights as indices into a small codebook."""

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import IRModule, relax

from tvm_compress.errors import PolicyError
from tvm_compress.passes.graph import bindings, substitute
from tvm_compress.passes.module_pass import ModulePass
from tvm_compress.passes.params import (
    get_params,
    num_inputs,
    parameter_vars,
    require_stage,
    with_main,
    with_values,
)
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.passes.sites import Site, find_sites
from tvm_compress.schedules import ops

CODEBOOK = "_codebook"


@tvm.transform.module_pass(opt_level=0, name="tvm_compress.CodebookWeights")
class CodebookWeights(ModulePass):
    """Write the weights of the sites with `codebook_bits` as `lookup(indices, codebook)`; the stage stays.

    A weight parameter keeps its name and shape and becomes uint8; after it stands `NAME_codebook`, float32
    [1, K], or [O, K] where each output channel has values of its own. The weights must hold few values
    already (compressing them is the business of `tvm_compress.fastlc`): nothing is rounded here.

    Raises
    ------
    PolicyError
        Where a site's weights hold more than 2**codebook_bits values, over all and in a channel.
    """

    def __init__(self, policy: CompressionPolicy) -> None:
        self._policy = policy

    def transform_module(self, module: IRModule, context: tvm.transform.PassContext) -> IRModule:
        """Apply the pass to a module of stage float or qdq."""
        del context
        require_stage(module, "float", "qdq", what="CodebookWeights")
        params = get_params(module)
        found = {
            site.weight: find_codebook(site, params[site.weight], self._policy[site.name].codebook_bits)
            for site in find_sites(module)
            if self._policy[site.name].codebook_bits and params[site.weight].dtype == np.float32
        }
        return _rewrite(module, found) if found else module


@dataclass(frozen=True)
class Codebook:
    """Weights as `values[row, indices]`, the row being the output channel where there are several."""

    indices: np.ndarray
    values: np.ndarray

    def expand(self) -> np.ndarray:
        """Give the weights, float32."""
        rows = np.arange(len(self.values)).reshape(-1, *(1,) * (self.indices.ndim - 1))
        return self.values[rows, self.indices]


def find_codebook(site: Site, weight: np.ndarray, bits: int) -> Codebook:
    """Find the few values that weights hold; see `CodebookWeights`."""
    limit = 2**bits
    values, indices = np.unique(weight, return_inverse=True)
    if len(values) <= limit:
        return Codebook(indices.reshape(weight.shape).astype(np.uint8), values[None].astype(np.float32))
    rows = [np.unique(row, return_inverse=True) for row in weight.reshape(len(weight), -1)]
    longest = max(len(row) for row, _ in rows)
    if longest > limit:
        raise PolicyError(
            f"The weights of site {site.name!r} hold {len(values)} values, and a channel of them {longest}, "
            f"but a codebook of {bits} bits has {limit}.",
            "Compress them first: compress --method fastlc --scheme kmeans, with as many --bits.",
        )
    padded = np.stack([np.pad(row, (0, longest - len(row)), mode="edge") for row, _ in rows])
    chosen = np.stack([inverse for _, inverse in rows]).reshape(weight.shape)
    return Codebook(chosen.astype(np.uint8), padded.astype(np.float32))


def site_weights(module: IRModule, site: Site) -> np.ndarray:
    """Give a site's weights as the numbers that it computes with, from indices where they are such."""
    params = get_params(module)
    values = params.get(site.weight + CODEBOOK)
    return params[site.weight] if values is None else Codebook(params[site.weight], values).expand()


def _rewrite(module: IRModule, found: dict[str, Codebook]) -> IRModule:
    function = module["main"]
    old_values = get_params(module)
    params = list(function.params)[: num_inputs(function)]
    values: list[np.ndarray] = []
    looked_up: dict[relax.Var, relax.Call] = {}
    for var in parameter_vars(function):
        book = found.get(var.name)
        if book is None:
            params.append(var)
            values.append(old_values[var.name])
            continue
        indices = relax.Var(var.name, relax.TensorType(book.indices.shape, "uint8"))
        codebook = relax.Var(var.name + CODEBOOK, relax.TensorType(book.values.shape, "float32"))
        looked_up[var] = ops.call("lookup", [indices, codebook], axis=0)
        params += [indices, codebook]
        values += [book.indices, book.values]
    builder = relax.BlockBuilder()
    replaced: dict[relax.Var, relax.Expr] = {}
    with builder.function("main", params):
        with builder.dataflow():
            for var, value in bindings(function):
                for arg in value.args if isinstance(value, relax.Call) else ():
                    if arg in looked_up and arg not in replaced:
                        replaced[arg] = builder.emit(looked_up[arg])
                replaced[var] = builder.emit(substitute(value, replaced), name_hint=var.name)
            output = builder.emit_output(substitute(function.body.body, replaced))
        builder.emit_func_output(output)
    made = relax.transform.CanonicalizeBindings()(builder.finalize())["main"]
    return with_main(module, with_values(made.with_attrs(dict(function.attrs)), values))
