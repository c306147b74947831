"""A module's parameters by name, and the stage that a module is in.

Parameters are the variables of `main` after its first `num_input`; their values stand, in the same order, in
the function attribute `params`, where TVM's importers leave them.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import tvm
from tvm import IRModule, relax

from tvm_compress.errors import ModelError

STAGE = "tvm_compress.stage"
STAGES = ("float", "annotated", "qdq", "integer", "kernels")


def get_stage(module: IRModule) -> str:
    """Give the stage of a module, one of `STAGES`; "" before Canonicalize."""
    return str((module["main"].attrs or {}).get(STAGE, ""))


def with_stage(module: IRModule, stage: str) -> IRModule:
    """Give the module with another stage written on its `main`."""
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {STAGES}, not {stage!r}")
    return with_main(module, module["main"].with_attr(STAGE, stage))


def require_stage(module: IRModule, *stages: str, what: str) -> None:
    """Raise a ModelError where the module is in none of the stages that `what` (a pass) takes."""
    stage = get_stage(module)
    if stage not in stages:
        raise ModelError(
            f"{what} takes a module of stage {' or '.join(map(repr, stages))}, not {stage!r}.",
            "Apply Canonicalize to what an importer gives." if not stage else "",
        )


def with_main(module: IRModule, function: relax.Function) -> IRModule:
    """Give a copy of the module with another `main`; the module itself stays as it is."""
    updated = module.clone()
    updated.update_func(updated.get_global_var("main"), function)
    return updated


def num_inputs(function: relax.Function) -> int:
    """How many of a function's parameters are inputs; all of them where no attribute says so."""
    return int((function.attrs or {}).get("num_input", len(function.params)))


def parameter_vars(function: relax.Function) -> list[relax.Var]:
    """Give the variables of a function that are parameters, not inputs."""
    return list(function.params)[num_inputs(function) :]


def with_values(function: relax.Function, values: Sequence[np.ndarray]) -> relax.Function:
    """Give the function with these parameter values, one for each of its parameters, in their order."""
    assert len(values) == len(parameter_vars(function))
    return function.with_attr("params", [tvm.runtime.tensor(np.ascontiguousarray(value)) for value in values])


def get_params(module: IRModule) -> dict[str, np.ndarray]:
    """Give the parameters' values by name, in the order of `main`'s parameters (copies).

    Raises
    ------
    ModelError
        Where the module holds parameters without values.
    """
    function = module["main"]
    names = [var.name for var in parameter_vars(function)]
    values = list((function.attrs or {}).get("params", []))
    if len(values) != len(names):
        raise ModelError(
            f"The module has {len(names)} parameters, but values for {len(values)}.",
            "Import with keep_params_as_input=True.",
        )
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}


def set_params(module: IRModule, values: Mapping[str, np.ndarray]) -> IRModule:
    """Give the module with new values for some parameters; types follow where shapes change.

    Raises
    ------
    ModelError
        On a name that is not a parameter, or another dtype than the parameter's.
    """
    params = get_params(module)
    for name, value in values.items():
        if name not in params:
            raise ModelError(f"The module has no parameter {name!r}.")
        if np.asarray(value).dtype != params[name].dtype:
            raise ModelError(f"Parameter {name!r} is {params[name].dtype}, not {np.asarray(value).dtype}.")
    changed = {n: np.asarray(v).shape for n, v in values.items() if np.asarray(v).shape != params[n].shape}
    params.update((name, np.asarray(value)) for name, value in values.items())
    module = with_main(module, with_values(module["main"], list(params.values())))
    return _retype(module, changed) if changed else module


def _retype(module: IRModule, shapes: Mapping[str, tuple[int, ...]]) -> IRModule:
    # Every follower's type is inferred again, so an inconsistent change raises here, not later.
    def new_type(var: relax.Var) -> relax.TensorType | None:
        if var.name not in shapes:
            return None
        return relax.TensorType(shapes[var.name], var.ty.dtype)

    return relax.transform.UpdateParamType(new_type)(module)


def bind_params(module: IRModule) -> IRModule:
    """Give the module with every parameter turned into a constant; only the inputs are left."""
    function = module["main"]
    values = dict(zip(parameter_vars(function), get_params(module).values(), strict=True))
    if not values:
        return module
    # Bound by variable, not by name: so nothing else in the module can be meant.
    bound = relax.transform.BindParams("main", values)(module)["main"]
    return with_main(module, bound.without_attr("params"))
