"""The table `train`: one row per outer step, whatever the optimizer."""

from __future__ import annotations

from collections.abc import Sequence

from hessprobe.schema.table import Table, Variable


def train_table(step_sizes: Sequence[float], inner_steps: int) -> Table:
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
        "alpha": list(step_sizes),
        "inner_step": list(range(inner_steps)),
    }
    return Table(name="train", variables=variables, coordinates=coordinates)
