"""The decoder that hessprobe trains, and models other people trained."""
