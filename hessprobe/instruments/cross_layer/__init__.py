"""How strongly layers couple through curvature."""
