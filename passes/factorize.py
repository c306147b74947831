"""Replace a site by two of low rank that compute nearly the same."""

import numpy as np
import tvm
from tvm import IRModule, relax

from tvm_compress.errors import PolicyError
from tvm_compress.passes.graph import bindings, operator, substitute, weight_parameter
from tvm_compress.passes.module_pass import ModulePass
from tvm_compress.passes.params import (
    get_params,
    num_inputs,
    parameter_vars,
    require_stage,
    with_main,
    with_values,
)
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.sites import Site, find_sites

FIRST, SECOND = ".first", ".second"


@tvm.transform.module_pass(opt_level=0, name="tvm_compress.Factorize")
class Factorize(ModulePass):
    """Replace each site to which a policy gives a rank by two: float -> float.

    The weights become the product of two factors by a truncated singular value decomposition, each taking the
    square root of the singular values. Site S becomes `S.first` and `S.second`; bias and batch norm stay
    behind the second.

    - dense [O, I]: [rank, I], then [O, rank];
    - convolution, "channel": the kernel from I to `rank` channels, then 1 x 1 to O channels;
    - convolution, "spatial": a column (kh x 1) to `rank` channels, then a row (1 x kw).

    Raises
    ------
    PolicyError
        Where a site is grouped, the rank is beyond what its matrix can have, or the site is not float32.
    """

    def __init__(self, policy: CompressionPolicy) -> None:
        self._policy = policy

    def transform_module(self, module: IRModule, context: tvm.transform.PassContext) -> IRModule:
        """Apply the pass."""
        del context
        require_stage(module, "float", what="Factorize")
        wanted = {s.name: s for s in find_sites(module) if self._policy[s.name].rank is not None}
        if not wanted:
            return module
        for name, site in wanted.items():
            _check(site, self._policy[name])
        return _Factorizer(module, wanted, self._policy).run()


def factorizable(site: Site) -> bool:
    """Whether a site can be split into two of low rank: grouped convolutions cannot."""
    return site.groups == 1


def matrix_shape(weight_shape: tuple[int, ...], factorization: str) -> tuple[int, int]:
    """Rows and columns of the matrix whose rank counts."""
    if len(weight_shape) == 2:
        return weight_shape[0], weight_shape[1]
    out, ins, height, width = weight_shape
    return (out, ins * height * width) if factorization == "channel" else (ins * height, out * width)


def as_matrix(weight: np.ndarray, factorization: str) -> np.ndarray:
    """Give the matrix whose rank counts: [O, I kh kw] ("channel", and dense), or [I kh, O kw] ("spatial")."""
    rows, columns = matrix_shape(weight.shape, factorization)
    if weight.ndim == 4 and factorization == "spatial":
        weight = weight.transpose(1, 2, 0, 3)
    return weight.reshape(rows, columns)


def from_matrix(matrix: np.ndarray, weight_shape: tuple[int, ...], factorization: str) -> np.ndarray:
    """Undo `as_matrix`."""
    if len(weight_shape) == 4 and factorization == "spatial":
        out, ins, height, width = weight_shape
        return matrix.reshape(ins, height, out, width).transpose(2, 0, 1, 3)
    return matrix.reshape(weight_shape)


