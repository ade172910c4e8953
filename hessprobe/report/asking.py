"""Every instrument asked once of every run: findings, page, figures and terminal then speak of the same answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import xarray as xr

from hessprobe.instruments.instrument import Instrument, loaded
from hessprobe.instruments.registry import EVERY_RUN, instruments, is_ours, reader_of
from hessprobe.reading.labelled import Labelled
from hessprobe.reading.rows import sound_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """What runs answer.

    Attributes:
        labels: a name for each run, no other's.
        trees: the opened runs.
        runs: {instrument: the runs with its answers}, in reading order; an instrument that no run recorded is left out.
        tables: {instrument: the rows of each run up to the step of comparison}.
        step: the step at which runs are compared; None where each is looked at up to its own last.
    """

    labels: Sequence[str]
    trees: Sequence[xr.DataTree]
    runs: Mapping[str, Sequence[Labelled[Any]]]
    tables: Mapping[str, Sequence[xr.Dataset]]
    step: int | None = None

    def recorded(self, name: str, run: int = 0) -> Labelled[Any] | None:
        """Returns what a run answers to an instrument; None where it holds no table of it."""
        return self.runs[name][run] if name in self.trees[run].children else None


def readers(trees: Iterable[xr.DataTree]) -> list[Instrument]:
    """Returns the instruments of a page in reading order: ours, and others whose tables a run holds."""
    held = dict.fromkeys(str(name) for tree in trees for name in tree.children)
    known = [name for name in instruments() if is_ours(name) or name in held]
    foreign = [name for name in held if name not in instruments()]
    return [reader_of(name) for name in (*known[: known.index(EVERY_RUN)], *foreign, EVERY_RUN)]


def ask(trees: Sequence[xr.DataTree], labels: Sequence[str] = ("",), upto: int | None = None) -> Asked:
    """Returns what runs answer.

    Args:
        trees: opened runs; of several, each instrument's rows are compared up to the step that all measured.
        labels: their names.
        upto: the step up to which rows are compared, in place of that.
    """
    found: dict[str, Sequence[Labelled[Any]]] = {}
    compared: dict[str, Sequence[xr.Dataset]] = {}
    step: int | None = None
    for each in readers(trees):
        held = [tree[each.name].to_dataset() if each.name in tree.children else None for tree in trees]
        recorded = [table for table in held if table is not None]
        if not recorded:
            continue
        common = _last_compared(each, recorded, upto)
        step = common if step is None and len(trees) > 1 else step
        # A run without the table answers as one that has recorded no row: it keeps its place, and its colour.
        tables = [recorded[0].isel(step=slice(0)) if table is None else table for table in held]
        compared[each.name] = [_until(table, common) for table in tables]
        runs = []
        for label, tree, table, early in zip(labels, trees, tables, compared[each.name], strict=True):
            answers = answers_of(each, table)
            same = early.sizes["step"] == table.sizes["step"]
            up_to = answers if same else answers_of(each, early)
            runs.append(Labelled(label=label, answers=answers, compared=up_to, run=tree))
        found[each.name] = loaded(each.agree)(runs) if each.agree and len(runs) > 1 else runs
    return Asked(labels=labels, trees=trees, runs=found, tables=compared, step=step)


def _last_compared(instrument: Instrument, tables: Sequence[xr.Dataset], upto: int | None) -> int | None:
    """Returns the step up to which an instrument's rows are compared; None for all of them.

    It is `upto` where all tables have measured that step, or the last that several tables have in common. A step so early
    that most of what was measured would be left out is none.
    """
    variable = instrument.compared_at
    if not variable or (upto is None and len(tables) == 1):
        return None
    measured = [set(sound_rows(table, variable)["step"].values.tolist()) for table in tables]
    both = reduce(set.intersection, measured)
    if upto is not None:
        return upto if upto in both else None
    common = max(both, default=None)
    return None if common is None or common < min(max(steps) for steps in measured) / 2 else common


def _until(table: xr.Dataset, step: int | None) -> xr.Dataset:
    return table if step is None else table.isel(step=np.flatnonzero(table["step"].values <= step))


def answers_of(instrument: Instrument, table: xr.Dataset) -> Any:
    """Returns what an instrument answers of a table; the table's name rides as an attribute, for readers of any table."""
    return loaded(instrument.answers)(table.assign_attrs(table=instrument.name))
