"""Comparison of selectors by how well their choices recover, with random subsets as reference."""