def singular(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decompose into singular values and vectors: `matrix = (u * s) @ v`.

    Done by the smaller of the two Gram matrices: several times faster than LAPACK for long matrices; singular
    values below 1e-7 of the largest are not exact.
    """
    matrix = np.asarray(matrix, np.float64)
    if matrix.shape[0] > matrix.shape[1]:
        u, s, v = singular(matrix.T)
        return v.T, s, u.T
    squares, u = np.linalg.eigh(matrix @ matrix.T)
    s = np.sqrt(np.maximum(squares[::-1], 0.0))
    u = u[:, ::-1]
    v = u.T @ matrix
    return u, s, np.divide(v, s[:, None], out=np.zeros_like(v), where=s[:, None] > 0)


def truncate(matrix: np.ndarray, rank: int) -> np.ndarray:
    """Give the nearest matrix of a rank."""
    matrix = np.asarray(matrix, np.float64)
    if matrix.shape[0] > matrix.shape[1]:
        return truncate(matrix.T, rank).T
    basis = np.linalg.eigh(matrix @ matrix.T)[1][:, ::-1][:, :rank]
    return basis @ (basis.T @ matrix)


def factors(weight: np.ndarray, rank: int, factorization: str) -> tuple[np.ndarray, np.ndarray]:
    """Give the weights of the two layers, float32, in their own layouts (OIHW, or [out, in])."""
    u, s, v = singular(as_matrix(weight, factorization))
    root = np.sqrt(s[:rank])
    left, right = u[:, :rank] * root, root[:, None] * v[:rank]
    if weight.ndim == 2:
        first, second = right, left
    elif factorization == "channel":
        out, ins, height, width = weight.shape
        first, second = right.reshape(rank, ins, height, width), left.reshape(out, rank, 1, 1)
    else:
        out, ins, height, width = weight.shape
        first = left.T.reshape(rank, ins, height, 1)
        second = right.reshape(rank, out, 1, width).transpose(1, 0, 2, 3)
    return tuple(np.ascontiguousarray(part, dtype=np.float32) for part in (first, second))  # type: ignore[return-value]


def _check(site: Site, wanted: SitePolicy) -> None:
    if wanted.quantized or wanted.codebook_bits:
        raise PolicyError(
            f"Site {site.name!r} cannot have a rank together with scheme {wanted.scheme!r} or a codebook.",
            "Give the rank, save the model, and quantize what came of it.",
        )
    if not factorizable(site):
        raise PolicyError(
            f"Site {site.name!r} has {site.groups} groups; a rank is for convolutions without groups."
        )
    largest = min(matrix_shape(site.weight_shape, wanted.factorization))
    assert wanted.rank is not None
    if wanted.rank > largest:
        raise PolicyError(f"Site {site.name!r} has rank {largest} at most; {wanted.rank} is not possible.")


class _Factorizer:
    """Rebuilds `main` with two calls in the place of each site."""

    def __init__(self, module: IRModule, sites: dict[str, Site], policy: CompressionPolicy) -> None:
        self._module = module
        self._function = module["main"]
        self._by_weight = {site.weight: site for site in sites.values()}
        self._policy = policy
        values = get_params(module)
        self._split: dict[str, tuple[relax.Var, relax.Var]] = {}
        self._params = list(self._function.params)[: num_inputs(self._function)]
        self._values: list[np.ndarray] = []
        for var in parameter_vars(self._function):
            site = self._by_weight.get(var.name)
            if site is None:
                self._params.append(var)
                self._values.append(values[var.name])
                continue
            rank = policy[site.name].rank
            assert rank is not None
            pair = factors(values[var.name], rank, policy[site.name].factorization)
            names = (f"{site.name}{FIRST}.weight", f"{site.name}{SECOND}.weight")
            variables = [
                relax.Var(name, relax.TensorType(value.shape, "float32"))
                for name, value in zip(names, pair, strict=True)
            ]
            self._split[var.name] = (variables[0], variables[1])
            self._params += variables
            self._values += pair

    def run(self) -> IRModule:
        """Give the module with the split sites."""
        function = self._function
        defined = dict(bindings(function))
        replaced: dict[relax.Var, relax.Expr] = {}
        builder = relax.BlockBuilder()
        with builder.function("main", self._params):
            with builder.dataflow():
                for var, value in bindings(function):
                    weight = self._weight_of(value, defined)
                    if weight is not None:
                        value = self._second_call(builder, substitute(value.args[0], replaced), value, weight)
                    elif self._only_weight(value):
                        continue
                    else:
                        value = substitute(value, replaced)
                    replaced[var] = builder.emit(value, name_hint=var.name)
                output = builder.emit_output(substitute(function.body.body, replaced))
            builder.emit_func_output(output)
        made = relax.transform.CanonicalizeBindings()(builder.finalize())["main"]
        return with_main(self._module, with_values(made.with_attrs(dict(function.attrs)), self._values))

    def _weight_of(self, value: relax.Expr, defined: dict[relax.Var, relax.Expr]) -> relax.Var | None:
        """Give the weight of a call that is split, else None."""
        if operator(value) not in ("relax.nn.conv2d", "relax.matmul"):
            return None
        weight = weight_parameter(value.args[1], defined, self._function)
        return weight if weight is not None and weight.name in self._split else None

    def _only_weight(self, value: relax.Expr) -> bool:
        """Whether a binding transposes a weight that is gone."""
        return operator(value) == "relax.permute_dims" and getattr(value.args[0], "name", "") in self._split

    def _second_call(
        self, builder: relax.BlockBuilder, x: relax.Expr, call: relax.Call, weight: relax.Var
    ) -> relax.Call:
        """Emit the first layer; give the call of the second."""
        first, second = self._split[weight.name]
        if operator(call) == "relax.matmul":
            middle = builder.emit(relax.op.matmul(x, builder.emit(relax.op.permute_dims(first))))
            return relax.op.matmul(middle, builder.emit(relax.op.permute_dims(second)))
        site = self._by_weight[weight.name]
        (sh, sw), (dh, dw), (top, left, bottom, right) = site.strides, site.dilation, site.padding
        if self._policy[site.name].factorization == "channel":
            middle = builder.emit(_conv2d(x, first, (sh, sw), (top, left, bottom, right), (dh, dw)))
            return _conv2d(middle, second, (1, 1), (0, 0, 0, 0), (1, 1))
        middle = builder.emit(_conv2d(x, first, (sh, 1), (top, 0, bottom, 0), (dh, 1)))
        return _conv2d(middle, second, (1, sw), (0, left, 0, right), (1, dw))


def _conv2d(
    x: relax.Expr,
    weight: relax.Var,
    strides: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> relax.Call:
    return relax.op.nn.conv2d(
        x,
        weight,
        strides=strides,
        padding=padding,
        dilation=dilation,
        data_layout="NHWC",
        kernel_layout="OIHW",
    )
