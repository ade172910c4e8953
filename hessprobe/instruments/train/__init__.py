"""What every run records of its training."""
