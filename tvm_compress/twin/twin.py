"""The twin of a Relax module: the same function, computed by torch."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import tvm


class Twin(torch.nn.Module):
    """Executes `main` of a module at stage float, annotated, qdq or integer with torch, for any batch size."""

    stage: str

    def __init__(self, module: tvm.IRModule) -> None:
        super().__init__()
        raise NotImplementedError

    def predict(self, x: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """Return the output (logits) of inputs `x` [N, C, H, W], in evaluation mode."""
        raise NotImplementedError

    def accuracy(self, x: np.ndarray, y: np.ndarray, batch_size: int = 256) -> float:
        """Return the share of `x` [N, C, H, W] whose largest logit stands at its label `y` [N]."""
        raise NotImplementedError

    def loss(self, x: np.ndarray, y: np.ndarray, batch_size: int = 256) -> float:
        """Return the mean cross-entropy of `x` [N, C, H, W] with labels `y` [N], in evaluation mode."""
        raise NotImplementedError

    def gradients(self, x: np.ndarray, y: np.ndarray, batch_size: int = 256) -> dict[str, np.ndarray]:
        """Return the gradient of the mean cross-entropy by parameter name."""
        raise NotImplementedError

    def site_inputs(
        self,
        x: np.ndarray,
        names: Sequence[str] | None = None,
        callback: Callable[[tuple[str, ...], torch.Tensor], None] | None = None,
        batch_size: int = 256,
    ) -> dict[str, np.ndarray]:
        """Return the input of each named site, or hand each to `callback(sites sharing it, tensor)`."""
        raise NotImplementedError

    def trace(self, x: np.ndarray) -> dict[str, np.ndarray]:
        """Return the int32 accumulators of each site of an integer module."""
        raise NotImplementedError

    def reestimate_batch_norm(self, x: np.ndarray, batch_size: int = 256) -> None:
        """Recompute the running statistics from `x`, without labels."""
        raise NotImplementedError

    def to_module(self) -> tvm.IRModule:
        """Return the module with the twin's parameters in it."""
        raise NotImplementedError
