"""What a run shows, in sentences: each with value, error and what it rests on; nothing within its error.

A difference or a share is claimed beyond two standard errors; a trend also needs four measured steps. What
does not reach that is said to be unresolved, which is a result too.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from hessprobe.instruments.cross_layer.answers import CrossLayerAnswers
from hessprobe.instruments.cross_layer.findings import findings as cross_layer_findings
from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy
from hessprobe.instruments.gn_hessian.findings import discrepancy_findings, discrepancy_trends
from hessprobe.instruments.preconditioner.findings import preconditioner_findings
from hessprobe.instruments.train.answers import measuring_costs, summarize_training
from hessprobe.reading.finding import Finding
from hessprobe.reading.symmetry import symmetry_findings
from hessprobe.reading.wording import counted, percent


def findings(run: xr.DataTree, groupings: GroupingStudy | None = None) -> list[Finding]:
    """Returns the findings of a run, most important first; empty where nothing was recorded yet.

    Args:
        run: an opened run.
        groupings: what `study_groupings` said of its `cross_layer` table, where it was asked before: it takes seconds
            where layer kernels of two or more rounds were recorded.
    """
    probes = [name for name in ("cross_layer", "gn_hessian", "preconditioner") if name in run.children]
    found = symmetry_findings({name: run[name].to_dataset() for name in probes})
    if "cross_layer" in run.children:
        found += cross_layer_findings(CrossLayerAnswers(run["cross_layer"].to_dataset(), groupings=groupings))
    if "gn_hessian" in run.children:
        table = run["gn_hessian"].to_dataset()
        found += discrepancy_findings(table) + discrepancy_trends(table)
    if "preconditioner" in run.children:
        found += preconditioner_findings(run["preconditioner"].to_dataset())
    if "train" in run.children:
        found += _held_out(run["train"].to_dataset())
    return found + _cost(run)


def _held_out(table: xr.Dataset) -> list[Finding]:
    summary = summarize_training(table)
    if summary is None or summary.best_step is None:
        return []
    first, best, step = summary.first_held_out_loss, summary.best_held_out_loss, summary.best_step
    fell = best < first
    return [
        Finding(
            name="held_out_loss",
            sentence=f"The held-out loss fell from {first:.4g} nats per token after step "
            f"{summary.first_held_out_step:,} to {best:.4g} after step {step:,}, its best."
            if fell
            else f"The held-out loss has not fallen below its first value, {first:.4g} nats per token.",
            value=best,
            stderr=None,
            basis=f"{counted(summary.steps, 'step')}, {summary.tokens:,} training tokens",
            steps=(step,),
            headline=f"{best:.4g}",
            label=f"best held-out loss, nats per token (step {summary.first_held_out_step:,}: {first:.4g})",
            resolved=fell,
        )
    ]


def _cost(run: xr.DataTree) -> list[Finding]:
    costs = measuring_costs(run)
    share = float(costs["share_of_run"].sum(skipna=False)) if costs.sizes["table"] else np.nan
    if not np.isfinite(share):
        return []
    rows, seconds = int(costs["rows"].sum()), float(costs["seconds"].sum())
    return [
        Finding(
            name="measuring_cost",
            sentence=f"Measuring took {percent(share)} of the time of training and measuring: "
            f"{seconds:,.1f} s for {counted(rows, 'row')}.",
            value=share,
            stderr=None,
            basis="wall clock",
            steps=(),
            headline=percent(share),
            label="of the time of training and measuring was measuring",
        )
    ]
