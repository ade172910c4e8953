"""What reads a table that nobody has written a reader for: its scalars, vectors and matrices as they are stored."""
