"""The tables of a comparison as words, for page and terminal: steps and ratios, costs, sweeps, runs, the reference study."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xarray as xr

from hessprobe.comparison.compared import Comparison
from hessprobe.comparison.findings import (
    best_groups,
    loss_said,
    rate_said,
    reading_order,
    steps_said,
    study_ratio,
)
from hessprobe.comparison.groups import METHODS
from hessprobe.comparison.reference_study import CITATION, reference_study
from hessprobe.reading.wording import plus_minus

COSTS = {
    "tokens": "tokens",
    "tokens_with_line_search": "with line search",
    "seconds": "seconds",
    "gradient_equivalents": "gradient equivalents",
}


def reference_label(comparison: Comparison) -> str:
    """Returns the label of the group that ratios are to; empty without one."""
    return (
        "" if comparison.reference is None else str(comparison.groups["label"].values[comparison.reference])
    )


def _each(groups: xr.Dataset) -> Iterator[xr.Dataset]:
    return (groups.isel(group=i) for i in range(groups.sizes["group"]))


def step_rows(comparison: Comparison) -> list[dict[str, str]]:
    """Returns the main table: a variant a row, with steps, their range over seeds, the ratio and the study's."""
    return [_step_row(comparison, group) for group in _each(best_groups(comparison))]


def _step_row(comparison: Comparison, group: xr.Dataset) -> dict[str, str]:
    steps = group.sel(measure="steps")
    theirs = study_ratio(str(group["method"].values))
    least, most, seeds = float(steps["least"]), float(steps["most"]), int(group["seeds"])
    return {
        "method": str(group["label"].values),
        "rate": rate_said(group),
        "tuned_rate": _tuned_rate(group),
        "seeds": str(seeds),
        "steps": steps_said(group),
        "range": f"{least:,.0f} to {most:,.0f}" if seeds > 1 and np.isfinite(least) else "",
        "ratio": _ratio(comparison, group, "steps"),
        "study": f"{theirs:.3g}" if np.isfinite(theirs) else "",
    }


def _tuned_rate(group: xr.Dataset) -> str:
    rates, edge = int(group["rates"]), str(group["edge"].values)
    return rate_said(group) + (f", {f'the {edge}' if edge else 'best'} of {rates}" if rates > 1 else "")


def cost_rows(comparison: Comparison) -> list[dict[str, str]]:
    """Returns what the steps to the target cost, a variant a row: tokens, seconds, gradients and their ratios."""
    rows = []
    for group in _each(best_groups(comparison)):
        row = {"method": str(group["label"].values)}
        for measure in COSTS:
            cell = group.sel(measure=measure)
            row[measure] = amount(float(cell["mean"]), float(cell["stderr"]))
            row[f"{measure}_ratio"] = _ratio(comparison, group, measure)
        rows.append(row)
    return rows


def rate_rows(comparison: Comparison) -> list[dict[str, str]]:
    """Returns every learning rate of the variants that tried more than one, best ones marked."""
    groups = comparison.groups.isel(group=reading_order(comparison.groups))
    swept = groups.isel(group=np.flatnonzero(groups["rates"].values > 1))
    return [
        {
            "method": str(group["label"].values),
            "rate": rate_said(group),
            "seeds": str(int(group["seeds"])),
            "steps": steps_said(group),
            "lowest": loss_said(group),
            "mark": _mark(group),
        }
        for group in _each(swept)
    ]


def _mark(group: xr.Dataset) -> str:
    edge = str(group["edge"].values)
    return f"best, the {edge} tried" if edge else "best" if group["best"] else ""


def run_rows(comparison: Comparison) -> list[dict[str, str]]:
    """Returns every run that takes part: its seed, steps to the target, steps recorded and lowest loss."""
    runs = comparison.runs
    steps = runs["to_target"].sel(measure="steps").values
    labels = comparison.groups["label"].values[runs["group"].values]
    return [
        {
            "run": str(runs["run"].values[i]),
            "method": str(labels[i]),
            "seed": str(seed) if (seed := int(runs["seed"][i])) >= 0 else "not recorded",
            "steps": f"{steps[i]:,.0f}"
            if runs["reached"].values[i]
            else f"not reached in {int(runs['recorded'][i]):,}",
            "lowest": loss_said(runs.isel(run=i)),
        }
        for i in range(runs.sizes["run"])
    ]


def study_rows(comparison: Comparison) -> list[dict[str, str]]:
    """Returns the reference study's steps to a loss, with the ratio found here beside each method."""
    ours: dict[str, str] = {}
    for group in _each(best_groups(comparison)):
        whole = int(group["reached"]) == int(group["seeds"])
        without = "no full GN to compare with" if whole else steps_said(group)
        # Of several variants of a method the first, which needs the fewest steps.
        ours.setdefault(str(group["method"].values), _ratio(comparison, group, "steps") or without)
    return [
        {
            "method": METHODS[row.method],
            "batch": amount(row.batch_tokens, np.nan),
            "steps": f"{row.steps:,.0f}" if np.isfinite(row.steps) else "",
            "ratio": f"{row.ratio_to_full_gn:.3g}",
            "ours": ours.get(row.method, "not among these runs"),
            "note": row.note,
        }
        for row in reference_study("steps_to_loss")
    ]


def study_name(quantity: str) -> str:
    """Returns whose numbers they are: `Abreu et al. 2025, 150M, loss 3.25`."""
    first = reference_study(quantity)[0]
    return f"{CITATION}, {first.model}, loss {first.validation_loss:g}"


def critical_rows() -> list[dict[str, str]]:
    """Returns the batch sizes beyond which the reference study's methods hardly gain."""
    return [
        {"method": METHODS[row.method], "batch": amount(row.batch_tokens, np.nan), "note": row.note}
        for row in reference_study("critical_batch")
    ]


def amount(value: float, stderr: float) -> str:
    """Returns a large count as `1.31 ± 0.02 M`; what is missing as a dash."""
    if not np.isfinite(value):
        return "–"
    scale, unit = next(
        ((s, u) for s, u in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= s), (1.0, "")
    )
    return plus_minus(value / scale, stderr / scale, unit)


def _ratio(comparison: Comparison, group: xr.Dataset, measure: str) -> str:
    """Returns a group's ratio to the reference; `≈` in front of one that is not told apart from 1."""
    cell = group.sel(measure=measure)
    value, stderr = float(cell["ratio"]), float(cell["ratio_stderr"])
    if int(group["group"]) == comparison.reference:
        return "1" if np.isfinite(float(cell["mean"])) else ""
    if not np.isfinite(value):
        return ""
    within = np.isfinite(stderr) and cell["ratio_low"] <= 1 <= cell["ratio_high"]
    return f"{'≈ ' if within else ''}{plus_minus(value, stderr)}"
