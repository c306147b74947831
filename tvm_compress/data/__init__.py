"""Labelled images: reading, checking, splitting."""
