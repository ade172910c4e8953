"""The learning rate's factor at every inner step: a pure function of the clock, so a resumed run agrees."""

from __future__ import annotations

import math

from hessprobe.errors import UserError, unknown_name

SCHEDULES = ("global-cosine", "inner-cosine", "constant")


def learning_rate_factor(
    schedule: str, *, outer: int, inner: int, outer_steps: int, inner_steps: int
) -> float:
    """Returns the factor in (0, 1] on the learning rate at inner step `inner` of outer step `outer`.

    "global-cosine" falls over all inner steps of the run (the study's best at small and medium batches),
    "inner-cosine" over each outer step's own (its best at large ones), "constant" not at all.

    Raises:
        UserError: an unknown schedule, or no inner steps.
    """
    if inner_steps < 1:
        raise UserError(f"inner steps must be at least 1, got {inner_steps}")
    if schedule == "constant":
        return 1.0
    if schedule == "global-cosine":
        done, total = outer * inner_steps + inner, outer_steps * inner_steps
    elif schedule == "inner-cosine":
        done, total = inner, inner_steps
    else:
        raise unknown_name("schedule", schedule, SCHEDULES)
    return 0.5 * (1 + math.cos(math.pi * min(done / max(total, 1), 1.0)))


def learning_rate_factors(schedule: str, *, outer: int, outer_steps: int, inner_steps: int) -> list[float]:
    """Returns the factors of all inner steps of outer step `outer`; see learning_rate_factor."""
    return [
        learning_rate_factor(
            schedule, outer=outer, inner=inner, outer_steps=outer_steps, inner_steps=inner_steps
        )
        for inner in range(inner_steps)
    ]
