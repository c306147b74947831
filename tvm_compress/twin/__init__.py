"""Executes a Relax module with torch: accuracy, gradients, fine-tuning, batch-norm re-estimation."""

from tvm_compress.twin.twin import Twin

__all__ = ["Twin"]
