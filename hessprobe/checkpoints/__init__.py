"""Measuring checkpoints, without training."""
