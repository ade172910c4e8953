"""Is hessprobe right and fast on this machine? Stages of checks and measurements, one JSON file and one page."""
