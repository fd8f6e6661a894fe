"""Metrics that compare networks: held-out loss, size, latency, Fréchet distance; and generation."""
