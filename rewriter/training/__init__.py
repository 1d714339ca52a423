"""The training side of a bundle: training, eval and optimizer model, and the checkpoint."""
