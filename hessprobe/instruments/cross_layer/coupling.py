"""How strongly layers couple through the Gauss-Newton matrix G, from the `cross_layer` table.

coupling_ij = |G_ij|_F^2 / sqrt(|G_ii|_F^2 |G_jj|_F^2), in [0, 1] up to noise: linear CKA of the layers'
tangent kernels (Kornblith et al. 2019). Off-block energy is 1 - sum_i |G_ii|_F^2 / |G|_F^2. Along a
direction d the share of d.Gd that lies between layers is 1 - sum_i d_i.G_ii d_i / d.Gd, signed.
"""

from __future__ import annotations

import re

import numpy as np
import xarray as xr

from hessprobe.reading.rows import sound_rows

_NUMBERED = re.compile(r"(?:^|\.)block\.(\d+)(?:\.|$)")


def coupling(table: xr.Dataset) -> xr.Dataset:
    """Returns `coupling` and `coupling_stderr` (step, block, other_block) of the rows that carry numbers."""
    return _with_error(table, "coupling", ("step", "block", "other_block"))


def off_block_energy(table: xr.Dataset) -> xr.Dataset:
    """Returns `off_block_energy` and its standard error (step): the share of |G|_F^2 between layers."""
    return _with_error(table, "off_block_energy", ("step",))


def curvature_shares(step_curvature: xr.DataArray) -> xr.DataArray:
    """Returns d_i.G_ij d_j / d.Gd (..., block, other_block): where a step's curvature lies; cells sum to 1.

    NaN where d.Gd is not above zero (no step was taken, or the row carries no number).
    """
    whole = step_curvature.sum(["block", "other_block"], skipna=False)
    return step_curvature / whole.where(whole > 0)


def cross_share(step_curvature: xr.DataArray) -> xr.DataArray:
    """Returns the share of d.Gd that lies between layers, off-diagonal sum / whole sum (...,), signed.

    0.2: a block-diagonal model sees 80 % of this step's curvature. Negative: layers' terms cancel, and a
    block-diagonal model sees more curvature than there is. Exact on the batch: it carries no sampling error.
    """
    return between_layers(curvature_shares(step_curvature))


def between_layers(shares: xr.DataArray) -> xr.DataArray:
    """Returns the part of `curvature_shares` that lies between layers (...,): 1 less the diagonal's sum."""
    diagonal = np.trace(shares.transpose(..., "block", "other_block").values, axis1=-2, axis2=-1)
    kept = shares.isel(block=0, other_block=0, drop=True)
    result = kept.copy(data=1 - diagonal)
    result.attrs = {"long_name": "share of d.Gd between layers", "units": "1"}
    return result.rename("cross_share")


def jacobi_radius(table: xr.Dataset) -> xr.Dataset:
    """Returns how far a layerwise step overshoots (step): `low` and `high`, its two estimates in order, and `damping`.

    lambda_max((D + mu)^-1 (G + mu)): `high` from the sketches themselves, `low` along a direction found on half of the
    sequences and judged on the other; noise may swap them. The largest stable layerwise step is below 2 over it.
    """
    rows = sound_rows(table, "jacobi_radius")
    own = rows["jacobi_radius"].values if "jacobi_radius" in rows else np.empty(0)
    held_out = rows["jacobi_radius_held_out"].values if "jacobi_radius_held_out" in rows else own
    return xr.Dataset(
        {
            "low": ("step", np.fmin(own, held_out)),
            "high": ("step", np.fmax(own, held_out)),
            "damping": ("step", np.full(own.size, float(table.attrs.get("jacobi_damping", np.nan)))),
        },
        coords={"step": rows["step"].values},
    )


def depths(blocks: np.ndarray) -> np.ndarray:
    """Returns each block's depth (l,): N for `block.N`, one before the first for the embedding, one after for the head.

    NaN for a block with no single place (a tied `embedding+head`, names of the user's own).
    """
    names = [str(name) for name in blocks]
    numbered = [_NUMBERED.search(name) for name in names]
    found = [int(match[1]) for match in numbered if match]
    ends = {"embedding": min(found, default=0) - 1, "head": max(found, default=0) + 1} if found else {}
    return np.array(
        [
            float(match[1]) if match else float(ends.get(name.split(".")[0], np.nan))
            for match, name in zip(numbered, names, strict=True)
        ]
    )


def coupling_by_distance(table: xr.Dataset) -> xr.Dataset:
    """Returns the mean coupling of the pairs of blocks at each layer distance (step, distance), with error.

    Variables `coupling`, `coupling_stderr`, `pairs` (distance). Pairs share their probes, so their errors are
    not independent: the error is the mean of the pairs' errors, which bounds it whatever the correlation
    (triangle inequality). Pairs with a block of no known depth are left out; no pair left gives length 0.
    """
    rows = coupling(table)
    where = depths(rows["block"].values)
    first, second = np.triu_indices(len(where), k=1)
    distance = np.abs(where[first] - where[second])
    known = np.unique(distance[np.isfinite(distance)])
    values = {name: rows[name].values[:, first, second] for name in rows.data_vars}
    means = {
        name: np.stack([_mean(value[:, distance == d]) for d in known], axis=1)
        if known.size
        else np.empty((value.shape[0], 0))
        for name, value in values.items()
    }
    return xr.Dataset(
        {str(name): (("step", "distance"), mean) for name, mean in means.items()}
        | {"pairs": ("distance", [int((distance == d).sum()) for d in known])},
        coords={"step": rows["step"].values, "distance": known.astype(int)},
    )


def strongest_pairs(row: xr.Dataset, count: int = 8) -> xr.Dataset:
    """Returns the `count` most strongly coupled pairs of one row of `coupling`, strongest first (pair,).

    The first of many noisy pairs is biased upwards; read the order together with the errors.
    """
    first, second = np.triu_indices(row.sizes["block"], k=1)
    values, errors = row["coupling"].values[first, second], row["coupling_stderr"].values[first, second]
    order = np.argsort(-values, kind="stable")  # NaN last
    order = order[np.isfinite(values[order])][:count]
    names = row["block"].values
    return xr.Dataset(
        {"coupling": ("pair", values[order]), "coupling_stderr": ("pair", errors[order])},
        coords={"block": ("pair", names[first[order]]), "other_block": ("pair", names[second[order]])},
    )


def _mean(values: np.ndarray) -> np.ndarray:
    """Returns the mean over the last axis of the finite values, NaN where there is none."""
    count = np.isfinite(values).sum(axis=-1)
    return np.where(count > 0, np.nansum(values, axis=-1) / np.maximum(count, 1), np.nan)


def _with_error(table: xr.Dataset, name: str, dims: tuple[str, ...]) -> xr.Dataset:
    """Returns a quantity and its standard error on the rows that carry it; no rows if it is not there."""
    rows, names = sound_rows(table, name), [name, f"{name}_stderr"]
    for absent in [each for each in names if each not in rows]:
        rows = rows.assign({absent: (dims, np.full([rows.sizes.get(dim, 0) for dim in dims], np.nan))})
    return rows[names].compute()
