"""Ranges of the sites' inputs, from data, for the quantizers."""

from pathlib import Path

import numpy as np
import tvm


class Calibration:
    """What the inputs of a module's sites were seen to be."""

    def range(self, site: str, bits: int) -> tuple[float, float]:
        """Return (low, high) that a quantizer of `bits` bits for the input of `site` shall cover."""
        raise NotImplementedError

    def save(self, path: Path) -> None:
        """Write JSON."""
        raise NotImplementedError

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read what `save` wrote."""
        raise NotImplementedError


def calibrate(
    module: tvm.IRModule, x: np.ndarray, method: str = "mse", batch_size: int = 256
) -> Calibration:
    """Run `x` [N, C, H, W] (normalised) through a float module and observe the inputs of its sites."""
    raise NotImplementedError
