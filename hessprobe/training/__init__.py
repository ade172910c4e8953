"""The run: a loop, what it records, how it is saved, and what it says."""
