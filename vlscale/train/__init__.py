"""Training: the engine around DeepSpeed, the loop, the optimiser, the schedule, checkpoints and metrics."""
