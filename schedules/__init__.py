"""Kernels, and how they are scheduled, per target."""
