"""Real images, to evaluate on and to train teachers: data sets, readers, accuracy."""
