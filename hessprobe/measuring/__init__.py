"""The engine that all hosts share: when to measure, and where rows go."""
