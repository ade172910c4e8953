"""The table `train`: one row per outer step, whatever the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hessprobe.optimization.line_search import step_sizes
from hessprobe.optimization.report import StepReport
from hessprobe.store.schema import Table, Variable


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


def train_table(line_search_grid: int) -> Table:
    """Returns the layout of `train`; line_search_loss has one column per step size tried."""

    def scalar(name: str, units: str, long_name: str, estimator: str = "exact on the batch") -> Variable:
        return Variable(name=name, dims=("step",), units=units, long_name=long_name, estimator=estimator)

    loss = "nats per token"
    variables = (
        scalar("loss", loss, "training loss at the step's start"),
        scalar("held_out_loss", loss, "held-out loss after the step", "exact on the held-out sequences"),
        scalar("step_size", "1", "step size the line search chose; 0 where the step was rejected"),
        Variable(
            name="line_search_loss",
            dims=("step", "alpha"),
            units=loss,
            long_name="loss at each step size tried",
            estimator="exact on the line search's batch",
        ),
        scalar("update_norm", "parameter units", "Euclidean norm of the parameters' change"),
        scalar("gradient_norm", "nats", "Euclidean norm of the first minibatch's gradient, before clipping"),
        scalar("predicted_decrease", loss, "decrease that the model of the loss promised for the step taken"),
        scalar("actual_decrease", loss, "decrease of the loss on the same data"),
        scalar("inner_loss_first", loss, "the inner problem's loss at its first inner step"),
        scalar("inner_loss_last", loss, "the inner problem's loss at its last inner step"),
        scalar("tokens", "tokens", "tokens read to take steps, so far", "counted"),
        scalar("line_search_tokens", "tokens", "tokens read to choose step sizes, so far", "counted"),
        scalar("seconds", "s", "seconds of training steps, so far", "wall clock"),
        scalar("probe_seconds", "s", "seconds of measuring, so far", "wall clock"),
        scalar(
            "gradient_equivalents", "gradients", "gradients of one minibatch, so far", "operations counted"
        ),
        scalar("peak_memory", "bytes", "peak memory of the process, or of its GPU", "as the system reports"),
    )
    return Table(name="train", variables=variables, coordinates={"alpha": list(step_sizes(line_search_grid))})


def train_row(
    report: StepReport, totals: Totals, *, held_out_loss: float, peak_memory: float, line_search_grid: int
) -> dict[str, Any]:
    """Returns one row of `train`."""
    inner = report.inner_loss or (math.nan,)
    return {
        "loss": report.loss,
        "held_out_loss": held_out_loss,
        "step_size": report.step_size,
        "line_search_loss": [report.line_search_loss.get(a, math.nan) for a in step_sizes(line_search_grid)],
        "update_norm": report.update_norm,
        "gradient_norm": report.gradient_norm,
        "predicted_decrease": report.predicted_decrease,
        "actual_decrease": report.actual_decrease,
        "inner_loss_first": inner[0],
        "inner_loss_last": inner[-1],
        "tokens": totals.tokens,
        "line_search_tokens": totals.line_search_tokens,
        "seconds": totals.seconds,
        "probe_seconds": totals.probe_seconds,
        "gradient_equivalents": totals.gradient_equivalents,
        "peak_memory": peak_memory,
    }
