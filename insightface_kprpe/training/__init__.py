"""Training: configs, the loop, schedules and checkpoints."""
