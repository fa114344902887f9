"""Models: encoders on packed batches, their heads, presets, and the folders they are exchanged in."""
