"""The table `train`: one row per outer step, whatever the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hessprobe.optimization.line_search import step_sizes
from hessprobe.optimization.report import StepReport
from hessprobe.recipe import OptimizerRecipe
from hessprobe.schema.table import Table, Variable


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


def train_table(recipe: OptimizerRecipe) -> Table:
    """Returns the layout of `train`: line_search_loss has a column per step size, inner_loss one per inner step."""

    def scalar(
        name: str, units: str, long_name: str, estimator: str = "exact on the batch", dtype: str = "float64"
    ) -> Variable:
        return Variable(
            name=name, dims=("step",), units=units, long_name=long_name, estimator=estimator, dtype=dtype
        )

    def along(dim: str, name: str, long_name: str, estimator: str) -> Variable:
        return Variable(
            name=name, dims=("step", dim), units="nats per token", long_name=long_name, estimator=estimator
        )

    loss = "nats per token"
    variables = (
        scalar("loss", loss, "training loss at the step's start"),
        scalar("held_out_loss", loss, "held-out loss after the step", "exact on the held-out sequences"),
        scalar(
            "outcome", "text", "accepted, or why the step was rejected, retried or diverged", "exact", "str"
        ),
        scalar("step_size", "1", "step size the line search chose; 0 where the step was rejected"),
        along(
            "alpha", "line_search_loss", "loss at each step size tried", "exact on the line search's batch"
        ),
        scalar("update_norm", "parameter units", "Euclidean norm of the parameters' change"),
        scalar("gradient_norm", "nats", "Euclidean norm of the first minibatch's gradient, before clipping"),
        scalar("predicted_decrease", loss, "decrease that the model of the loss promised for the step taken"),
        scalar("actual_decrease", loss, "decrease of the loss on the same data"),
        scalar(
            "decrease_ratio", "1", "actual over predicted decrease; 1 where the model of the loss is right"
        ),
        scalar("inner_loss_first", loss, "the inner problem's loss at its first inner step"),
        scalar("inner_loss_last", loss, "the inner problem's loss at its last inner step"),
        along(
            "inner_step",
            "inner_loss",
            "the inner problem's loss at each inner step",
            "exact on its minibatch",
        ),
        scalar(
            "inner_residual",
            "1",
            "relative residual of the inner system at the solve's end",
            "from a product",
        ),
        scalar("inner_iterations", "iterations", "iterations or steps of the inner solve", "counted"),
        scalar("tokens", "tokens", "tokens read to take steps, so far", "counted"),
        scalar("line_search_tokens", "tokens", "tokens read to choose step sizes, so far", "counted"),
        scalar("seconds", "s", "seconds of training steps, so far", "wall clock"),
        scalar("probe_seconds", "s", "seconds of measuring, so far", "wall clock"),
        scalar(
            "gradient_equivalents", "gradients", "gradients of one minibatch, so far", "operations counted"
        ),
        scalar("peak_memory", "bytes", "peak memory of the process, or of its GPU", "as the system reports"),
    )
    coordinates = {
        "alpha": list(step_sizes(recipe.step_sizes)),
        "inner_step": list(range(inner_trace(recipe))),
    }
    return Table(name="train", variables=variables, coordinates=coordinates)


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
