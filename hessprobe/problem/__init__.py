"""What is differentiated: the model, its data, its blocks, and the loss as a function of one flat vector."""
