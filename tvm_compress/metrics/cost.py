"""MACs, bit operations and bytes of a module."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import tvm

if TYPE_CHECKING:
    from tvm_compress.passes.policy import CompressionPolicy
    from tvm_compress.passes.sites import Site


def metrics(
    module: tvm.IRModule,
    policy: "CompressionPolicy | None" = None,
    sites: "Sequence[Site] | None" = None,
) -> dict[str, float]:
    """Return macs, bops, parameter_bytes, esn_a, esn_d of one inference with batch 1."""
    raise NotImplementedError
