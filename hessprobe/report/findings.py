"""What a run shows, in sentences: each with value, error and what it rests on; nothing within its error.

A difference or a share is claimed beyond two standard errors; a trend also needs four measured steps. What
does not reach that is said to be unresolved, which is a result too.
"""

from __future__ import annotations

import xarray as xr

from hessprobe.instruments.cross_layer.findings import cross_layer_findings, cross_layer_trends
from hessprobe.instruments.cross_layer.grouping.findings import grouping_findings
from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy, study_groupings
from hessprobe.instruments.gn_hessian.answers import GNHessianAnswers
from hessprobe.instruments.gn_hessian.findings import findings as gn_hessian_findings
from hessprobe.instruments.preconditioner.findings import preconditioner_findings
from hessprobe.instruments.train.answers import TrainAnswers
from hessprobe.instruments.train.findings import findings as train_findings
from hessprobe.reading.finding import Finding
from hessprobe.reading.symmetry import symmetry_findings
from hessprobe.report.costs import cost_findings


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
        table = run["cross_layer"].to_dataset()
        found += cross_layer_findings(table)
        found += grouping_findings(study_groupings(table) if groupings is None else groupings)
        found += cross_layer_trends(table)
    if "gn_hessian" in run.children:
        found += gn_hessian_findings(GNHessianAnswers(run["gn_hessian"].to_dataset()))
    if "preconditioner" in run.children:
        found += preconditioner_findings(run["preconditioner"].to_dataset())
    if "train" in run.children:
        found += train_findings(TrainAnswers(run["train"].to_dataset()))
    return found + cost_findings(run)
