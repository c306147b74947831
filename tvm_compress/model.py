"""`Model`: a canonical Relax module with its input, class names and origin; imported, saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm

if TYPE_CHECKING:
    import onnx
    import torch


@dataclass(frozen=True)
class InputSpec:
    """What the network takes.

    Attributes
    ----------
    name
        Name of the input.
    shape
        (N, C, H, W) in the source's layout, N = 1.
    dtype
        "float32".
    mean, std
        Normalisation for each channel, on pixels scaled to [0, 1]; (0,) and (1,) leave them as they are.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Model:
    """A network at the stage `float` (or a later one), ready for the passes.

    Attributes
    ----------
    module
        Relax module in canonical form (docs/architecture.md), parameter values in the attribute `params`.
    input_spec
        The input and its normalisation.
    class_names
        One name for each logit.
    metadata
        Plain JSON values: where the model came from, its accuracy, ...
    """

    module: tvm.IRModule
    input_spec: InputSpec
    class_names: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_torch(
        cls,
        module: torch.nn.Module,
        example_inputs: Sequence[torch.Tensor],
        *,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        class_names: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> Model:
        """Import a torch module, in evaluation mode, through `torch.export`."""
        raise NotImplementedError

    @classmethod
    def from_exported_program(
        cls,
        program: torch.export.ExportedProgram,
        *,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        class_names: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> Model:
        """Import what `torch.export.export` made."""
        raise NotImplementedError

    @classmethod
    def from_onnx(
        cls,
        model: str | Path | onnx.ModelProto,
        *,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        class_names: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> Model:
        """Import an ONNX file or message."""
        raise NotImplementedError

    @classmethod
    def load(cls, path: str | Path) -> Model:
        """Load the directory that `save` made."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Save as a directory: module.json, params.safetensors, model.json."""
        raise NotImplementedError


def load_model(source: str | Path) -> Model:
    """Load "x.pt2", "x.onnx", a directory that `Model.save` made, or "sample:NAME"."""
    raise NotImplementedError
