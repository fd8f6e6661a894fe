"""Which selector recovers best: candidates beside random subsets."""
