"""Several runs beside each other: what each found at the same step and damping, and which differences errors allow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from pathlib import Path

import numpy as np
import xarray as xr

from hessprobe.instruments.cross_layer.answers import NO_ROWS, CrossLayerAnswers, comparable
from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy
from hessprobe.reading.finding import Finding
from hessprobe.reading.labelled import labels
from hessprobe.reading.load_run import load_run
from hessprobe.reading.rows import sound_rows
from hessprobe.reading.trend import standard_errors_of_largest
from hessprobe.reading.wording import percent, plus_minus
from hessprobe.report.findings import findings


@dataclass(frozen=True, kw_only=True, eq=False)
class Beside:
    """One of several runs.

    Attributes:
        label: what it is called, of no other run.
        tree: the opened run, whole.
        table: its `cross_layer` rows up to the step at which runs are compared; None where it has none.
        groupings: of that table, at the damping that serves all runs.
        found: the findings up to that step.
    """

    label: str
    tree: xr.DataTree
    table: xr.Dataset | None
    groupings: GroupingStudy
    found: Sequence[Finding]


def runs_beside(paths: Sequence[Path]) -> tuple[list[Beside], int | None]:
    """Returns runs with what each found, and the last step that all measured (None where there is none).

    Where runs have measured steps in common, all are looked at up to the last of those, if it comes no earlier than half
    of the shortest run; else each at its own last.

    Raises:
        UserError: as `load_run`.
    """
    trees = [load_run(path) for path in paths]
    tables = [tree["cross_layer"].to_dataset() if "cross_layer" in tree.children else None for tree in trees]
    tables, common = _upto_common_step(tables, "coupling")
    against_hessian, _ = _upto_common_step(
        [tree["gn_hessian"].to_dataset() if "gn_hessian" in tree.children else None for tree in trees],
        "gn_gap",
    )
    none = GroupingStudy(reason="there is no table 'cross_layer'; --probe cross_layer records it")
    answers = comparable([CrossLayerAnswers(NO_ROWS if table is None else table) for table in tables])
    studies = [none if table is None else each.groupings for each, table in zip(answers, tables, strict=True)]
    beside = []
    for label, tree, table, gap, study in zip(
        labels(paths), trees, tables, against_hessian, studies, strict=True
    ):
        seen = {f"/{name}": tree[name].to_dataset() for name in tree.children}
        if table is not None:
            seen["/cross_layer"] = table
        if gap is not None:
            seen["/gn_hessian"] = gap
        found = findings(xr.DataTree.from_dict(seen), study)
        beside.append(Beside(label=label, tree=tree, table=table, groupings=study, found=found))
    return beside, common


def _upto_common_step(
    tables: Sequence[xr.Dataset | None], variable: str
) -> tuple[list[xr.Dataset | None], int | None]:
    """Returns tables up to the last step at which all have measured a variable, and that step (None: tables as they are)."""
    measured = [
        set(sound_rows(table, variable)["step"].values.tolist()) for table in tables if table is not None
    ]
    common = max(reduce(set.intersection, measured), default=None) if measured else None
    if common is None or common < min(max(steps) for steps in measured) / 2:
        # A step so early that most of what was measured would be left out is none.
        return list(tables), None
    return [
        None if t is None else t.isel(step=np.flatnonzero(t["step"].values <= common)) for t in tables
    ], common


# Name of a finding -> what its number is, and how it and a difference of two are written.
Written = Callable[[float, float | None], str]


def _points(value: float, stderr: float | None) -> str:
    return plus_minus(100 * value, None if stderr is None else 100 * stderr, "percentage points")


QUANTITIES: dict[str, tuple[str, Written, Written]] = {
    "off_block_energy": ("the share of the curvature matrix's squared norm between layers", percent, _points),
    "full_over_layerwise": (
        "what joining all layers adds to the layerwise held-out decrease",
        percent,
        _points,
    ),
    "gn_gap": (
        "the Hessian's distance from the Gauss-Newton matrix, in that one's norm",
        plus_minus,
        plus_minus,
    ),
    "layerwise_over_full": (
        "the held-out decrease of layerwise over full Gauss-Newton",
        plus_minus,
        plus_minus,
    ),
    "update_efficiency": ("the held-out efficiency of the run's own update", percent, _points),
    "coupling_by_distance": (
        "how far coupling falls from neighbours to the layers farthest apart",
        plus_minus,
        plus_minus,
    ),
}

# Numbers that depend on damping and sizes of batches: compared where runs share them.
OF_PRECONDITIONERS = ("layerwise_over_full", "update_efficiency")


def _asked(run: Beside) -> tuple[float, ...]:
    """Returns the first damping, the largest curvature batch and the held-out sequences of a run's preconditioners."""
    table = run.tree["preconditioner"].to_dataset()
    held_out = float(table.attrs.get("held_out_sequences", np.nan))
    return float(table["damping"].values[0]), float(table["curvature_sequences"].values[-1]), held_out


def differences(beside: Sequence[Beside]) -> list[Finding]:
    """Returns a finding for each quantity that two or more runs state with an error: who differs, or that none does.

    Errors add in squares, as of independent runs (sequences that runs share make a difference surer than that). Of
    several pairs the largest difference must lie beyond as many errors as make noise as rare as two do for one.
    """
    found = [_difference(name, beside) for name in QUANTITIES]
    return [finding for finding in found if finding is not None]


def _difference(name: str, beside: Sequence[Beside]) -> Finding | None:
    stated = [
        (run.label, finding)
        for run in beside
        for finding in run.found
        if finding.name == name and finding.stderr is not None
    ]
    if name in OF_PRECONDITIONERS:
        asked = [_asked(run) for run in beside if run.label in dict(stated)]
        stated = [each for each, how in zip(stated, asked, strict=True) if how == asked[0]]
    if len(stated) < 2:
        return None
    what, write, write_difference = QUANTITIES[name]
    pairs = list(combinations(stated, 2))
    sizes = [_apart(one, other) for (_, one), (_, other) in pairs]
    far = [abs(size) / stderr if stderr > 0 else np.inf * abs(size) for size, stderr in sizes]
    at = int(np.nanargmax(far)) if np.isfinite(far).any() else 0
    size, stderr = sizes[at]
    (first, _), (second, _) = pairs[at]
    resolved = bool(far[at] > standard_errors_of_largest(len(pairs)))
    if size < 0:
        first, second, size = second, first, -size
    numbers = "; ".join(f"{label} {write(each.value, each.stderr)}" for label, each in stated)
    where = sorted({step for _, each in stated for step in each.steps})
    several = any(len(each.steps) > 1 for _, each in stated)
    at_step = f"At step {where[0]:,}" if len(where) == 1 else "At their last measured steps"
    at_step = "Over their measured steps" if several else at_step
    verdict = (
        f"{first} lies above {second} by {write_difference(size, stderr)}"
        if resolved
        else f"no two can be told apart (the largest difference is {write_difference(size, stderr)})"
    )
    return replace(
        stated[0][1],
        sentence=f"{at_step}, {what}: {numbers}; {verdict}.",
        value=size,
        stderr=stderr,
        basis="; ".join(f"{label}: {each.basis}" for label, each in stated),
        steps=tuple(where),
        headline="",
        label="",
        resolved=resolved,
    )


def _apart(one: Finding, other: Finding) -> tuple[float, float]:
    """Returns the difference of two independent numbers and its standard error."""
    return one.value - other.value, float(np.hypot(one.stderr or 0.0, other.stderr or 0.0))
