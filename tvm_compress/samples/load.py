"""Loads the samples that the package ships: `load_sample`, `load_sample_data`, `sample_module`."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import numpy as np
import safetensors.torch
import torch

from tvm_compress.data.dataset import Dataset, Normalization, Split
from tvm_compress.errors import ModelError
from tvm_compress.model import Model
from tvm_compress.samples.resnet8 import ResNet8

_NETWORKS = {"resnet8-fashion": ResNet8}


def sample_names() -> tuple[str, ...]:
    """Return the names of the samples that the package ships."""
    return tuple(_NETWORKS)


def load_sample(name: str) -> Model:
    """Return a sample as a Model; ModelError, listing the samples, if there is none of that name."""
    facts = _facts(name)
    return Model.from_torch(
        sample_module(name),
        (torch.zeros(tuple(facts["input_shape"])),),
        mean=facts["mean"],
        std=facts["std"],
        class_names=facts["class_names"],
        metadata={"source": f"sample:{name}", "accuracy": facts["accuracy"], "training": facts["training"]},
    )


def load_sample_data(name: str) -> Split:
    """Return a sample's images, uint8 NCHW: 5,000 train, 1,000 validation, 1,000 test.

    Validation and test are images that the network was not trained on.
    """
    facts = _facts(name)
    normalization = Normalization(tuple(facts["mean"]), tuple(facts["std"]))
    resource = files("tvm_compress.samples").joinpath(f"{name}.npz")
    with resource.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        sets = {
            part: Dataset(
                archive[f"x_{part}"],
                archive[f"y_{part}"].astype(np.int64),
                tuple(facts["class_names"]),
                normalization,
            )
            for part in ("train", "validation", "test")
        }
    return Split(sets["train"], sets["validation"], sets["test"])


def sample_module(name: str) -> torch.nn.Module:
    """Return a sample as a torch module with its trained weights, in evaluation mode."""
    _check_name(name)
    module = _NETWORKS[name]()
    tensors = safetensors.torch.load(
        files("tvm_compress.samples").joinpath(f"{name}.safetensors").read_bytes()
    )
    # The count of training batches is of no use and is not shipped.
    counters = {
        key: value for key, value in module.state_dict().items() if key.endswith("num_batches_tracked")
    }
    module.load_state_dict({**tensors, **counters})
    return module.eval()


def _facts(name: str) -> dict[str, Any]:
    _check_name(name)
    return json.loads(files("tvm_compress.samples").joinpath(f"{name}.json").read_text(encoding="utf-8"))


def _check_name(name: str) -> None:
    if name not in _NETWORKS:
        raise ModelError(f"There is no sample {name!r}.", f"The samples are: {', '.join(_NETWORKS)}.")
