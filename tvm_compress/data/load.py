"""`load_data`: labelled images from whatever stands at a path, split into train, validation and test."""

from __future__ import annotations

from pathlib import Path

from tvm_compress.data.dataset import Normalization, Split
from tvm_compress.model import Model


def load_data(
    path: str | Path,
    model: Model,
    seed: int = 0,
    *,
    layout: str | None = None,
    normalization: Normalization | None = None,
    validation: float = 0.1,
    test: float = 0.1,
) -> Split:
    """Load .npz, IDX folder, CIFAR-10 binary folder, ImageFolder or "sample:NAME" and split it."""
    raise NotImplementedError
