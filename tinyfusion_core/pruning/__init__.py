"""A decision, the gated forward, weight updates, removing blocks, saving what is left."""
