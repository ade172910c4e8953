"""Steps to a loss: many runs against each other and against the reference study."""
