"""Other processes that do pieces of work which do not depend on each other, started by Ray or Slurm."""
