"""The instruments on checkpoints, without training: `hessprobe probe`."""
