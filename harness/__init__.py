"""What one need not read to understand post-training: flags, folders, checkpoints, evaluation,
tables, pictures."""
