"""What keeps a run right: reference, checks, checkpoints, metrics."""
