"""Processes, devices and memory."""
