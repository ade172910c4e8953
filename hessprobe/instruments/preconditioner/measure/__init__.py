"""Fills rows of the table from a snapshot of training."""
