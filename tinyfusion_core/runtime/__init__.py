"""What every stage stands on: files, locks, signals, progress, seeds, processes, checkpoints, the run folder."""
