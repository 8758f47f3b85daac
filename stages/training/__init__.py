"""What the training loop is made of: optimizer, learning-rate schedule, checkpoints, metrics."""
