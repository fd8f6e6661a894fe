"""Measure networks side by side."""
