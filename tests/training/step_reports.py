"""What an optimizer says of a step, made up."""

from __future__ import annotations

from hessprobe.optimization.report import StepReport


def report(**changes) -> StepReport:
    return StepReport(**{
        "outcome": "accepted", "loss": 5.5, "gradient_norm": 1.0, "update_norm": 0.1, "tokens": 8,
        "gradient_equivalents": 2.0, **changes,
    })  # fmt: skip
