"""What each method needs to reach a held-out loss: steps, tokens, seconds, gradients; over seeds and learning rates.

Reached means: the first evaluated step whose held-out loss is at or below the target. A run that did not get there
has no number (NaN, `reached` false), and neither has a mean over seeds of which one did not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xarray as xr

from hessprobe.comparison.cautions import cautions
from hessprobe.comparison.groups import batch_table, group_table, grouped, with_ratios
from hessprobe.comparison.runs import ComparedRun, read_runs
from hessprobe.errors import UserError

MEASURES = ("steps", "tokens", "tokens_with_line_search", "seconds", "gradient_equivalents")
REFERENCE = "full_gn"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs beside each other at one target loss.

    Attributes:
        target, target_basis: the held-out loss in nats per token, and where it comes from.
        runs: (run,) method, learning_rate, seed, group, tokens_per_step, recorded (steps), reached, lowest_loss,
            evaluated_within (steps since the evaluation before) and `to_target` (run, measure).
        groups: (group,) runs that differ only in their seed; see `group_table`.
        reference: the group that ratios are to, the full Gauss-Newton one with the fewest steps; None without one.
        batches: (pair,) one method at two batch sizes; see `batch_table`.
        curves: {run: its evaluated rows}.
        cautions: what limits the comparison, a sentence each.
        left_out: {run: why it takes no part}.
    """

    target: float
    target_basis: str
    runs: xr.Dataset
    groups: xr.Dataset
    reference: int | None
    batches: xr.Dataset
    curves: Mapping[str, xr.Dataset]
    cautions: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)


def compare(paths: Sequence[Path | str], target: float | None = None) -> Comparison:
    """Returns the comparison of all runs at or below some folders.

    Args:
        paths: runs' folders, or folders that contain runs at any depth.
        target: held-out loss, nats per token; default the lowest that every run reached.

    Raises:
        UserError: no run, none with a held-out loss, losses of different data, or a target that is no loss.
    """
    if target is not None and not (np.isfinite(target) and target > 0):
        raise UserError(f"--target {target}: a held-out loss in nats per token is wanted, above 0")
    found, left_out = read_runs([Path(path) for path in paths])
    basis = "as given"
    if target is None:
        sound = [run for run in found if np.isfinite(run.lowest_loss)]
        if not sound:
            raise UserError("nothing to compare: no run has a finite held-out loss yet")
        worst = max(sound, key=lambda run: run.lowest_loss)
        target = worst.lowest_loss
        but = f" but {len(found) - len(sound)} without a finite one" if len(sound) < len(found) else ""
        basis = f"the loss that every run{but} reached, the lowest of {worst.label}"
    runs = _run_table(found, target)
    groups = group_table(found, runs)
    full = (groups["best"] & (groups["method"] == REFERENCE)).values
    steps = np.where(full, groups["mean"].sel(measure="steps").values, np.nan)
    reference = int(np.nanargmin(steps)) if np.isfinite(steps).any() else None
    return Comparison(
        target=target,
        target_basis=basis,
        runs=runs,
        groups=with_ratios(groups, runs, reference),
        reference=reference,
        batches=batch_table(found, runs, groups),
        curves={run.label: run.curve for run in found},
        cautions=cautions(found, runs, target),
        left_out=left_out,
    )


def _run_table(found: Sequence[ComparedRun], target: float) -> xr.Dataset:
    to_target, within = np.full((len(found), len(MEASURES)), np.nan), np.full(len(found), np.nan)
    for index, run in enumerate(found):
        below = np.flatnonzero(run.curve["held_out_loss"].values <= target)
        if below.size:
            taken = run.curve["taken"].values[: below[0] + 1]
            within[index] = taken[-1] - (taken[-2] if taken.size > 1 else 0)
            to_target[index] = [spent(run.curve, measure)[below[0]] for measure in MEASURES]
    return xr.Dataset(
        {
            "method": ("run", np.array([run.method for run in found], dtype=object)),
            "learning_rate": ("run", [run.learning_rate for run in found]),
            "seed": ("run", [-1 if run.seed is None else run.seed for run in found]),
            "group": ("run", grouped(found)),
            "tokens_per_step": ("run", [run.tokens_per_step for run in found]),
            "recorded": ("run", [run.steps for run in found]),
            "lowest_loss": ("run", [run.lowest_loss for run in found]),
            "reached": ("run", np.isfinite(to_target[:, 0])),
            "evaluated_within": ("run", within),
            "to_target": (("run", "measure"), to_target),
        },
        coords={"run": np.array([run.label for run in found], dtype=object), "measure": list(MEASURES)},
    )


def spent(curve: xr.Dataset, measure: str) -> np.ndarray:
    """Returns what a run had spent at each of its evaluated rows, in one of MEASURES; NaN where it was not logged."""
    if measure == "steps":
        return curve["taken"].values.astype(float)
    if measure == "tokens_with_line_search":
        return spent(curve, "tokens") + spent(curve, "line_search_tokens")
    return curve[measure].values if measure in curve else np.full(curve.sizes["step"], np.nan)
