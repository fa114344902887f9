"""Before a run: memory, FLOPs, traffic, time and cost of a recipe under a DeepSpeed JSON on so many GPUs."""
