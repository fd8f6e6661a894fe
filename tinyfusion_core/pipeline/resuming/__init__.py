"""Whether a run may begin or go on in a folder."""
