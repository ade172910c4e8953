"""`python -m hessprobe`, as torchrun starts it."""

from hessprobe.cli import main

main()
