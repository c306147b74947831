"""Devices, measurement, and where measurements are kept."""
