"""Loads the samples that the package ships: `load_sample`, `load_sample_data`, `sample_module`."""

from __future__ import annotations

import torch

from tvm_compress.data.dataset import Split
from tvm_compress.model import Model

SAMPLES = ("resnet8-fashion",)


def load_sample(name: str) -> Model:
    """Return the sample as a Model."""
    raise NotImplementedError


def load_sample_data(name: str) -> Split:
    """Return the sample's images: 5,000 train, 1,000 validation, 1,000 test."""
    raise NotImplementedError


def sample_module(name: str) -> torch.nn.Module:
    """Return the sample as a torch module with its trained weights, in evaluation mode."""
    raise NotImplementedError
