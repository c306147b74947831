"""What every way of compressing hands over."""

from dataclasses import dataclass, field
from typing import Any

import tvm

from tvm_compress.passes.policy import CompressionPolicy


@dataclass(frozen=True)
class MethodResult:
    """A compressed module, the policy that says what was done to it, and what the method found out.

    Parameters
    ----------
    module
        At stage float or qdq.
    summary
        Plain values (JSON) for the command's answer, e.g. iterations, sparsity, seconds.
    """

    module: tvm.IRModule
    policy: CompressionPolicy
    summary: dict[str, Any] = field(default_factory=dict)
