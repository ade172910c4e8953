"""Processes, devices, memory and random numbers."""
