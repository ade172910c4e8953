"""One folder for each table of the log."""
