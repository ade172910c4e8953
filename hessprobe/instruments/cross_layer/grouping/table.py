"""Every grouping answer of the measured rows of a `cross_layer` table, and the damping that its sketches reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr

from hessprobe.errors import UserError, unknown_name
from hessprobe.instruments.cross_layer.grouping.answer import LEAST_FREEDOM, Answer
from hessprobe.instruments.cross_layer.grouping.groupings import (
    block_importance,
    greedy_grouping,
    merge_gains,
    relative_decrease,
)
from hessprobe.instruments.cross_layer.grouping.sketch_space import CrossFit
from hessprobe.instruments.cross_layer.grouping.sketches import sketches_of
from hessprobe.reading.rows import sound_rows

ANSWERS = ("full_over_layerwise", "merge_gain", "importance", "curve")
Columns = dict[str, tuple]


def grouping_table(table: xr.Dataset, *, damping: float, answers: Sequence[str] = ANSWERS) -> xr.Dataset:
    """Returns grouping answers for each measured row of the `cross_layer` table, along its gradient.

    Each with _stderr, _reached, _resolved and _reason, as `Answer` says: full_over_layerwise (step), merge_gain (step,
    block, other_block), importance (step, block); and "curve" gives curve and captured (step, groups: how many are
    left), the decrease over that of layerwise and of full, with `joined` (what was joined to get there) and `members`
    (the grouping). About 1.3 s a row for 14 blocks and 256 sketches on one core, of which importance and
    full_over_layerwise take 0.2 s.

    A row of fewer than 4 sequences or 2 rounds is unresolved throughout, with NaN for its numbers.

    Raises:
        UserError: the table was recorded without layer kernels, a damping that is not positive, or an unknown answer.
    """
    for name in answers:
        if name not in ANSWERS:
            raise unknown_name("answer", name, ANSWERS)
    if not damping > 0:
        raise UserError(f"damping must be positive, got {damping}")
    rows, blocks = sketched_rows(table), table["block"].values
    found = [_row(rows.isel(step=at), damping, answers) for at in range(rows.sizes["step"])]
    joined = (
        xr.concat(found, dim="step") if found else xr.Dataset(coords={"step": np.empty(0, dtype=np.int64)})
    )
    coords = {"block": blocks, "other_block": blocks, "groups": np.arange(len(blocks), 0, -1)}
    return joined.assign_coords(coords | {"step": rows["step"].values}).assign_attrs(damping=damping)


def sketched_rows(table: xr.Dataset) -> xr.Dataset:
    """Returns the rows that hold layer kernels, without reading them.

    Raises:
        UserError: the table was recorded without layer kernels.
    """
    if "kernel" not in table:
        raise UserError(
            "this cross_layer table holds no layer kernels; record with --set cross_layer.method=kernels "
            "--set cross_layer.rounds=4"
        )
    return sound_rows(table, "sequence_tokens")


def reached_damping(row: xr.Dataset, wanted: float) -> float:
    """Returns the smallest damping, at or above the wanted one, at which a row's sketches resolve any grouping.

    Rounded up to 1, 2 or 5 times a power of ten where the wanted one is not reached. The full structure needs the
    largest: joining blocks adds curvature, which takes up the sketches' freedom.

    Raises:
        UserError: too few sequences or rounds for any grouping.
    """
    fit = CrossFit(sketches_of(row), wanted)
    least = fit.least_damping(fit.groups("full")[0], LEAST_FREEDOM)
    if least <= wanted:
        return wanted
    decade = 10.0 ** math.floor(math.log10(least))
    return next(float(f"{factor * decade:.1g}") for factor in (1, 2, 5, 10) if factor * decade >= least)


def _row(row: xr.Dataset, damping: float, answers: Sequence[str]) -> xr.Dataset:
    layers = row.sizes["block"]
    try:
        fit = CrossFit(sketches_of(row), damping)
    except UserError as error:
        columns = [_nothing(name, layers, str(error)) for name in answers]
    else:
        # In this order: pairs are solved for with every sequence left out, which greedy merging need not repeat.
        columns = [_ASK[name](fit) for name in ANSWERS if name in answers]
    return xr.Dataset({name: column for each in columns for name, column in each.items()})


def _full(fit: CrossFit) -> Columns:
    return _variables("full_over_layerwise", relative_decrease(fit, "full", "layerwise"))


def _gains(fit: CrossFit) -> Columns:
    return _variables("merge_gain", merge_gains(fit))


def _importance(fit: CrossFit) -> Columns:
    return _variables("importance", block_importance(fit))


def _curve(fit: CrossFit) -> Columns:
    curve = greedy_grouping(fit)
    joined = ["", *(f"{first} and {second}" for first, second in curve.joined)]
    members = [" | ".join(" + ".join(group) for group in groups) for groups in curve.groups]
    columns = _variables("curve", curve.relative) | _variables("captured", curve.captured)
    return columns | _words(joined, members)


def _words(joined: list[str], members: list[str]) -> Columns:
    return {"joined": ("groups", np.array(joined, object)), "members": ("groups", np.array(members, object))}


_ASK: dict[str, Callable[[CrossFit], Columns]] = {
    "full_over_layerwise": _full,
    "merge_gain": _gains,
    "importance": _importance,
    "curve": _curve,
}
_DIMS: dict[str, tuple[str, ...]] = {
    "full_over_layerwise": (),
    "merge_gain": ("block", "other_block"),
    "importance": ("block",),
    "curve": ("groups",),
    "captured": ("groups",),
}


def _nothing(name: str, layers: int, reason: str) -> Columns:
    """Returns the columns of an answer that could not be had."""
    columns: Columns = {}
    for each in ("curve", "captured") if name == "curve" else (name,):
        shape = (layers,) * len(_DIMS[each])
        nan, no = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
        empty = Answer(
            value=nan, stderr=nan, reached=no, resolved=no, reason=np.full(shape, reason, dtype=object)
        )
        columns |= _variables(each, empty)
    return columns | (_words([""] * layers, [""] * layers) if name == "curve" else {})


def _variables(name: str, answer: Answer) -> Columns:
    dims = _DIMS[name]
    return {
        name: (dims, answer.value),
        f"{name}_stderr": (dims, answer.stderr),
        f"{name}_reached": (dims, answer.reached),
        f"{name}_resolved": (dims, answer.resolved),
        f"{name}_reason": (dims, answer.reason),
    }
