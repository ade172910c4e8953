"""From a stored run to answers: xarray in, xarray or small frozen results out; numpy only, no torch.

Coupling and trends come from the tables as stored. Which layers a preconditioner should join: `study_groupings(table)` for
all that a report says, `grouping_table(table, damping=...)` for every measured row, and for one row
`CrossFit(sketches_of(row), damping)` with `merge_gains`, `greedy_grouping`, `block_importance`, `relative_decrease`.
"""

from __future__ import annotations

from hessprobe.analysis.answer import Answer
from hessprobe.analysis.coupling import (
    coupling,
    coupling_by_distance,
    cross_share,
    curvature_shares,
    jacobi_radius,
    off_block_energy,
    strongest_pairs,
)
from hessprobe.analysis.finding import Finding
from hessprobe.analysis.findings import findings
from hessprobe.analysis.grouping import (
    GroupingCurve,
    block_importance,
    curvature_along,
    greedy_grouping,
    merge_gains,
    relative_decrease,
)
from hessprobe.analysis.grouping_study import GroupingStudy, ranked_gains, study_groupings
from hessprobe.analysis.grouping_table import grouping_table, reached_damping
from hessprobe.analysis.reading import load_run
from hessprobe.analysis.sketch_space import CrossFit
from hessprobe.analysis.sketches import Sketches, sketches_of
from hessprobe.analysis.training import TrainingSummary, loss_curve, measuring_costs, summarize_training
from hessprobe.analysis.trend import Trend, trend
from hessprobe.store.reader import open_run, require_table

__all__ = [
    "Answer",
    "CrossFit",
    "Finding",
    "GroupingCurve",
    "GroupingStudy",
    "Sketches",
    "TrainingSummary",
    "Trend",
    "block_importance",
    "coupling",
    "coupling_by_distance",
    "cross_share",
    "curvature_along",
    "curvature_shares",
    "findings",
    "greedy_grouping",
    "grouping_table",
    "jacobi_radius",
    "load_run",
    "loss_curve",
    "measuring_costs",
    "merge_gains",
    "off_block_energy",
    "open_run",
    "ranked_gains",
    "reached_damping",
    "relative_decrease",
    "require_table",
    "sketches_of",
    "strongest_pairs",
    "study_groupings",
    "summarize_training",
    "trend",
]
