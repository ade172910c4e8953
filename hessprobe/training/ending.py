"""How a run ends: after so many steps, at its target loss, or because the loss is not finite."""

from __future__ import annotations

from dataclasses import dataclass

from hessprobe.errors import RunFailed


class Diverged(RunFailed):
    """The loss is not finite: no fault of the machine, so a sweep may go on with its next run."""


@dataclass(frozen=True, kw_only=True)
class RunEnd:
    """How a run ended.

    Attributes:
        steps: outer steps taken.
        held_out_loss: the last one evaluated, nats per token.
        target: training.stop_at.
    """

    steps: int
    held_out_loss: float
    target: float | None

    @property
    def reached(self) -> bool:
        """Whether the last held-out loss is at or below the target."""
        return self.target is not None and self.held_out_loss <= self.target

    def __str__(self) -> str:
        if self.reached:
            return f"target reached in {self.steps} steps"
        missed = "" if self.target is None else "target not reached in "
        return f"{missed}{self.steps} steps, held-out loss {self.held_out_loss:.4f}"
