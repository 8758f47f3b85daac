"""The student: where its architecture and first weights come from, how it reads packed batches, how it is saved."""
