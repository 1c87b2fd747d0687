"""What the command does: train, evaluate, train_teacher, profile, export."""
