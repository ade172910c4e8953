"""From a stored run to answers: xarray in, xarray or small frozen results out; numpy only, no torch.

Coupling and trends come from the tables as stored. Which layers a preconditioner should join: `study_groupings(table)` for
all that a report says, `grouping_table(table, damping=...)` for every measured row, and for one row
`CrossFit(sketches_of(row), damping)` with `merge_gains`, `greedy_grouping`, `block_importance`, `relative_decrease`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# A package without files of its own: modules that once stood here are found under their old names (hessprobe.moved).
__path__: list[str] = []

if TYPE_CHECKING:
    from hessprobe.instruments.cross_layer.coupling import coupling as coupling
    from hessprobe.instruments.cross_layer.coupling import coupling_by_distance as coupling_by_distance
    from hessprobe.instruments.cross_layer.coupling import cross_share as cross_share
    from hessprobe.instruments.cross_layer.coupling import curvature_shares as curvature_shares
    from hessprobe.instruments.cross_layer.coupling import jacobi_radius as jacobi_radius
    from hessprobe.instruments.cross_layer.coupling import off_block_energy as off_block_energy
    from hessprobe.instruments.cross_layer.coupling import strongest_pairs as strongest_pairs
    from hessprobe.instruments.cross_layer.grouping.answer import Answer as Answer
    from hessprobe.instruments.cross_layer.grouping.groupings import GroupingCurve as GroupingCurve
    from hessprobe.instruments.cross_layer.grouping.groupings import block_importance as block_importance
    from hessprobe.instruments.cross_layer.grouping.groupings import curvature_along as curvature_along
    from hessprobe.instruments.cross_layer.grouping.groupings import greedy_grouping as greedy_grouping
    from hessprobe.instruments.cross_layer.grouping.groupings import merge_gains as merge_gains
    from hessprobe.instruments.cross_layer.grouping.groupings import relative_decrease as relative_decrease
    from hessprobe.instruments.cross_layer.grouping.sketch_space import CrossFit as CrossFit
    from hessprobe.instruments.cross_layer.grouping.sketches import Sketches as Sketches
    from hessprobe.instruments.cross_layer.grouping.sketches import sketches_of as sketches_of
    from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy as GroupingStudy
    from hessprobe.instruments.cross_layer.grouping.study import ranked_gains as ranked_gains
    from hessprobe.instruments.cross_layer.grouping.study import study_groupings as study_groupings
    from hessprobe.instruments.cross_layer.grouping.table import grouping_table as grouping_table
    from hessprobe.instruments.cross_layer.grouping.table import reached_damping as reached_damping
    from hessprobe.instruments.gn_hessian.ladder import ladder as ladder
    from hessprobe.instruments.gn_hessian.norms import block_gap as block_gap
    from hessprobe.instruments.gn_hessian.norms import curvature_ratio as curvature_ratio
    from hessprobe.instruments.gn_hessian.norms import gn_gap as gn_gap
    from hessprobe.instruments.gn_hessian.norms import residual_by_block as residual_by_block
    from hessprobe.instruments.gn_hessian.spectrum import negative_curvature as negative_curvature
    from hessprobe.instruments.gn_hessian.spectrum import smoothed_density as smoothed_density
    from hessprobe.instruments.preconditioner.blocks import block_losses as block_losses
    from hessprobe.instruments.preconditioner.blocks import block_steps as block_steps
    from hessprobe.instruments.preconditioner.decrease_ratios import cross_layer_pays as cross_layer_pays
    from hessprobe.instruments.preconditioner.decrease_ratios import decrease_ratios as decrease_ratios
    from hessprobe.instruments.preconditioner.efficiency import decreases as decreases
    from hessprobe.instruments.preconditioner.efficiency import efficiency as efficiency
    from hessprobe.instruments.preconditioner.efficiency import preconditioner_rows as preconditioner_rows
    from hessprobe.instruments.preconditioner.efficiency import scoreboard as scoreboard
    from hessprobe.instruments.train.answers import TrainingSummary as TrainingSummary
    from hessprobe.instruments.train.answers import loss_curve as loss_curve
    from hessprobe.instruments.train.answers import summarize_training as summarize_training
    from hessprobe.reading.costs import measuring_costs as measuring_costs
    from hessprobe.reading.finding import Finding as Finding
    from hessprobe.reading.load_run import load_run as load_run
    from hessprobe.reading.trend import Trend as Trend
    from hessprobe.reading.trend import trend as trend
    from hessprobe.report.findings import findings as findings
    from hessprobe.store.reader import open_run as open_run
    from hessprobe.store.reader import require_table as require_table

_HOMES = {
    "Answer": "instruments.cross_layer.grouping.answer",
    "CrossFit": "instruments.cross_layer.grouping.sketch_space",
    "Finding": "reading.finding",
    "GroupingCurve": "instruments.cross_layer.grouping.groupings",
    "GroupingStudy": "instruments.cross_layer.grouping.study",
    "Sketches": "instruments.cross_layer.grouping.sketches",
    "TrainingSummary": "instruments.train.answers",
    "Trend": "reading.trend",
    "block_gap": "instruments.gn_hessian.norms",
    "block_importance": "instruments.cross_layer.grouping.groupings",
    "block_losses": "instruments.preconditioner.blocks",
    "block_steps": "instruments.preconditioner.blocks",
    "coupling": "instruments.cross_layer.coupling",
    "coupling_by_distance": "instruments.cross_layer.coupling",
    "cross_layer_pays": "instruments.preconditioner.decrease_ratios",
    "cross_share": "instruments.cross_layer.coupling",
    "curvature_along": "instruments.cross_layer.grouping.groupings",
    "curvature_shares": "instruments.cross_layer.coupling",
    "curvature_ratio": "instruments.gn_hessian.norms",
    "decrease_ratios": "instruments.preconditioner.decrease_ratios",
    "decreases": "instruments.preconditioner.efficiency",
    "efficiency": "instruments.preconditioner.efficiency",
    "findings": "report.findings",
    "gn_gap": "instruments.gn_hessian.norms",
    "greedy_grouping": "instruments.cross_layer.grouping.groupings",
    "grouping_table": "instruments.cross_layer.grouping.table",
    "jacobi_radius": "instruments.cross_layer.coupling",
    "ladder": "instruments.gn_hessian.ladder",
    "load_run": "reading.load_run",
    "loss_curve": "instruments.train.answers",
    "measuring_costs": "reading.costs",
    "merge_gains": "instruments.cross_layer.grouping.groupings",
    "negative_curvature": "instruments.gn_hessian.spectrum",
    "off_block_energy": "instruments.cross_layer.coupling",
    "open_run": "store.reader",
    "preconditioner_rows": "instruments.preconditioner.efficiency",
    "ranked_gains": "instruments.cross_layer.grouping.study",
    "reached_damping": "instruments.cross_layer.grouping.table",
    "relative_decrease": "instruments.cross_layer.grouping.groupings",
    "require_table": "store.reader",
    "scoreboard": "instruments.preconditioner.efficiency",
    "residual_by_block": "instruments.gn_hessian.norms",
    "sketches_of": "instruments.cross_layer.grouping.sketches",
    "smoothed_density": "instruments.gn_hessian.spectrum",
    "strongest_pairs": "instruments.cross_layer.coupling",
    "study_groupings": "instruments.cross_layer.grouping.study",
    "summarize_training": "instruments.train.answers",
    "trend": "reading.trend",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"hessprobe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
