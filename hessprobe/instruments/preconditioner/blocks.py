"""Which layer a candidate serves worst, and what a step size for each layer would buy it.

With S_ij = d_i.(G_mu)_ij d_j and slope_i = g_i.d_i the best step size per block is alpha = -S^-1 slope: K numbers of
cross-layer information. With S's off-diagonal dropped, alpha_i = -slope_i / S_ii, each layer is tuned as if alone. Rates are
judged on sequences other than those they were found on, along the best common multiple, against the best single step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr

from hessprobe.reading.trend import standard_errors_of_largest

# Where rates were found: on the candidate's own curvature batch, or on the held-out sequences but for the fold that
# judges them. What of S they know.
FOUND = ("own batch", "other sequences")
KNOWN = ("together", "alone")


def block_losses(rows: xr.Dataset) -> xr.Dataset:
    """Returns `efficiency` of each block (step, candidate, block) and `lost`, the share of the blocks' optimum it leaves.

    lost_i = (1 - efficiency_i) optimum_i / sum optimum, with optimum_i = g_i.(G_ii + mu)^-1 g_i / 2: how much further the
    best step within block i alone would get. Exact on the row's largest curvature batch of draw 0.

    Args:
        rows: of `preconditioner_rows`, of a table with its attribute `block_damping`.
    """
    mu = damping_of(rows)
    rows = rows[["block_efficiency", "block_slope", "block_curvature", "block_norm2"]].load()
    efficiency, slope = rows["block_efficiency"], rows["block_slope"]
    own = xr.DataArray(
        np.einsum("...ii->...i", rows["block_curvature"].transpose(..., "block", "other_block").values),
        dims=("step", "candidate", "block"),
    )
    bend = own + mu * rows["block_norm2"]
    reached = slope**2 / (2 * bend.where(bend > 0))
    # Of the same optimum, the candidate that gets nearest it says it most exactly.
    nearest = efficiency.fillna(-1).argmax("candidate")
    optimum = (reached / efficiency.where(efficiency > 0)).isel(candidate=nearest)
    lost = (1 - efficiency) * optimum / optimum.sum("block")
    return xr.Dataset({"efficiency": efficiency, "lost": lost.transpose(*efficiency.dims)}).compute()


def block_steps(row: xr.Dataset) -> xr.Dataset:
    """Returns what a step size per block would buy each candidate at one row, and those step sizes, with errors.

    Variables: `gain` and `gain_stderr` (candidate, found, known), the held-out decrease over that of the best single step;
    `multiplier` and `multiplier_stderr` (candidate, block), the best step sizes on the held-out sequences in units of the
    best single one, errors by the jackknife over folds; `own_multiplier`, those of the curvature batch; `resolved`, where
    a multiplier differs from 1 by more than the farthest of so many would by noise.

    Args:
        row: one of `preconditioner_rows`, of a table with its attribute `block_damping`; draw 0, the largest batch.
    """
    row = row.load()
    names, blocks = row["candidate"].values, row["block"].values
    gains = np.full((2, names.size, len(FOUND), len(KNOWN)), np.nan)
    rates = np.full((3, names.size, blocks.size), np.nan)
    for i in range(names.size):
        steps = _BlockSteps.of(row.isel(candidate=i), damping_of(row))
        if steps.whole.sound:
            rates[:, i] = steps.multipliers()
            for j, find in enumerate((steps.from_own_batch, steps.from_other_sequences)):
                for k, known in enumerate(KNOWN):
                    gains[:, i, j, k] = find(known == "alone")
    pair, where = ("candidate", "found", "known"), ("candidate", "block")
    enough = standard_errors_of_largest(blocks.size)
    return xr.Dataset(
        {
            "gain": (pair, gains[0]),
            "gain_stderr": (pair, gains[1]),
            "multiplier": (where, rates[0]),
            "multiplier_stderr": (where, rates[1]),
            "own_multiplier": (where, rates[2]),
            "resolved": (where, np.abs(rates[0] - 1) > enough * rates[1]),
        },
        coords={"candidate": names, "block": blocks, "found": list(FOUND), "known": list(KNOWN)},
    )


def damping_of(rows: xr.Dataset) -> float:
    """Returns mu of a table's block-by-block quantities."""
    return float(rows.attrs.get("block_damping", rows["damping"].values[0]))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Model:
    """A quadratic model of the loss along K blocks' directions: slope (K,) and bend (K, K), damping in it."""

    slope: np.ndarray
    bend: np.ndarray

    @property
    def sound(self) -> bool:
        """Whether the candidate was judged, and its single step descends."""
        finite = np.isfinite(self.slope).all() and np.isfinite(self.bend).all()
        return bool(finite and self.slope.sum() < 0 and self.bend.sum() > 0)

    @cached_property
    def single(self) -> float:
        """The best single step size."""
        return -float(self.slope.sum() / self.bend.sum())

    def rates(self, alone: bool) -> np.ndarray:
        """Returns the best step size for each block; NaN for a block that does not move."""
        width = np.sqrt(np.maximum(np.diagonal(self.bend), 0.0))
        moving = np.flatnonzero(width > 0)
        found = np.full(width.size, np.nan)
        # In units of each block's own width: layers' curvatures lie orders of magnitude apart.
        slope = self.slope[moving] / width[moving]
        bend = self.bend[np.ix_(moving, moving)] / np.outer(width[moving], width[moving])
        best = slope if alone else np.linalg.lstsq(bend, slope, rcond=1e-12)[0]
        found[moving] = -best / width[moving]
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _BlockSteps:
    """One candidate at one row: its models on the curvature batch, on the held-out sequences, and with each fold left out.

    `parts`, `weights`: each fold's part of the held-out model, undamped, and its share of the tokens.
    """

    own: _Model
    whole: _Model
    left_out: list[_Model]
    parts: list[_Model]
    weights: np.ndarray
    damping: np.ndarray  # (K, K), mu |d_i|^2 on the diagonal

    @classmethod
    def of(cls, row: xr.Dataset, mu: float) -> _BlockSteps:
        damping = np.diag(mu * row["block_norm2"].values)
        pair = ("block", "other_block")
        slopes = row["block_slope_held_out"].transpose("fold", "block").values
        bends = row["block_curvature_held_out"].transpose("fold", *pair).values
        tokens = row["fold_tokens"].values
        slope, bend, total = slopes.sum(0), bends.sum(0), tokens.sum()
        left_out = []
        for k in range(tokens.size):
            others = total - tokens[k]
            again = total / others if others > 0 else np.nan
            left_out.append(
                _Model(slope=(slope - slopes[k]) * again, bend=(bend - bends[k]) * again + damping)
            )
        return cls(
            own=_Model(
                slope=row["block_slope"].values,
                bend=row["block_curvature"].transpose(*pair).values + damping,
            ),
            whole=_Model(slope=slope, bend=bend + damping),
            left_out=left_out,
            parts=[_Model(slope=s, bend=b) for s, b in zip(slopes, bends, strict=True)],
            weights=tokens / total if total > 0 else np.full(tokens.size, np.nan),
            damping=damping,
        )

    def multipliers(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the best rates over the best single step: held out, their errors, and on the curvature batch."""
        value = self.whole.rates(False) / self.whole.single
        error = np.full(value.size, np.nan)
        if len(self.left_out) > 1 and all(model.sound for model in self.left_out):
            error = _error(np.stack([model.rates(False) / model.single for model in self.left_out]))
        own = self.own.rates(False) / self.own.single if self.own.sound else np.full(value.size, np.nan)
        return value, error, own

    def from_own_batch(self, alone: bool) -> tuple[float, float]:
        """Returns the gain of the rates found on the curvature batch, and its error."""
        if not self.own.sound:
            return np.nan, np.nan
        rates = np.nan_to_num(self.own.rates(alone))
        models = [self.whole, *self.left_out]
        judged = [(float(model.slope @ rates), float(rates @ model.bend @ rates)) for model in models]
        return _gain(judged, models)

    def from_other_sequences(self, alone: bool) -> tuple[float, float]:
        """Returns the gain of rates found on the held-out sequences but for the fold that judges them, and its error."""
        if len(self.parts) < 2 or not all(model.sound for model in self.left_out):
            return np.nan, np.nan
        found = [np.nan_to_num(model.rates(alone)) for model in self.left_out]
        slopes = np.array([part.slope @ a for part, a in zip(self.parts, found, strict=True)])
        bends = np.array([a @ part.bend @ a for part, a in zip(self.parts, found, strict=True)])
        bends += self.weights * np.array([a @ self.damping @ a for a in found])
        judged = [(float(slopes.sum()), float(bends.sum()))]
        for k, weight in enumerate(self.weights):
            judged.append(
                ((slopes.sum() - slopes[k]) / (1 - weight), (bends.sum() - bends[k]) / (1 - weight))
            )
        return _gain(judged, [self.whole, *self.left_out])


def _gain(judged: list[tuple[float, float]], models: list[_Model]) -> tuple[float, float]:
    """Returns the decrease of a step over that of the best single one, and its jackknife error; 0 where it is uphill.

    Args:
        judged: the step's slope and bend by each model.
        models: of all held-out sequences, then with each fold left out.
    """
    gains = np.full(len(models), np.nan)
    for i, ((slope, bend), model) in enumerate(zip(judged, models, strict=True)):
        if model.sound and bend > 0:
            single = model.slope.sum() ** 2 / model.bend.sum()
            gains[i] = slope**2 / bend / single if slope < 0 else 0.0
    return float(gains[0]), float(_error(gains[1:])) if len(models) > 2 else np.nan


def _error(left_out: np.ndarray) -> np.ndarray:
    """Returns the jackknife's standard error (...) from values (f, ...) with each fold left out."""
    return np.sqrt(((left_out - left_out.mean(0)) ** 2).sum(0) * (len(left_out) - 1) / len(left_out))
