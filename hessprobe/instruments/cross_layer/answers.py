"""What a `cross_layer` table answers, each question once: sentences, pictures, page and terminal read the same object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import xarray as xr

from hessprobe.instruments.cross_layer import coupling as pairs
from hessprobe.instruments.cross_layer.grouping.study import GroupingStudy, study_groupings
from hessprobe.reading.labelled import Labelled
from hessprobe.reading.rows import sound_rows
from hessprobe.reading.trend import standard_errors_of_largest

# Other variables (layer kernels) can be far larger than memory.
READ = ("step", "direction", "block", "other_block")
NO_ROWS = xr.Dataset(coords={"step": np.empty(0, dtype=np.int64)})


class CrossLayerAnswers:
    """The answers of one run's table.

    Args:
        table: as recorded.
        groupings: what `study_groupings` said of the table, where it was asked before or at a damping that other runs
            share; default at the table's own. It takes seconds.
    """

    def __init__(self, table: xr.Dataset, *, groupings: GroupingStudy | None = None) -> None:
        self._recorded, self._groupings = table, groupings

    @cached_property
    def table(self) -> xr.Dataset:
        """Everything but sketches and their kernels, in memory."""
        others = [dim for dim in self._recorded.dims if dim not in READ]
        return self._recorded.drop_dims(others).load()

    @cached_property
    def groupings(self) -> GroupingStudy:
        """Which layers a preconditioner should join, at one damping."""
        return study_groupings(self._recorded) if self._groupings is None else self._groupings

    @cached_property
    def measured(self) -> xr.Dataset:
        """The rows that carry a coupling, with all that `table` holds of them."""
        return sound_rows(self.table, "coupling")

    @cached_property
    def coupling(self) -> xr.Dataset:
        """As `coupling.coupling`."""
        return pairs.coupling(self.table)

    @cached_property
    def strongest_pairs(self) -> xr.Dataset | None:
        """Every pair of the last row (pair,), the most strongly coupled first; None without a row."""
        rows = self.coupling
        return (
            pairs.strongest_pairs(rows.isel(step=-1), rows.sizes["block"] ** 2)
            if rows.sizes["step"]
            else None
        )

    @cached_property
    def depths(self) -> np.ndarray:
        """As `coupling.depths`."""
        return pairs.depths(self.coupling["block"].values)

    @cached_property
    def by_distance(self) -> xr.Dataset:
        """As `coupling.coupling_by_distance`."""
        return pairs.coupling_by_distance(self.table)

    @cached_property
    def energy_rows(self) -> xr.Dataset:
        """The rows that carry an off-block energy, with all that `table` holds of them."""
        return sound_rows(self.table, "off_block_energy")

    @cached_property
    def off_block_energy(self) -> xr.Dataset:
        """As `coupling.off_block_energy`."""
        return pairs.off_block_energy(self.table)

    @cached_property
    def shares(self) -> xr.DataArray | None:
        """Where a step's curvature lies (step, direction, block, other_block); None where none was measured."""
        rows = sound_rows(self.table, "step_curvature")
        if rows.sizes["step"] == 0:
            return None
        shares = pairs.curvature_shares(rows["step_curvature"])
        return shares.transpose("step", "direction", "block", "other_block")

    @cached_property
    def cross_share(self) -> xr.DataArray | None:
        """The share of a step's curvature between layers (step, direction); None where none was measured."""
        return None if self.shares is None else pairs.between_layers(self.shares)

    @cached_property
    def update_share(self) -> tuple[xr.Dataset, np.ndarray]:
        """The rows with a cross share along the update, and the shares (step,)."""
        shares = self.cross_share
        if shares is None or "update" not in shares["direction"].values:
            return self.table.isel(step=slice(0, 0)), np.empty(0)
        along = shares.sel(direction="update")
        along = along.isel(step=np.flatnonzero(np.isfinite(along.values)))
        return self.table.sel(step=along["step"].values), along.values

    @cached_property
    def jacobi_radius(self) -> xr.Dataset:
        """As `coupling.jacobi_radius`."""
        return pairs.jacobi_radius(self.table)

    def at_damping(self, damping: float) -> CrossLayerAnswers:
        """Returns these answers with groupings at another damping; what can be said of none stays so."""
        if self.groupings.reason or self.groupings.damping == damping:
            return self
        study = study_groupings(self._recorded, damping)
        return CrossLayerAnswers(self._recorded, groupings=study)


def at_one_damping(runs: Sequence[Labelled[CrossLayerAnswers]]) -> list[Labelled[CrossLayerAnswers]]:
    """Returns several runs with groupings at one damping, the smallest that serves every run's sketches."""
    studies = [run.compared.groupings for run in runs]
    damping = max((study.damping for study in studies if not study.reason), default=np.nan)
    return [replace(run, compared=run.compared.at_damping(damping)) for run in runs]


def coupling_difference(first: CrossLayerAnswers, second: CrossLayerAnswers) -> xr.Dataset | None:
    """Returns the second run's coupling minus the first's at their last rows (block, other_block), with its error.

    NaN where a pair lies within its errors: as many as make noise among all pairs as rare as two do for one. None for
    runs of different blocks, or without rows.
    """
    if not (first.coupling.sizes["step"] and second.coupling.sizes["step"]):
        return None
    rows = [each.coupling.isel(step=-1, drop=True) for each in (first, second)]
    if list(rows[0]["block"].values) != list(rows[1]["block"].values):
        return None
    size = rows[1]["coupling"] - rows[0]["coupling"]
    stderr = np.hypot(rows[0]["coupling_stderr"], rows[1]["coupling_stderr"])
    layers = size.sizes["block"]
    enough = standard_errors_of_largest(layers * (layers - 1) // 2)
    return xr.Dataset({"difference": size.where(abs(size) > enough * stderr), "stderr": stderr})
