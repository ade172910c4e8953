"""From a stored run to answers: xarray in, xarray or small frozen results out; numpy only, no torch.

Coupling and trends come from the tables as stored. Which layers a preconditioner should join: `study_groupings(table)` for
all that a report says, `grouping_table(table, damping=...)` for every measured row, and for one row
`CrossFit(sketches_of(row), damping)` with `merge_gains`, `greedy_grouping`, `block_importance`, `relative_decrease`.
"""

from __future__ import annotations

from hessprobe.instruments.cross_layer.answers import (
    coupling,
    coupling_by_distance,
    cross_share,
    curvature_shares,
    jacobi_radius,
    off_block_energy,
    strongest_pairs,
)
from hessprobe.instruments.cross_layer.grouping.answer import Answer
from hessprobe.instruments.cross_layer.grouping.groupings import (
    GroupingCurve,
    block_importance,
    curvature_along,
    greedy_grouping,
    merge_gains,
    relative_decrease,
)
from hessprobe.instruments.cross_layer.grouping.sketch_space import CrossFit
from hessprobe.instruments.cross_layer.grouping.sketches import Sketches, sketches_of
from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy, ranked_gains, study_groupings
from hessprobe.instruments.cross_layer.grouping.table import grouping_table, reached_damping
from hessprobe.instruments.gn_hessian.answers import block_gap, curvature_ratio, gn_gap, residual_by_block
from hessprobe.instruments.gn_hessian.ladder import ladder
from hessprobe.instruments.gn_hessian.spectrum import negative_curvature, smoothed_density
from hessprobe.instruments.preconditioner.answers import (
    decreases,
    efficiency,
    preconditioner_rows,
    scoreboard,
)
from hessprobe.instruments.preconditioner.blocks import block_losses, block_steps
from hessprobe.instruments.preconditioner.decrease_ratios import cross_layer_pays, decrease_ratios
from hessprobe.instruments.train.answers import (
    TrainingSummary,
    loss_curve,
    measuring_costs,
    summarize_training,
)
from hessprobe.reading.finding import Finding
from hessprobe.reading.load_run import load_run
from hessprobe.reading.trend import Trend, trend
from hessprobe.report.findings import findings
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
    "block_gap",
    "block_importance",
    "block_losses",
    "block_steps",
    "coupling",
    "coupling_by_distance",
    "cross_layer_pays",
    "cross_share",
    "curvature_along",
    "curvature_ratio",
    "curvature_shares",
    "decrease_ratios",
    "decreases",
    "efficiency",
    "findings",
    "gn_gap",
    "greedy_grouping",
    "grouping_table",
    "jacobi_radius",
    "ladder",
    "load_run",
    "loss_curve",
    "measuring_costs",
    "merge_gains",
    "negative_curvature",
    "off_block_energy",
    "open_run",
    "preconditioner_rows",
    "ranked_gains",
    "reached_damping",
    "relative_decrease",
    "require_table",
    "residual_by_block",
    "scoreboard",
    "sketches_of",
    "smoothed_density",
    "strongest_pairs",
    "study_groupings",
    "summarize_training",
    "trend",
]
