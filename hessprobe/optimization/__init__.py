"""Steps: from a batch of data to new parameters, by Gauss-Newton or by a baseline."""
