"""What a recorded table `preconditioner` answers: each question once, for sentences, page, paper and terminal alike."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import xarray as xr

from hessprobe.errors import UserError
from hessprobe.instruments.preconditioner.blocks import block_losses, block_steps, damping_of
from hessprobe.instruments.preconditioner.decrease_ratios import closest, cross_layer_pays, decrease_ratios
from hessprobe.instruments.preconditioner.efficiency import (
    candidate_failures,
    efficiency,
    practical,
    preconditioner_rows,
    scoreboard,
)
from hessprobe.instruments.preconditioner.table import UPDATE


class PreconditionerAnswers:
    """The answers of one table; where no row holds a number, `empty`, and there are no others.

    Args:
        table: as recorded.
    """

    def __init__(self, table: xr.Dataset) -> None:
        self.table = table

    @cached_property
    def _sound(self) -> xr.Dataset | None:
        return preconditioner_rows(self.table)

    @property
    def empty(self) -> bool:
        """Whether no row holds a number."""
        return self._sound is None

    @property
    def rows(self) -> xr.Dataset:
        """The rows with held-out figures, as `preconditioner_rows`.

        Raises:
            UserError: there is none.
        """
        if self._sound is None:
            raise UserError("no row of the table 'preconditioner' holds a number")
        return self._sound

    @property
    def names(self) -> list[str]:
        """The candidates, in the table's order."""
        return [str(name) for name in self.rows["candidate"].values]

    @property
    def size(self) -> int:
        """The largest curvature batch, in sequences: single numbers are of it."""
        return int(self.rows["curvature_sequences"].values[-1])

    @property
    def damping(self) -> float:
        """The first damping: single numbers are at it."""
        return float(self.rows["damping"].values[0])

    @property
    def block_damping(self) -> float:
        """The damping of what is told block by block."""
        return damping_of(self.rows)

    @property
    def held_out(self) -> int:
        """Held-out sequences."""
        return int(self.rows.attrs.get("held_out_sequences", self.rows.sizes["fold"]))

    @property
    def last_step(self) -> int:
        """The last measured step."""
        return int(self.rows["step"].values[-1])

    @cached_property
    def pays(self) -> xr.Dataset:
        """Layerwise over full Gauss-Newton by damping, as `cross_layer_pays`."""
        return cross_layer_pays(self.rows)

    @cached_property
    def over_layerwise(self) -> xr.Dataset:
        """Each candidate's decrease over the layerwise oracle's, as `decrease_ratios`."""
        return decrease_ratios(self.rows)

    @cached_property
    def efficiency(self) -> xr.Dataset:
        """Own and held-out efficiency over training, as `efficiency`."""
        return efficiency(self.rows)

    @cached_property
    def board(self) -> xr.Dataset:
        """The scoreboard of the last row, best on held-out sequences first, those not judged last."""
        board = scoreboard(self.rows)
        return board.isel(candidate=np.argsort(-board["held_out"].values, kind="stable"))

    @property
    def ranked(self) -> list[str]:
        """The candidates in the scoreboard's order, best first."""
        return [str(name) for name in self.board["candidate"].values]

    @cached_property
    def losses(self) -> xr.Dataset:
        """What each candidate leaves in each block at the last row, as `block_losses`."""
        return block_losses(self.rows.isel(step=[-1])).isel(step=0)

    @cached_property
    def steps(self) -> xr.Dataset:
        """What a step size for each block would buy at the last row, as `block_steps`."""
        return block_steps(self.rows.isel(step=-1))

    @cached_property
    def nearest(self) -> tuple[str, int, int] | None:
        """The practical method that gets farthest, how many more cannot be told from it, and how many were measured."""
        return closest(self.rows, practical(self.rows["candidate"].values))

    @cached_property
    def subject(self) -> str | None:
        """The candidate that block-by-block sentences speak of: the run's update, else the best practical one."""
        if UPDATE in self.names:
            if np.isfinite(self.rows["block_slope"].isel(step=-1).sel(candidate=UPDATE).values).all():
                return UPDATE
        return None if self.nearest is None else self.nearest[0]

    @cached_property
    def failures(self) -> dict[str, tuple[str, list[int]]]:
        """{candidate: (the first reason why it could not be judged, the steps)}."""
        found: dict[str, tuple[str, list[int]]] = {}
        if "candidate_failure" not in self.rows:
            return found
        reasons = self.rows[["candidate_failure"]].load()
        failing = np.flatnonzero((reasons["candidate_failure"] != "").any("candidate").values)
        for i, step in zip(failing, reasons["step"].values[failing].tolist(), strict=True):
            for name, reason in candidate_failures(reasons.isel(step=i)).items():
                found.setdefault(name, (reason, []))[1].append(step)
        return found

    @cached_property
    def residual(self) -> float | None:
        """The largest relative residual of any solve behind these numbers; None where none is known."""
        names = ("solver_residual", "optimal_residual", "optimal_residual_held_out")
        values = np.concatenate([np.ravel(self.rows[name].values) for name in names])
        values = values[np.isfinite(values)]
        return float(values.max()) if values.size else None

    @property
    def tolerance(self) -> float:
        """The relative residual that solves were to reach; NaN where the table does not say."""
        return float(self.rows.attrs.get("cg_tolerance", np.nan))

    def largest_residual(self, damping: float, *solved: str, step: int | None = None) -> float:
        """Returns the largest relative residual of candidates' solves at one damping, and of the optimum's; NaN for none.

        Args:
            solved: names of candidates.
            step: of one row alone; default of all.
        """
        rows = self.rows if step is None else self.rows.sel(step=[step])
        names = [name for name in solved if name in self.names]
        own = np.ravel(rows["solver_residual"].sel(candidate=names, damping=damping).values)
        values = np.r_[own, np.ravel(rows["optimal_residual_held_out"].sel(damping=damping).values)]
        return float(np.nanmax(values)) if np.isfinite(values).any() else np.nan
