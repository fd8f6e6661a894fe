"""Heuristics that score blocks or masks: by position, by what blocks do to their input, by the loss."""
