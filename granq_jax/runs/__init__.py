"""A run's directory: files, lock, checkpoints, metrics, notes, record of starts."""
