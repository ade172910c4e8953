"""How a row's sequences are shared out: nested curvature batches for every draw, then the held-out ones."""

from __future__ import annotations

from hessprobe.errors import UserError
from hessprobe.problem.batches import Batch
from hessprobe.problem.objective import Objective
from hessprobe.recipe import PreconditionerRecipe


class SharedOut:
    """One batch, or its micro-batches, as the batches of a row of the preconditioner probe.

    Draw i has the sequences from i times the largest curvature batch on; a smaller batch is the first part of a larger.

    Raises:
        UserError: fewer sequences than the recipe lays out.
    """

    def __init__(self, objective: Objective, batches: list[Batch], recipe: PreconditionerRecipe) -> None:
        self.objective, self.recipe = objective, recipe
        self.batches = objective.micro_batches(batches)
        self._counts = [objective.sequence_shape(batch)[0] for batch in self.batches]
        if sum(self._counts) < recipe.sequences:
            raise UserError(
                f"preconditioner: {sum(self._counts)} sequences in this batch, and {recipe.sequences} are laid out "
                f"({recipe.draws} x {recipe.curvature_sequences[-1]} to build on, {recipe.held_out_sequences} held out): "
                "measure with more, or lower preconditioner.curvature_sequences, draws or held_out_sequences"
            )

    def curvature(self, draw: int, sequences: int) -> list[Batch]:
        """Returns the first so many sequences of a draw."""
        start = draw * self.recipe.curvature_sequences[-1]
        return self._between(start, start + sequences)

    @property
    def held_out(self) -> list[Batch]:
        """The sequences that no candidate sees."""
        start = self.recipe.draws * self.recipe.curvature_sequences[-1]
        return self._between(start, start + self.recipe.held_out_sequences)

    def _between(self, start: int, stop: int) -> list[Batch]:
        """Returns sequences start to stop, numbered through the micro-batches."""
        found, first = [], 0
        for batch, count in zip(self.batches, self._counts, strict=True):
            low, high = max(start - first, 0), min(stop - first, count)
            first += count
            if low >= high:
                continue
            if high - low == count:
                found.append(batch)
                continue
            if len(self.objective.split(batch, 2)) == 1:
                raise UserError(
                    f"preconditioner: this batch of {count} sequences cannot be cut into curvature and held-out "
                    "sequences: its sequences see each other, or forward= or targets= of the objective read it. Give "
                    "micro-batches that end where the recipe's batches end"
                )
            found.append(self.objective.cut(batch, low, high))
        return found
