"""The directory that a Model is saved as: module.json, params.safetensors and model.json."""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tvm
from safetensors import SafetensorError

import tvm_compress
from tvm_compress.errors import ModelError
from tvm_compress.importer.parameters import check_finite
from tvm_compress.passes.params import get_params
from tvm_compress.schedules import ops

SCHEMA = 1
_KEYS = {"schema", "input", "class_names", "metadata", "parameters", "files", "versions"}
_INPUT_KEYS = {"name", "shape", "dtype", "mean", "std"}


@dataclass(frozen=True)
class SavedModel:
    """What a Model consists of, its input spec as plain values."""

    module: tvm.IRModule
    input_spec: dict[str, Any]
    class_names: tuple[str, ...]
    metadata: dict[str, Any]


def write_saved_model(path: Path, saved: SavedModel) -> None:
    """Write the directory as a whole; ModelError if something that is not a saved Model stands there."""
    if path.exists() and not (path / "model.json").is_file():
        raise ModelError(f"{path} exists and is not a saved Model.", "Choose another path.")
    values = get_params(saved.module)
    function = saved.module["main"]
    bare = saved.module.clone()
    if function.attrs and "params" in function.attrs:
        bare.update_func(bare.get_global_var("main"), function.without_attr("params"))
    files = {
        "module.json": tvm.ir.save_json(bare).encode(),
        "params.safetensors": safetensors.numpy.save({k: np.ascontiguousarray(v) for k, v in values.items()}),
    }
    record = {
        "schema": SCHEMA,
        "input": saved.input_spec,
        "class_names": list(saved.class_names),
        "metadata": saved.metadata,
        "parameters": list(values),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        "versions": {"tvm_compress": tvm_compress.__version__, "tvm": tvm.__version__},
    }
    try:
        files["model.json"] = (json.dumps(record, indent=2, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ModelError(f"The model's metadata are not plain JSON values: {error}.") from error
    _replace_directory(path, files)


def _replace_directory(path: Path, files: dict[str, bytes]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error}.") from error
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()
        for name, data in files.items():
            (new / name).write_bytes(data)
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
    except OSError as error:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise ModelError(f"{path} cannot be written: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_saved_model(path: Path) -> SavedModel:
    """Read what `write_saved_model` wrote; ModelError if it is missing, damaged or of another version."""
    record = _read_record(path)
    files = {}
    for name, digest in record["files"].items():
        try:
            files[name] = (path / name).read_bytes()
        except OSError as error:
            raise ModelError(f"The saved model {path} lacks {name}: {error}.") from error
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise ModelError(f"{path / name} is damaged: its checksum is not the one in model.json.")
    # Modules of later stages hold operators of ours.
    ops.register()
    try:
        values = safetensors.numpy.load(files["params.safetensors"])
        module = tvm.ir.load_json(files["module.json"].decode())
        arrays = [tvm.runtime.tensor(values[name]) for name in record["parameters"]]
    except (KeyError, ValueError, SafetensorError, RuntimeError, tvm.error.InternalError) as error:
        version = record["versions"].get("tvm")
        raise ModelError(
            f"The saved model {path} cannot be read by TVM {tvm.__version__}: {error}.",
            f"It was written by TVM {version}.",
        ) from error
    check_finite(values)
    if arrays:
        module.update_func(module.get_global_var("main"), module["main"].with_attr("params", arrays))
    spec = {key: tuple(value) if isinstance(value, list) else value for key, value in record["input"].items()}
    return SavedModel(module, spec, tuple(record["class_names"]), record["metadata"])


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / "model.json").read_bytes())
    except OSError as error:
        raise ModelError(f"{path} is not a saved Model: it has no readable model.json.") from error
    except ValueError as error:
        raise ModelError(f"{path / 'model.json'} is damaged: {error}.") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else None
        raise ModelError(
            f"{path / 'model.json'} has schema {found!r}; this version reads {SCHEMA}.",
            "Import the model again from its source.",
        )
    wrong = set(record) ^ _KEYS
    if wrong:
        raise ModelError(f"{path / 'model.json'} has unknown or missing keys: {', '.join(sorted(wrong))}.")
    if set(record["input"]) != _INPUT_KEYS or set(record["files"]) != {"module.json", "params.safetensors"}:
        raise ModelError(f"{path / 'model.json'} does not describe its input or files as it should.")
    return record
