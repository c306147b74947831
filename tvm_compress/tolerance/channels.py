"""Which channels a network can do without: tolerances aggregated over coupled sets."""

import numpy as np
import tvm


def channel_scores(
    module: tvm.IRModule, x: np.ndarray, y: np.ndarray, criterion: str = "tolerance", batch_size: int = 256
) -> dict[str, np.ndarray]:
    """Score every channel of every coupled set; the larger, the more the channel is needed."""
    raise NotImplementedError
