"""Matrices known by their action: the Gauss-Newton matrix, the Hessian, and what is made of them."""
