"""Decisions, the gated forward pass, weight updates, removing blocks, saving the result."""
