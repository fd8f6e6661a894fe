"""The blocks of a transformer of diffusers: which can go, and what they hand on."""
