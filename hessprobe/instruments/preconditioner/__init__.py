"""How much of the damped Gauss-Newton decrease each preconditioner reaches."""
