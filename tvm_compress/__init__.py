"""Makes trained neural networks small and fast on the CPUs that people have."""

__version__ = "0.1.0"
