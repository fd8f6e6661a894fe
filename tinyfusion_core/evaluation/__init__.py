"""Metrics that compare networks: held-out loss, size, latency, Fréchet distance; and generation."""

DISTANCE = "Fréchet distance"
"""Name of a measurement. It is here so that results of comparisons are read without torch."""
