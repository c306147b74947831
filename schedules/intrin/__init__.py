"""Tensor intrinsics: pairs of a description and an implementation."""
