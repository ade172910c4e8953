"""The command line: train, probe, report, show, compare, validate. Imports stand inside: a slip is answered at once."""

from hessprobe.cli.app import main

__all__ = ["main"]
