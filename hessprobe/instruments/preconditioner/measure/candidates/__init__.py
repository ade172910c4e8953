"""What every candidate of the preconditioner probe does with a gradient, one file a family."""
