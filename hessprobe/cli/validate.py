"""`hessprobe validate`: this machine's checks and measurements, in validate.json and one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hessprobe.cli.run_folders import free_folder
from hessprobe.errors import RunFailed


def validate_machine(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    minutes: Annotated[
        float, typer.Option(help="For everything; what no longer fits is left out and said.")
    ] = 10,
    small: Annotated[
        bool, typer.Option("--small", help="Shrunken copies of the large models: minutes on two CPU cores.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The folder to write; default runs/validate.")] = None,
) -> None:
    """Is hessprobe right and fast on this machine? Checks and measurements into validate.json and one page."""
    from hessprobe.validation.command import validate

    folder = out or free_folder("validate")
    found = validate(device=device, minutes=minutes, small=small, folder=folder)
    print(f"\nfigures  {folder / 'validate.json'}\npage     {folder / 'validate.html'}")
    if found.failures:
        names = "; ".join(f"{figure.stage}: {figure.name}" for figure in found.failures[:3])
        raise RunFailed(
            f"{len(found.failures)} of {found.checks} checks, such as {names}; {folder / 'validate.html'} has them all"
        )
    print(f"all {found.checks} checks passed")
