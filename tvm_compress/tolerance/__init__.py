"""Tolerance analysis (TOCO): how far weights may move, and which channels may go."""

from tvm_compress.tolerance.channels import channel_scores
from tvm_compress.tolerance.closed_form import logarithmic, quadratic

__all__ = ["channel_scores", "logarithmic", "quadratic"]
