"""What a compressed module costs on paper: MACs, BOPs, bytes, effective signal norm."""

from tvm_compress.metrics.cost import bops, macs, metrics, parameter_bytes
from tvm_compress.metrics.esn import esn
from tvm_compress.metrics.esn_training import EsnRecord, EsnRecorder

__all__ = ["EsnRecord", "EsnRecorder", "bops", "esn", "macs", "metrics", "parameter_bytes"]
