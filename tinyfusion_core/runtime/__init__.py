"""Shared services: files, locks, signals, progress, seeds, processes, checkpoints, the run folder."""
