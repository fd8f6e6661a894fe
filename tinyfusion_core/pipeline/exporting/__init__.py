"""Hand what a run has made to other software."""
