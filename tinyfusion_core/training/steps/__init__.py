"""One step of a training: the passes over its rows, the update, and the guard against what goes wrong in it."""
