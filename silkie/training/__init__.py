"""Parts of a training run: passes, reference, self-test, guards, checkpoints, metrics, model card."""
