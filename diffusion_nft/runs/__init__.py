"""Runs on disk: run directory, checkpoints and training state."""
