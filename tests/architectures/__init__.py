"""Every architecture that transformers builds small, and torch's own: what the package makes of them."""
