"""How far the Gauss-Newton matrix G is from the Hessian H = G + R, from the `gn_hessian` table: norms, traces, directions.

gn_gap = ||R||_F / ||G||_F; the residual's share of both squared norms is gn_gap^2 / (1 + gn_gap^2). Along a direction d,
d.Hd / d.Gd is 1 where R does not matter and negative where H curves down.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import xarray as xr

from hessprobe.instruments.gn_hessian.recipe import GNHessianRecipe
from hessprobe.instruments.gn_hessian.table import MATRICES, MODELS, gn_hessian_table
from hessprobe.reading.rows import sound_rows
from hessprobe.reading.statistics import student
from hessprobe.reading.trend import STANDARD_ERRORS, standard_errors_of_largest

GAUSS_NEWTON, HESSIAN, RESIDUAL = MATRICES
LABELS: dict[str, list[str]] = {"matrix": list(MATRICES), "model": list(MODELS)}


@cache
def declared_dims() -> dict[str, tuple[str, ...]]:
    """Returns {variable: its dimensions} of all that a table may hold; an older one may hold less."""
    block = "any"
    table = gn_hessian_table(GNHessianRecipe(density_blocks=(block,)), [block])
    return {variable.name: variable.dims for variable in table.variables}


def measured(table: xr.Dataset, name: str, *others: str) -> xr.Dataset:
    """Returns the named variables, in memory, on the rows in which the first was measured; no rows where there are none.

    NaN for variables, matrices and models that the table does not hold.
    """
    marks, dims = ("failure", "recorded"), declared_dims()
    rows = sound_rows(table[["step", *(each for each in (name, *others, *marks) if each in table)]], name)
    found = rows.drop_vars(marks, errors="ignore").load()
    for dim in dict.fromkeys(dim for each in (name, *others) for dim in dims[each][1:]):
        labels = LABELS.get(dim, [])
        if dim not in found.coords:
            found = found.assign_coords({dim: table[dim].values if dim in table.coords else labels})
        elif not set(labels) <= set(map(str, found[dim].values)):
            found = found.reindex({dim: labels})
    for each in others if name in found else (name, *others):
        if each not in found:
            found[each] = (dims[each], np.full([found.sizes[dim] for dim in dims[each]], np.nan))
    return found.assign_attrs(table.attrs)


def gn_gap(table: xr.Dataset) -> xr.Dataset:
    """Returns how far H is from G over training (step), each with its standard error.

    Variables `gn_gap`, `cosine` (jackknifed, as stored) and `residual_share`, gap^2 / (1 + gap^2), with the gap's error.
    """
    rows = measured(table, "gn_gap", "gn_gap_stderr", "cosine", "cosine_stderr")
    return rows.assign(_share("residual_share", rows["gn_gap"], rows["gn_gap_stderr"]))


def block_gap(table: xr.Dataset) -> xr.Dataset:
    """Returns the same of every diagonal block (step, block): `gn_gap`, `cosine`, `residual_share`, with errors."""
    rows = measured(
        table, "block_gn_gap", *(f"block_{name}" for name in ("gn_gap_stderr", "cosine", "cosine_stderr"))
    )
    rows = rows.rename({str(name): str(name).removeprefix("block_") for name in rows.data_vars})
    return rows.assign(_share("residual_share", rows["gn_gap"], rows["gn_gap_stderr"]))


def residual_by_block(table: xr.Dataset) -> xr.Dataset:
    """Returns where the residual lies: `share` (step, block) of sum_b ||R_bb||_F^2, with `share_stderr`.

    Each block had probes of its own, so errors are independent. Of what lies between blocks nothing is said.
    """
    rows = measured(table, "block_fro2", "block_fro2_stderr").sel(matrix=RESIDUAL, drop=True)
    value, variance = rows["block_fro2"], rows["block_fro2_stderr"] ** 2
    whole = value.sum("block", skipna=False)
    whole = whole.where(whole > 0)
    share = value / whole
    others = variance.sum("block", skipna=False) - variance
    return xr.Dataset(
        {"share": share, "share_stderr": np.sqrt((1 - share) ** 2 * variance + share**2 * others) / whole}
    )


def traces(table: xr.Dataset) -> xr.Dataset:
    """Returns `trace` and `trace_stderr` of G, H and R over training (step, matrix)."""
    return measured(table, "trace", "trace_stderr")


def curvature_ratio(table: xr.Dataset) -> xr.DataArray:
    """Returns d.Hd / d.Gd over training (step, direction), exact on the batch; NaN where d.Gd is not above zero."""
    rows = measured(table, "direction_curvature")["direction_curvature"]
    of_g, of_h = (rows.sel(matrix=name, drop=True) for name in (GAUSS_NEWTON, HESSIAN))
    return (of_h / of_g.where(of_g > 0)).rename("curvature_ratio")


def errors_to_claim(freedom: int, count: int = 1) -> float:
    """Returns how many standard errors the largest of `count` numbers must lie beyond, for an error from few probes.

    Two for many probes; more, by Student's t, for an error known from `freedom` + 1 of them: 2.4 for 8, 12.7 for 2.
    """
    few = max(student(freedom), STANDARD_ERRORS) if freedom >= 1 else np.inf
    return few * standard_errors_of_largest(count) / STANDARD_ERRORS


def _share(name: str, gap: xr.DataArray, stderr: xr.DataArray) -> dict[str, xr.DataArray]:
    bound = 1 + gap**2
    return {name: gap**2 / bound, f"{name}_stderr": 2 * gap / bound**2 * stderr}
