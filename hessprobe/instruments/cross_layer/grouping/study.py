"""What a page or a paper says of groupings: every answer at the last measured row, importance over training.

All at one damping, the smallest that the last row's sketches resolve, so that rows can be compared; earlier rows that
need a larger one say so.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import xarray as xr

from hessprobe.errors import UserError
from hessprobe.instruments.cross_layer.grouping.sketches import Sketches, sketches_of
from hessprobe.instruments.cross_layer.grouping.table import (
    ANSWERS,
    grouping_table,
    reached_damping,
    sketched_rows,
)
from hessprobe.reading.rows import sound_rows

WANTED_DAMPING = 0.1
ROWS_OVER_TRAINING = 12
# Eigenproblems of 64 sketches, about 1 ms each: some 20 s for the last row, 5 s for all others.
SOLVES_OF_THE_LAST, SOLVES_OF_OTHERS = 20_000, 5_000


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupingStudy:
    """Groupings of one run. With a `reason`, there is nothing but that.

    Attributes:
        reason: why nothing can be said, with the way out.
        damping: mu of every answer; `wanted` the one asked for, which the sketches may not reach.
        basis: sequences, rounds and damping, in words.
        last: the last measured row with all `ANSWERS`, or those that `left_out` does not name.
        over_training: importance and full_over_layerwise of up to 12 rows, evenly spaced (step, ...).
        measured: rows that could have been taken.
        left_out: what would have taken too long here, and how to have it; "" for nothing.
    """

    reason: str = ""
    damping: float = np.nan
    wanted: float = WANTED_DAMPING
    basis: str = ""
    last: xr.Dataset = field(default_factory=xr.Dataset)
    over_training: xr.Dataset = field(default_factory=xr.Dataset)
    measured: int = 0
    left_out: str = ""

    def has(self, answer: str) -> bool:
        """Returns whether the last row holds an answer, resolved or not."""
        return answer in self.last


def study_groupings(table: xr.Dataset, damping: float | None = None) -> GroupingStudy:
    """Returns the grouping answers of a `cross_layer` table; about 3 s for 14 blocks and 256 sketches a row.

    Args:
        table: as stored.
        damping: mu; default the smallest that the last row's sketches resolve, at or above that of jacobi_radius.
    """
    try:
        rows = sketched_rows(sound_rows(table, "coupling"))
        if rows.sizes["step"] == 0:
            return GroupingStudy(reason="no measured row holds sketches yet")
        sketches = sketches_of(rows.isel(step=-1))
        wanted = float(table.attrs.get("jacobi_damping", WANTED_DAMPING))
        if damping is None:
            damping = reached_damping(rows.isel(step=-1), wanted)
    except UserError as error:
        return GroupingStudy(reason=str(error))
    layers = rows.sizes["block"]
    if layers < 2:
        return GroupingStudy(reason="one block has nothing to be joined with")
    a_group = _solves_of_a_group(sketches)
    all_pairs = layers * layers * a_group <= SOLVES_OF_THE_LAST
    answers = ANSWERS if all_pairs else ("full_over_layerwise", "importance")
    last = grouping_table(rows.isel(step=[-1]), damping=damping, answers=answers).isel(step=0)
    count = int(min(ROWS_OVER_TRAINING, max(1, SOLVES_OF_OTHERS // ((2 * layers + 1) * a_group))))
    kept = np.unique(np.linspace(0, rows.sizes["step"] - 1, count).round().astype(int))
    earlier = grouping_table(
        rows.isel(step=kept[:-1]) if count > 1 else rows.isel(step=[]),
        damping=damping,
        answers=("full_over_layerwise", "importance"),
    )
    shared = last[[str(name) for name in last.data_vars if str(name).startswith(("full_over", "importance"))]]
    return GroupingStudy(
        damping=damping,
        wanted=wanted,
        basis=f"{len(sketches.tokens)} sequences, half to build on and half to judge by, {sketches.rounds} rounds, "
        f"damping {damping:g}",
        last=last,
        over_training=xr.concat([earlier, shared.expand_dims("step")], dim="step")
        if earlier.sizes["step"]
        else shared.expand_dims("step"),
        measured=rows.sizes["step"],
        left_out=""
        if all_pairs
        else f"the pairs of {layers} blocks with {len(sketches.sequence)} sketches are left to "
        "hessprobe.instruments.cross_layer.grouping.table, which would take about "
        f"{layers * layers * a_group / 60_000:.0f} minutes",
    )


def ranked_gains(study: GroupingStudy, highest: int | None = None, lowest: int = 0) -> xr.Dataset:
    """Returns every pair of blocks (pair,) by what joining it gains, the largest first; NaN last.

    Variables gain, stderr, resolved, reason. With `highest`, of more pairs than highest + lowest only those ends.
    """
    last = study.last
    rows, columns = np.triu_indices(last.sizes["block"], k=1)
    order = np.argsort(-last["merge_gain"].values[rows, columns], kind="stable")
    if highest is not None and len(order) > highest + lowest:
        order = np.r_[order[:highest], order[len(order) - lowest :]]
    rows, columns, names = rows[order], columns[order], last["block"].values
    parts = {"gain": "", "stderr": "_stderr", "resolved": "_resolved", "reason": "_reason"}
    return xr.Dataset(
        {name: ("pair", last[f"merge_gain{part}"].values[rows, columns]) for name, part in parts.items()},
        coords={"block": ("pair", names[rows]), "other_block": ("pair", names[columns])},
    )


def _solves_of_a_group(sketches: Sketches) -> float:
    """Returns what one group costs, in eigenproblems of 64 sketches: four, of a quarter of the sketches each."""
    return 4 * max(1.0, len(sketches.sequence) / 256) ** 2.3
