"""The trainer: configuration, the loop, checkpoints, and the job from recipe to report."""
