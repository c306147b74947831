"""A module's parameters by name, and the stage that a module is in."""

from collections.abc import Mapping

import numpy as np
from tvm import IRModule

STAGE = "tvm_compress.stage"
STAGES = ("float", "annotated", "qdq", "integer", "kernels")


def get_stage(module: IRModule) -> str:
    """Give the stage of a module ("float", "annotated", "qdq", "integer", "kernels"); "" before Canonicalize."""
    raise NotImplementedError


def with_stage(module: IRModule, stage: str) -> IRModule:
    """Give the module with another stage written on its `main`."""
    raise NotImplementedError


def get_params(module: IRModule) -> dict[str, np.ndarray]:
    """Give the parameters' values by name, in the order of `main`'s parameters."""
    raise NotImplementedError


def set_params(module: IRModule, values: Mapping[str, np.ndarray]) -> IRModule:
    """Give the module with new values for some parameters; types follow where shapes change."""
    raise NotImplementedError


def bind_params(module: IRModule) -> IRModule:
    """Give the module with every parameter turned into a constant; only the inputs are left."""
    raise NotImplementedError
