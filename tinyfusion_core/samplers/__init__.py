"""Probability distributions over block masks, and the constraints that masks obey. Mathematics only."""
