"""What both importers do with an imported module's parameters, batch and input."""

from collections.abc import Mapping, Sequence

import numpy as np
import tvm
from tvm import relax

from tvm_compress.errors import ModelError


def finish_import(module: tvm.IRModule, names: Mapping[str, str]) -> tvm.IRModule:
    """Name the parameters as their framework does, fix the batch to one image, and copy the values.

    Parameters
    ----------
    module
        What one of TVM's importers made with the parameters kept as inputs.
    names
        Parameter's name in the module -> its name in the framework; the others keep theirs.

    Raises
    ------
    ModelError
        If there is not exactly one float32 NCHW input and one output, or a parameter holds NaN or infinity.
    """
    function = module["main"]
    num_input = int(function.attrs["num_input"])
    if num_input != 1:
        inputs = ", ".join(p.name for p in function.params[:num_input])
        raise ModelError(f"The model has {num_input} inputs ({inputs}); only models with one are supported.")
    values = [np.array(v.numpy()) for v in function.attrs.get("params") or ()]
    renamed = [relax.Var(names.get(p.name, p.name), p.ty) for p in function.params[1:]]
    check_finite({p.name: v for p, v in zip(renamed, values, strict=True)})
    body = function.bind_params(dict(zip(function.params[1:], renamed, strict=True))).body
    params = [function.params[0], *renamed]
    function = relax.Function(params, body, function.ret_ty, function.is_pure)
    function = _fix_batch(function).with_attrs(
        {
            "global_symbol": "main",
            "num_input": 1,
            "params": [tvm.runtime.tensor(v) for v in values],
        }
    )
    if not isinstance(function.ret_ty, relax.TensorType) or len(function.ret_ty.shape) != 2:
        raise ModelError(f"The model gives {function.ret_ty}, not one tensor of logits [N, classes].")
    return tvm.IRModule({"main": function})


def check_finite(values: Mapping[str, np.ndarray]) -> None:
    """Raise ModelError, naming the parameter, if one holds NaN or infinity."""
    for name, value in values.items():
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            raise ModelError(
                f"The parameter {name!r} holds {np.count_nonzero(~np.isfinite(value))} values "
                "that are NaN or infinite.",
                "Train the model again, or load a checkpoint from before it diverged.",
            )


def _fix_batch(function: relax.Function) -> relax.Function:
    """Make a symbolic batch 1, and insist on a float32 NCHW input of one image with fixed extents."""
    data = function.params[0]
    shape = data.ty.shape
    if shape is None or len(shape) != 4 or str(data.ty.dtype) != "float32":
        raise ModelError(f"The input {data.name!r} is {data.ty}, not float32 [N, C, H, W].")
    if not isinstance(shape[0], tvm.tirx.IntImm):
        function = function.bind_symbolic_vars({shape[0]: 1})
    extents: Sequence = function.params[0].ty.shape
    if not all(isinstance(extent, tvm.tirx.IntImm) for extent in extents):
        raise ModelError(
            f"The input {data.name!r} has a variable extent: {extents}.", "Export it with a fixed size."
        )
    if int(extents[0]) != 1:
        raise ModelError(
            f"The model is fixed to batches of {int(extents[0])} images.",
            "Export it with one image, or with a dynamic batch.",
        )
    return function
