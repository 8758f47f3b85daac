"""What teacher and student share: a model's files, its head, attention over packed sequences."""
