"""Every pair of layers from a few backward passes: Gram matrices of per-sequence gradients, block by block."""
