"""Where a teacher comes from: a file, the web, PyTorch, or its own training."""
