"""From a stored run to answers: xarray in, xarray or small frozen results out; numpy only, no torch."""

from __future__ import annotations

from hessprobe.analysis.coupling import (
    coupling,
    coupling_by_distance,
    cross_share,
    curvature_shares,
    off_block_energy,
    strongest_pairs,
)
from hessprobe.analysis.finding import Finding
from hessprobe.analysis.findings import findings
from hessprobe.analysis.reading import load_run
from hessprobe.analysis.training import TrainingSummary, loss_curve, measuring_costs, summarize_training
from hessprobe.analysis.trend import Trend, trend
from hessprobe.store.reader import open_run, require_table

__all__ = [
    "Finding",
    "Trend",
    "TrainingSummary",
    "coupling",
    "coupling_by_distance",
    "cross_share",
    "curvature_shares",
    "findings",
    "load_run",
    "loss_curve",
    "measuring_costs",
    "off_block_energy",
    "open_run",
    "require_table",
    "strongest_pairs",
    "summarize_training",
    "trend",
]
