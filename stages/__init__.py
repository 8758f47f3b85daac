"""The work of the pipeline, in data order: corpus, teacher, targets | batches, student, losses, training."""
