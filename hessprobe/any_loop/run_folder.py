"""The folder that a recorder writes to: a new one, one to go on in, or the next free name beside one that is taken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from hessprobe.errors import UserError
from hessprobe.store.writer import RunWriter

LOGGER = logging.getLogger("hessprobe")
LOG = "log.zarr"
Laid = TypeVar("Laid")


def open_folder(
    folder: Path,
    attributes: Callable[[Path], Mapping[str, object]],
    lay_out: Callable[[RunWriter], Laid],
    *,
    resume: bool,
    beside: bool,
) -> Laid:
    """Returns what `lay_out` makes of the run's writer, its tables laid out.

    Args:
        folder: absolute.
        attributes: of a new run in a folder.
        lay_out: lays out the tables; UserError where those of the log are others.
        resume: go on in the folder where there is a run; of folder, folder-2, ... in the last that holds one if `beside`.
        beside: where the folder is taken, or its run cannot be gone on with, take the next free name beside it, and say so.

    Raises:
        UserError: a folder that cannot be written; without `beside` also one that is taken or holds another run.
    """
    last, free = _last_and_free(folder) if beside else (folder, folder)
    why = "holds a run already"
    if resume and (last / LOG).exists():
        try:
            return _laid_out(RunWriter.reopen(last), lay_out)
        except UserError as error:
            if not beside:
                raise
            why = f"holds a run that this one cannot go on with ({error})"
    found = _laid_out(RunWriter.create(free, attributes(free)), lay_out)
    if free != folder:
        LOGGER.warning("%s %s: this one is recorded beside it, in %s", last if resume else folder, why, free)
    return found


def _laid_out(writer: RunWriter, lay_out: Callable[[RunWriter], Laid]) -> Laid:
    try:
        return lay_out(writer)
    except BaseException:
        writer.close()
        raise


def _last_and_free(folder: Path) -> tuple[Path, Path]:
    """Returns the last of folder, folder-2, folder-3, ... that holds a run, and the first that holds none."""
    last, free, number = folder, folder, 1
    while (free / LOG).exists():
        number += 1
        last, free = free, folder.with_name(f"{folder.name}-{number}")
    return last, free
