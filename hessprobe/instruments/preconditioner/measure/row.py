"""One row of the table `preconditioner` as it fills: a cell that nobody could measure stays NaN."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hessprobe.errors import UserError
from hessprobe.estimation.conditioning import Conditioning
from hessprobe.instruments.preconditioner.measure.candidates.candidate import Directions
from hessprobe.instruments.preconditioner.measure.site import Judged, Site, jackknife_stderr
from hessprobe.instruments.preconditioner.recipe import PreconditionerRecipe
from hessprobe.instruments.row_variables import MEASUREMENT_VARIABLES
from hessprobe.schema.table import Table


class PreconditionerRow:
    """The cells of a row by variable, without those that say how the measurement itself went.

    Args:
        sizes: of the curvature batches, at the places of the recipe's own; where there are fewer, the cells of the others
            stay NaN. Of fewer held-out sequences than folds, the last folds hold nothing.

    First `judge_by` the held-out site; then for every curvature batch `build_on` it, and `judge` or `fail` each candidate.
    """

    def __init__(
        self, table: Table, recipe: PreconditionerRecipe, sizes: Sequence[int] | None = None
    ) -> None:
        self.recipe = recipe
        self.sizes = list(recipe.curvature_sequences if sizes is None else sizes)
        self.names = list(table.coordinates["candidate"])
        self.folds = len(table.coordinates["fold"])
        measurement = {variable.name for variable in MEASUREMENT_VARIABLES}
        self.cells: dict[str, Any] = {
            variable.name: np.full(table.row_shape(variable), np.nan)
            for variable in table.variables
            if variable.dtype == "float64" and variable.name not in measurement
        }
        self.cells["candidate_failure"] = np.full(len(self.names), "", dtype=object)
        self.draw, self._size = 0, 0

    @property
    def is_the_batch(self) -> bool:
        """Whether the present site is draw 0's largest, on which blocks and spectra are told."""
        return self.draw == 0 and self._size == len(self.sizes) - 1

    def judge_by(self, held_out: Site) -> None:
        """Takes the held-out batch, and fills in its own figures and optimum."""
        self.held_out = held_out
        self._held_out_optimum = held_out.optimal_decrease()
        self.cells["optimal_decrease_held_out"][:] = self._held_out_optimum
        self.cells["optimal_residual_held_out"][:] = held_out.solve(held_out.full).residual.numpy()
        self.cells["fold_tokens"][:] = self._in_folds(held_out.fold_tokens)
        self.cells["held_out_sequences_read"] = float(held_out.sequences)
        self.cells["loss_held_out"] = float(held_out.loss)

    def build_on(self, site: Site, draw: int) -> None:
        """Takes the next curvature batch, and fills in its optimum."""
        self.site, self.draw = site, draw
        self._size = self.sizes.index(site.sequences)
        self.cells["curvature_sequences_read"][self._size] = site.sequences
        self._optimum = site.optimal_decrease()
        self.cells["optimal_decrease"][draw, self._size] = self._optimum
        self.cells["optimal_residual"][draw, self._size] = site.solve(site.full).residual.numpy()
        if self.is_the_batch:
            self._block_optimum = site.block_optimal_decrease()

    def judge(self, name: str, answer: Directions) -> None:
        """Fills in what a candidate's directions are worth, on the batch they were built on and on the held-out one."""
        candidate = self.names.index(name)
        for i, (mu, direction) in enumerate(zip(self.recipe.dampings, answer.directions, strict=True)):
            by_block = self.is_the_batch and i == 0
            own = self.site.judge(direction.vector, by_block=by_block)
            held_out = self.held_out.judge(direction.vector, by_block=by_block)
            if by_block:
                self._blocks(candidate, own, held_out)
            values = _quality(own.whole, held_out.whole, mu, self._optimum[i], self._held_out_optimum[i])
            values["efficiency_held_out_stderr"] = (
                jackknife_stderr(held_out, mu, self.held_out.fold_tokens) / self._held_out_optimum[i]
            )
            if answer.residual is not None and answer.iterations is not None:
                values["solver_residual"] = answer.residual[i]
                values["solver_iterations"] = answer.iterations[i]
            for variable in ("slope_held_out", "curvature_held_out"):
                values[variable] = self._in_folds(values[variable])
            for variable, value in values.items():
                self.cells[variable][self.draw, candidate, self._size, i] = value

    def _blocks(self, candidate: int, own: Judged, held_out: Judged) -> None:
        values = {
            "block_efficiency": own.decrease(self.recipe.dampings[0]) / self._block_optimum,
            "block_slope": own.slope.sum(0),
            "block_norm2": own.norm2,
            "block_curvature": own.curvature.sum(0),
            "block_slope_held_out": self._in_folds(held_out.slope.T),
            "block_curvature_held_out": self._in_folds(np.moveaxis(held_out.curvature, 0, -1)),
        }
        for variable, value in values.items():
            self.cells[variable][candidate] = value

    def _in_folds(self, value: np.ndarray) -> np.ndarray:
        """Returns figures by fold, the last dimension, with nothing in those that no sequence has reached."""
        missing = self.folds - value.shape[-1]
        return np.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, missing)])

    def condition(self, name: str, damping: int, found: Conditioning) -> None:
        """Fills in a linear candidate's spectrum at one damping."""
        values = {
            "ritz_max": found.largest,
            "ritz_max_residual": found.largest_residual,
            "ritz_min": found.smallest,
            "ritz_min_residual": found.smallest_residual,
            "condition": found.condition,
        }
        for variable, value in values.items():
            self.cells[variable][self.names.index(name), damping] = value

    def fail(self, name: str, error: Exception, what: str = "") -> None:
        """Says why a candidate has no figures here; the first reason of a row is kept."""
        where = self.names.index(name)
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        place = [f"draw {self.draw}, {self.sizes[self._size]} sequences", what]
        if not self.cells["candidate_failure"][where]:
            self.cells["candidate_failure"][where] = ", ".join(filter(None, place)) + f": {reason}"


def _quality(
    own: Judged, held_out: Judged, mu: float, optimum: float, optimum_held_out: float
) -> dict[str, Any]:
    """Returns a direction's figures at one damping; both judgements have one group."""
    slope, damped = float(own.slope.sum()), float(own.damped(mu)[0])
    return {
        "efficiency": own.decrease(mu)[0] / optimum,
        "efficiency_held_out": held_out.decrease(mu)[0] / optimum_held_out,
        "best_alpha": -slope / damped,
        # (G + mu) times the full direction is -g: no further product is needed.
        "cosine": -slope / np.sqrt(2 * damped * optimum),
        "slope": slope,
        "curvature": own.curvature.sum(),
        "norm2": own.norm2.sum(),
        "slope_held_out": held_out.slope[:, 0],
        "curvature_held_out": held_out.curvature[:, 0, 0],
    }
