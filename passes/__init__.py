"""Relax to Relax: what is done to a module."""
