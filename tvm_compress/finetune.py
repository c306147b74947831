"""Training of a module's parameters after compression."""

from collections.abc import Callable

import tvm

from tvm_compress.twin import Twin


def finetune(
    module: tvm.IRModule,
    train: "object",
    epochs: int,
    learning_rate: float = 0.01,
    seed: int = 0,
    batch_size: int = 64,
    teacher: Twin | None = None,
    augment: bool = False,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> tvm.IRModule:
    """Train a float or QDQ module for some epochs; return it with new parameters."""
    raise NotImplementedError
