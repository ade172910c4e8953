"""One row of the table of training, and what a run has spent so far."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hessprobe.instruments.train.table import train_table
from hessprobe.optimization.line_search import step_sizes
from hessprobe.optimization.report import StepReport
from hessprobe.recipe import OptimizerRecipe
from hessprobe.schema.table import Table


@dataclass(kw_only=True)
class Totals:
    """What a run has spent so far; saved with every checkpoint."""

    tokens: int = 0
    line_search_tokens: int = 0
    seconds: float = 0.0
    probe_seconds: float = 0.0
    gradient_equivalents: float = 0.0

    def add(self, report: StepReport, seconds: float) -> None:
        """Adds one outer step."""
        self.tokens += report.tokens
        self.line_search_tokens += report.line_search_tokens
        self.gradient_equivalents += report.gradient_equivalents
        self.seconds += seconds


def inner_trace(recipe: OptimizerRecipe) -> int:
    """Returns how many inner losses an outer step can leave, those of the warm-up's steps included."""
    inner = (recipe.inner_steps or recipe.minibatches) if recipe.is_gauss_newton else 1
    if recipe.is_gauss_newton and recipe.inner_solver == "cg":
        inner = 2  # where conjugate gradients start and where they end
    return max(inner, recipe.minibatches if recipe.warmup_steps else 1)


def layout(recipe: OptimizerRecipe) -> Table:
    """Returns the table `train` of a run with this optimizer."""
    return train_table(step_sizes(recipe.step_sizes), inner_trace(recipe))


def train_row(
    report: StepReport, totals: Totals, recipe: OptimizerRecipe, *, held_out_loss: float, peak_memory: float
) -> dict[str, Any]:
    """Returns one row of `train`; NaN where a quantity does not exist for an optimizer."""
    inner = report.inner_loss or (math.nan,)
    places = inner_trace(recipe)
    promised = report.predicted_decrease
    return {
        "loss": report.loss,
        "held_out_loss": held_out_loss,
        "outcome": report.outcome,
        "step_size": report.step_size,
        "line_search_loss": [report.line_search_loss.get(a, math.nan) for a in step_sizes(recipe.step_sizes)],
        "update_norm": report.update_norm,
        "gradient_norm": report.gradient_norm,
        "predicted_decrease": promised,
        "actual_decrease": report.actual_decrease,
        "decrease_ratio": report.actual_decrease / promised if promised else math.nan,
        "inner_loss_first": inner[0],
        "inner_loss_last": inner[-1],
        "inner_loss": [*inner, *[math.nan] * places][:places],
        "inner_residual": report.inner_residual,
        "inner_iterations": report.inner_iterations,
        "tokens": totals.tokens,
        "line_search_tokens": totals.line_search_tokens,
        "seconds": totals.seconds,
        "probe_seconds": totals.probe_seconds,
        "gradient_equivalents": totals.gradient_equivalents,
        "peak_memory": peak_memory,
    }
