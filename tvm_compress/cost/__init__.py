"""The latency model."""
