"""Readers and writers of foreign checkpoints, and the weights that a run starts from."""
