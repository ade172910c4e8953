"""How far the Gauss-Newton matrix is from the Hessian."""
