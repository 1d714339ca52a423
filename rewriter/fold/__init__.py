"""Folds: rewrites that merge an operator into its neighbour without changing what the model computes."""
