"""A run on disk: its directory, checkpoints and training state."""
