"""Imports torch modules and exported programs; parameters keep the names of the module's state_dict."""

from __future__ import annotations

import dataclasses
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import tvm
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from tvm.relax.frontend.torch import from_exported_program
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from tvm_compress.errors import ModelError, UnsupportedOperatorError
from tvm_compress.importer.parameters import finish_import


def export_module(module: torch.nn.Module, example_inputs: Sequence[torch.Tensor]) -> ExportedProgram:
    """Export a module, in evaluation mode and for one image; the module's mode is given back afterwards.

    Raises
    ------
    ModelError
        If `torch.export` cannot follow the module's code.
    """
    modes = {child: child.training for child in module.modules()}
    one_image = tuple(value[:1].detach().clone() for value in example_inputs)
    module.eval()
    try:
        with torch.no_grad(), _torchs_own_warnings_off():
            return torch.export.export(module, one_image)
    except Exception as error:  # torch.export raises whatever the module's code raises
        raise ModelError(
            f"torch.export cannot export {type(module).__name__}: {_first_line(error)}."
        ) from error
    finally:
        for child, training in modes.items():
            child.training = training


def read_exported_program(path: Path) -> ExportedProgram:
    """Read a `.pt2` file that `torch.export.save` wrote; ModelError if it cannot be read."""
    if not path.is_file():
        raise ModelError(f"{path} does not exist.")
    if not zipfile.is_zipfile(path):
        # torch would log a page of its own before it fails.
        raise ModelError(f"{path} is not a readable exported program: it is no archive, or was cut short.")
    try:
        return torch.export.load(path)
    except Exception as error:  # zip, JSON and schema errors of many types
        raise ModelError(
            f"{path} is not a readable exported program: {_first_line(error)}.",
            "Write it with torch.export.save of the same torch version.",
        ) from error


def import_exported_program(program: ExportedProgram) -> tvm.IRModule:
    """Turn an exported program into a Relax module whose parameters bear their state_dict names.

    Running statistics of batch norm become parameters too; TVM's importer alone would make them constants.

    Raises
    ------
    UnsupportedOperatorError
        If TVM's importer lacks an operator; names the operator and the layer.
    ModelError
        If the model's inputs, output or parameters cannot be used.
    """
    with _torchs_own_warnings_off():
        program = program.run_decompositions()
    _check_operators(program)
    _check_types(program)
    specs = program.graph_signature.input_specs
    buffers = dict(program.named_buffers())
    for index, spec in enumerate(specs):
        # TVM's importer keeps parameters as inputs and binds buffers; to it, statistics are parameters.
        if spec.kind is InputKind.BUFFER and spec.persistent and buffers[spec.target].is_floating_point():
            specs[index] = dataclasses.replace(spec, kind=InputKind.PARAMETER)
    try:
        module = from_exported_program(
            program, keep_params_as_input=True, unwrap_unit_return_tuple=True, run_ep_decomposition=False
        )
    except Exception as error:  # the importer raises assertions, key and value errors alike
        raise ModelError(f"TVM's importer fails on this program: {_first_line(error)}.") from error
    parameters = [spec for spec in specs if spec.kind is InputKind.PARAMETER]
    return finish_import(module, {spec.arg.name: spec.target for spec in parameters})


@contextmanager
def _torchs_own_warnings_off() -> Iterator[None]:
    """Keep from users what torch.export says of torch's own code, such as its use of what it deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _check_operators(program: ExportedProgram) -> None:
    known = ExportedProgramImporter().create_convert_map()
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target.__name__ not in known:
            raise UnsupportedOperatorError(
                f"The operator {node.target.__name__!r} of layer {_layer(node)!r} is not supported.",
                "Replace it in the module, then import again.",
            )


def _check_types(program: ExportedProgram) -> None:
    for name, value in program.named_parameters():
        if value.dtype != torch.float32:
            raise ModelError(
                f"The parameter {name!r} is {value.dtype}, not float32.", "Call module.float() first."
            )


def _layer(node: torch.fx.Node) -> str:
    """Dotted name of the innermost module that made the node, or the node's own name outside of any."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return (paths[-1] if paths else "") or node.name


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".")
