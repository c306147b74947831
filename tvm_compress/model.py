"""`Model`: a canonical Relax module with its input, class names and origin; imported, saved and loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tvm

from tvm_compress.errors import ModelError
from tvm_compress.passes.canonicalize import Canonicalize
from tvm_compress.passes.params import get_stage

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

    def __post_init__(self) -> None:
        if len(self.shape) != 4 or min(self.shape) < 1:
            raise ModelError(f"An input's shape must be (N, C, H, W), not {self.shape}.")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, self.shape[1]):
            raise ModelError(
                f"The normalisation has {len(self.mean)} means and {len(self.std)} deviations; "
                f"the input has {self.shape[1]} channels."
            )
        if min(self.std) <= 0:
            raise ModelError(f"The normalisation's deviations must be above 0, not {self.std}.")


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
        One name for each logit; "0", "1", ... if none are given.
    metadata
        Plain JSON values: where the model came from, its accuracy, ...
    """

    module: tvm.IRModule
    input_spec: InputSpec
    class_names: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        logits = int(self.module["main"].ret_ty.shape[-1])
        if not self.class_names:
            object.__setattr__(self, "class_names", tuple(str(index) for index in range(logits)))
        if len(self.class_names) != logits:
            raise ModelError(
                f"The network gives {logits} logits, but {len(self.class_names)} classes are named."
            )

    @property
    def num_classes(self) -> int:
        """How many logits the network gives."""
        return len(self.class_names)

    def with_module(self, module: tvm.IRModule) -> Model:
        """Return the model with another module for the same input and classes, such as a compressed one."""
        return dataclasses.replace(self, module=module)

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
        """Import a torch module, in evaluation mode, through `torch.export`; parameters are copied.

        Parameters
        ----------
        module
            Takes one float32 [N, C, H, W] and returns logits [N, classes]; its mode is left as it was.
        example_inputs
            One tensor in a sequence; only its shape (C, H, W) matters.
        mean, std
            Normalisation that the network was trained with, on pixels scaled to [0, 1].

        Raises
        ------
        UnsupportedOperatorError
            If an operator is not supported; names the operator and the layer.
        ModelError
            If the module cannot be exported, its input or output does not fit, or a weight is NaN or
            infinite.
        """
        from tvm_compress.importer.torch_importer import export_module

        return cls.from_exported_program(
            export_module(module, example_inputs),
            mean=mean,
            std=std,
            class_names=class_names,
            metadata={"source": f"torch:{type(module).__name__}", **(metadata or {})},
        )

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
        """Import what `torch.export.export` made of a module in evaluation mode; see `from_torch`."""
        from tvm_compress.importer.torch_importer import import_exported_program

        module = import_exported_program(program)
        return _imported(module, mean, std, class_names, {"source": "torch.export", **(metadata or {})})

    @classmethod
    def from_onnx(
        cls,
        model: str | Path | onnx.ModelProto,
        *,
        input_shape: Sequence[int] | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        class_names: Sequence[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> Model:
        """Import an ONNX file or message; see `from_torch`.

        To keep batch norms, which exporters like to fold, export with
        `torch.onnx.export(module, inputs, path, dynamo=True, optimize=False)`. Where the file leaves the size
        of the images open, `input_shape` (1, C, H, W) says it.

        A model with QuantizeLinear and DequantizeLinear comes at the stage qdq with the file's own scales,
        and with a policy in its metadata. What the kernels do not take computes in float: a
        `QuantizedImportWarning` names the layer, the policy's note says why.
        """
        from tvm_compress.importer.onnx_importer import import_onnx, read_onnx

        source = f"onnx:{Path(model).name}" if isinstance(model, str | Path) else "onnx"
        read = read_onnx(Path(model)) if isinstance(model, str | Path) else model
        found = import_onnx(read, input_shape)
        said = {"source": source, **(metadata or {})}
        imported = _imported(found.module, mean, std, class_names, said)
        if get_stage(imported.module) != "qdq":
            return imported
        from tvm_compress.importer.quantized_sites import quantize_as_imported

        quantized = quantize_as_imported(imported.module, found.grids, found.refused)
        policy = {"policy": quantized.policy.to_json()}
        return replace(imported, module=quantized.module, metadata={**imported.metadata, **policy})

    @classmethod
    def load(cls, path: str | Path) -> Model:
        """Load the directory that `save` made.

        Raises
        ------
        ModelError
            If a file is missing, damaged, or of another schema version.
        """
        from tvm_compress.importer.saved_model import read_saved_model

        saved = read_saved_model(Path(path))
        return cls(saved.module, InputSpec(**saved.input_spec), saved.class_names, saved.metadata)

    def save(self, path: str | Path) -> None:
        """Save as a directory: module.json, params.safetensors, model.json.

        A Model that stands there is replaced as a whole; an interrupted save leaves it as it was.

        Raises
        ------
        ModelError
            If something else stands at the path.
        """
        from tvm_compress.importer.saved_model import SavedModel, write_saved_model

        saved = SavedModel(
            self.module, dataclasses.asdict(self.input_spec), self.class_names, dict(self.metadata)
        )
        write_saved_model(Path(path), saved)


def _imported(
    module: tvm.IRModule,
    mean: Sequence[float],
    std: Sequence[float],
    class_names: Sequence[str],
    metadata: Mapping[str, Any],
) -> Model:
    """Make a Model of what an importer gave."""
    module = tvm.ir.transform.Sequential([Canonicalize()])(module)
    data = module["main"].params[0]
    spec = InputSpec(
        data.name, tuple(int(extent) for extent in data.ty.shape), "float32", tuple(mean), tuple(std)
    )
    return Model(module, spec, tuple(class_names), dict(metadata))


def load_model(
    source: str | Path,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] = (),
) -> Model:
    """Load "x.pt2", "x.onnx", a directory that `Model.save` made, or "sample:NAME".

    Parameters
    ----------
    mean, std, class_names
        What a .pt2 or .onnx file does not say; saved models and samples say it themselves.

    Raises
    ------
    ModelError
        If there is no such model, or it cannot be read.
    """
    text = str(source)
    if text.startswith("sample:"):
        from tvm_compress.samples.load import load_sample

        return load_sample(text.removeprefix("sample:"))
    path = Path(source)
    if not path.exists():
        raise ModelError(
            f"{text} does not exist.", "Give a .pt2, an .onnx, a saved Model, or sample:resnet8-fashion."
        )
    declared: dict[str, Any] = {"class_names": class_names, "metadata": {"source": path.name}}
    declared |= {key: value for key, value in (("mean", mean), ("std", std)) if value is not None}
    if path.is_dir():
        return Model.load(path)
    if path.suffix == ".onnx":
        return Model.from_onnx(path, **declared)
    if path.suffix == ".pt2":
        from tvm_compress.importer.torch_importer import read_exported_program

        return Model.from_exported_program(read_exported_program(path), **declared)
    raise ModelError(
        f"{text} is none of: a .pt2 file, an .onnx file, a directory that Model.save made.",
        "torch.export.save(torch.export.export(module.eval(), inputs), 'x.pt2') makes one of a torch module.",
    )
