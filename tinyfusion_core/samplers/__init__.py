"""Distributions over block masks, and the constraints that their masks obey. Mathematics only."""
