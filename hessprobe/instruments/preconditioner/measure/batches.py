"""How a row's sequences are shared out: nested curvature batches for every draw, then the held-out ones."""

from __future__ import annotations

from hessprobe.errors import UserError
from hessprobe.instruments.preconditioner.recipe import PreconditionerRecipe
from hessprobe.problem.batches import Batch
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.splitting import can_be_cut


class SharedOut:
    """One batch, or its micro-batches, as the batches of a row of the preconditioner probe.

    Draw i has the sequences from i times the largest curvature batch on; a smaller batch is the first part of a larger.
    Of fewer sequences than the recipe lays out there are fewer draws; then fewer sizes, as the recipe shares them out
    between building and judging, and fewer held out; and at last one size below all of the recipe's.

    Attributes:
        draws, sizes, held_out_sequences: what this row has of the recipe's `draws`, `curvature_sequences` and
            `held_out_sequences`; a size stands at the place of the recipe's own, the last ones may be missing.
        shrunk: how it differs from the recipe, in words; "" where it does not.

    Raises:
        UserError: a single sequence.
    """

    def __init__(self, batches: MicroBatches, recipe: PreconditionerRecipe) -> None:
        self.batches, self.recipe = batches, recipe
        count, self.shrunk = batches.sequences, ""
        self.draws, self.sizes, self.held_out_sequences = laid_out(recipe, count)
        if count < recipe.sequences:
            sizes = ", ".join(map(str, self.sizes))
            self.shrunk = (
                f"preconditioner: {count} sequences in this batch, and {recipe.sequences} are laid out ({recipe.draws} x "
                f"{recipe.curvature_sequences[-1]} to build on, {recipe.held_out_sequences} held out). Measured with what "
                f"there is: {self.draws} draw(s) of {sizes} to build on, {self.held_out_sequences} held out; the variables "
                "curvature_sequences_read and held_out_sequences_read say so in every row. Give larger batches, or lower "
                "preconditioner.curvature_sequences and preconditioner.held_out_sequences"
            )

    def curvature(self, draw: int, sequences: int) -> MicroBatches:
        """Returns the first so many sequences of a draw."""
        start = draw * self.sizes[-1]
        return self._between(start, start + sequences)

    @property
    def held_out(self) -> MicroBatches:
        """The sequences that no candidate sees."""
        start = self.draws * self.sizes[-1]
        return self._between(start, start + self.held_out_sequences)

    def _between(self, start: int, stop: int) -> MicroBatches:
        """Returns sequences start to stop, numbered through the micro-batches."""
        objective = self.batches.objective

        def cut(number: int, low: int, high: int) -> Batch:
            if not can_be_cut(objective, self.batches[number]):
                raise UserError(
                    f"preconditioner: this batch of {self.batches.counts[number]} sequences cannot be cut into curvature "
                    "and held-out sequences: its sequences see each other, or forward= or targets= of the objective read "
                    "it. Give micro-batches that end where the recipe's batches end"
                )
            return objective.cut(self.batches[number], low, high)

        return self.batches.between(start, stop, cut)


def laid_out(recipe: PreconditionerRecipe, count: int) -> tuple[int, tuple[int, ...], int]:
    """Returns (draws, sizes of curvature batches, held-out sequences) of a row that has `count` sequences.

    Raises:
        UserError: fewer than two.
    """
    largest, held_out = recipe.curvature_sequences[-1], recipe.held_out_sequences
    if count < 2:
        raise UserError(
            f"preconditioner: {count} sequence in this batch, and it needs at least 2, one to build on and one to judge by: "
            "measure with a batch of more"
        )
    if (draws := min(recipe.draws, (count - held_out) // largest)) >= 1:
        return draws, recipe.curvature_sequences, held_out
    most = min(max(1, count * largest // (largest + held_out)), count - 1)
    sizes = tuple(size for size in recipe.curvature_sequences if size <= most) or (most,)
    return 1, sizes, min(held_out, count - sizes[-1])
