"""What a compressed module costs on paper: MACs, BOPs, bytes, effective signal norm."""

from tvm_compress.metrics.cost import metrics

__all__ = ["metrics"]
