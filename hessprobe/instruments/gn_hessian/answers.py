"""What a table `gn_hessian` answers, each question asked once: sentences, page, paper and terminal share the numbers."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import xarray as xr

from hessprobe.instruments.gn_hessian import ladder, norms, spectrum
from hessprobe.instruments.gn_hessian.norms import GAUSS_NEWTON, HESSIAN, measured
from hessprobe.instruments.gn_hessian.table import LADDER_DIRECTIONS
from hessprobe.pictures.room import evenly_spaced
from hessprobe.reading.rows import sound_rows
from hessprobe.reading.wording import basis

# Any of these makes a row worth a page.
ASKED = ("gn_gap", "ritz_value", "direction_curvature", "change", "block_gn_gap", "trace")
DENSITIES_OVER_TRAINING = 5
DENSITY_BLOCKS = 8


class GNHessianAnswers:
    """Gauss-Newton against Hessian over a run.

    Args:
        table: as recorded; rows may have failed, and variables may be missing.
    """

    def __init__(self, table: xr.Dataset) -> None:
        self.table = table

    @cached_property
    def steps(self) -> list[int]:
        """The steps of which anything was measured."""
        return sorted(
            {int(step) for name in ASKED for step in sound_rows(self.table, name)["step"].values.tolist()}
        )

    def basis(self, step: int) -> str:
        """Returns what the numbers of a step rest on, random probes apart."""
        return basis(self.table.sel(step=step), exact=True)

    @property
    def samples(self) -> int:
        """Probes behind each norm and trace of the whole matrices."""
        return int(self.table.attrs.get("samples", 2))

    @cached_property
    def gap(self) -> xr.Dataset:
        """As `gn_gap`."""
        return norms.gn_gap(self.table)

    @cached_property
    def block_gap(self) -> xr.Dataset:
        """As `block_gap`."""
        return norms.block_gap(self.table)

    @cached_property
    def residual_by_block(self) -> xr.Dataset:
        """As `residual_by_block`."""
        return norms.residual_by_block(self.table)

    @cached_property
    def traces(self) -> xr.Dataset:
        """As `traces`."""
        return norms.traces(self.table)

    @cached_property
    def directions(self) -> xr.Dataset:
        """Length and curvature of every direction over training, with `ratio`, d.Hd / d.Gd."""
        rows = measured(self.table, "direction_curvature", "direction_norm")
        return rows.assign(ratio=norms.curvature_ratio(self.table))

    @cached_property
    def update_ratio(self) -> xr.DataArray:
        """d.Hd / d.Gd along the update on the rows that hold it."""
        along = self.directions["ratio"].reindex(direction=["update"]).isel(direction=0)
        return along.isel(step=np.flatnonzero(np.isfinite(along.values)))

    @cached_property
    def solve(self) -> xr.Dataset:
        """How well the Gauss-Newton step was solved for, over training."""
        return measured(self.table, "gauss_newton_step_residual", "gauss_newton_step_iterations")

    @property
    def step_damping(self) -> float:
        """The damping of the Gauss-Newton step; NaN where the table does not say."""
        return float(self.table.attrs.get("step_damping") or np.nan)

    @cached_property
    def extremes(self) -> xr.Dataset:
        """As `extremes`."""
        return spectrum.extremes(self.table)

    @cached_property
    def negative(self) -> xr.Dataset:
        """As `negative_curvature`, of H alone; no rows where no spectrum was measured."""
        rows = spectrum.negative_curvature(self.table)
        return rows.sel(matrix=HESSIAN) if rows.sizes["step"] else rows

    @cached_property
    def density(self) -> tuple[int, xr.Dataset] | None:
        """The last row's step and densities, as `smoothed_density`."""
        nodes = sound_rows(self.table, "ritz_value")
        found = spectrum.smoothed_density(nodes.isel(step=-1)) if nodes.sizes["step"] else None
        return None if found is None else (int(nodes["step"][-1]), found)

    @cached_property
    def densities(self) -> dict[int, xr.Dataset]:
        """The densities of some rows, evenly spaced over training, by step; the last among them."""
        nodes = sound_rows(self.table, "ritz_value")
        if nodes.sizes["step"] == 0:
            return {}
        kept = evenly_spaced(nodes.sizes["step"], DENSITIES_OVER_TRAINING)[:-1]
        found = {int(nodes["step"][i]): spectrum.smoothed_density(nodes.isel(step=int(i))) for i in kept}
        known = {step: density for step, density in found.items() if density is not None}
        return known | dict([self.density] if self.density else [])

    @cached_property
    def block_densities(self) -> dict[str, xr.Dataset | None]:
        """The last row's densities of the diagonal blocks that were asked for, of very many the first."""
        nodes = sound_rows(self.table, "block_ritz_value")
        if nodes.sizes["step"] == 0:
            return {}
        names = [str(name) for name in nodes["density_block"].values[:DENSITY_BLOCKS]]
        return {name: spectrum.smoothed_density(nodes.isel(step=-1), name) for name in names}

    @cached_property
    def ladder(self) -> xr.Dataset:
        """As `ladder`."""
        return ladder.ladder(self.table)

    @cached_property
    def along(self) -> dict[str, xr.Dataset]:
        """The ladder along each direction that it has, on the rows that hold it."""
        rows, found = self.ladder, {}
        for name in LADDER_DIRECTIONS if rows.sizes["step"] else ():
            if name in rows["ladder_direction"].values:
                one = rows.sel(ladder_direction=name)
                known = np.flatnonzero(np.isfinite(one["change"].values).any((1, 2)))
                found |= {name: one.isel(step=known)} if known.size else {}
        return found

    @cached_property
    def at_full_length(self) -> dict[str, xr.Dataset]:
        """The same at the direction's own length."""
        return {name: rows.sel(alpha=ladder.full_length(rows)) for name, rows in self.along.items()}

    @cached_property
    def errors_over_training(self) -> dict[str, xr.Dataset]:
        """The model's two errors along each direction at its own length, in units of the change that G promises."""
        found = {}
        for name, rows in self.at_full_length.items():
            promised = abs(rows["change"].sel(model=GAUSS_NEWTON, drop=True))
            names = [f"{each}{tail}" for each in ladder.ERRORS for tail in ("", "_stderr")]
            found[name] = rows[names] / promised.where(promised > 0)
        return found

    @property
    def symmetry_gap(self) -> float | None:
        """The largest gap |u.Av - v.Au| of the products; None where none was measured."""
        rows = sound_rows(self.table, "symmetry_gap")
        values = rows["symmetry_gap"].values if "symmetry_gap" in rows else np.empty(0)
        return float(np.nanmax(values)) if values.size else None
