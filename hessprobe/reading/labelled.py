"""Runs under the names they have beside each other, each with what an instrument answers of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import xarray as xr

Answers = TypeVar("Answers")


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelled(Generic[Answers]):
    """One of the runs that a picture or a section shows; one run alone is a list of one.

    Attributes:
        label: the run's name, no other run's.
        answers: of all its rows. Lines over training show what came after the step of comparison too.
        compared: of its rows up to the step at which runs are compared; of one run alone, the same object.
        run: the opened run, for what stands outside the instrument's table.
    """

    label: str
    answers: Answers
    compared: Answers
    run: xr.DataTree | None = None


def labels(paths: Sequence[Path]) -> list[str]:
    """Returns a name for each run that no other has: its folder's, or with a number where two are the same."""
    folders = [path.resolve() for path in paths]
    names = [folder.parent.name if folder.name == "log.zarr" else folder.name for folder in folders]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]
