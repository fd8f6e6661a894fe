"""Selectors of the blocks to keep: learned search, criteria, successive halving."""
