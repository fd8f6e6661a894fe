"""Judging masks by short recoveries: paired comparisons, and the rounds of a race."""
