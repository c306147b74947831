"""The search for a compression policy."""
