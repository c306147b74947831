"""What a compressed module costs on paper: MACs, BOPs, bytes, effective signal norm."""

from tvm_compress.metrics.cost import bops, macs, metrics, parameter_bytes
from tvm_compress.metrics.esn import esn

__all__ = ["bops", "esn", "macs", "metrics", "parameter_bytes"]
