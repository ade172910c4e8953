"""Which layers a preconditioner should join: held-out decreases of block groupings, from the stored layer kernels.

The decrease is (g.d)^2 / (2 d.(G_held + mu)d), the best step along d = -(blkdiag_S(G) + mu)^-1 g, with G from one
half of the sequences and G_held from the other, both ways averaged (`sketch_space`). An answer holds for a curvature
batch of half the sequences: cross-layer information pays more with more of them. Errors: jackknife over sequences,
given g; 0.9 to 2.2 times the spread over synthetic batches (it counts noise of order k k times: Efron, Stein 1981).

Every answer says whether it is `resolved`, and the `reason` where it is not:
- damping: some solve leaves less than 0.25 of the sketches' freedom, 1 - d_eff(mu) / m. Against exact conjugate
  gradients (0.23 M decoder, 64 sequences, 4 groupings, mu = 1 ... .01, 2 to 16 rounds), 66 answers above that were
  all within 1.5 of their errors, their biases below 0.5; below it, where solves act like those of a larger damping,
  biases reached 26 errors. tests/benchmarks/grouping_validation.py repeats the comparison.
- error: the answer lies within two standard errors of "makes no difference".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from hessprobe.analysis.rows import sound_rows
from hessprobe.analysis.sketch_space import CrossFit, Group
from hessprobe.analysis.sketches import Sketches, sketches_of
from hessprobe.analysis.trend import STANDARD_ERRORS
from hessprobe.errors import UserError

LEAST_FREEDOM = 0.25


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Numbers with their standard errors, whether to trust each, and why not where not ("" where trusted)."""

    value: np.ndarray
    stderr: np.ndarray
    resolved: np.ndarray
    reason: np.ndarray


@dataclass(frozen=True, kw_only=True)
class GroupingCurve:
    """Greedy merging from layerwise to full: what was joined at each step, and the decrease relative to layerwise."""

    joined: tuple[tuple[str, str], ...]
    groups: tuple[tuple[tuple[str, ...], ...], ...]
    relative: Answer


def curvature_along(sketches: Sketches, alignment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns d_i.G_ij d_j (l, l) of a stored direction on the sketches' sequences, and its jackknife error.

    Unbiased, and held out where the direction comes from other data.

    Args:
        alignment: <w^m_i, d_i> (l, m).
    """
    share = sketches.tokens / sketches.tokens.sum()
    products = np.einsum("im,jm->mij", alignment, alignment)
    by_sequence = np.zeros((len(share), *products.shape[1:]))
    np.add.at(by_sequence, sketches.sequence, products / sketches.rounds)
    weighted = by_sequence * share[:, None, None]
    whole = weighted.sum(0)
    return whole, _jackknife((whole - weighted) / (1 - share)[:, None, None])


def relative_decrease(
    fit: CrossFit, grouping: str | Sequence[Sequence[str]], baseline: str | Sequence[Sequence[str]] = "full"
) -> Answer:
    """Returns the held-out decrease of a grouping over that of a baseline (scalars); 1 makes no difference.

    Args:
        grouping, baseline: "layerwise", "full", or groups of blocks' names, each block in one of them.

    Raises:
        UserError: a block missing, named twice, or unknown.
    """
    groups, base = fit.groups(grouping), fit.groups(baseline)
    ratio = fit.decrease(groups) / fit.decrease(base)
    return _answer(fit, ratio, neutral=1.0, groups=_weakest(fit, [*groups, *base]))


def merge_gains(fit: CrossFit) -> Answer:
    """Returns what joining each pair of blocks adds to the layerwise decrease, as a share of it (l, l); diagonal 0.

    Negative: the pair's cross-layer curvature, estimated from half the sequences, misleads on the other half.
    """
    layers = len(fit.sketches.blocks)
    alone = fit.groups("layerwise")
    base = fit.decrease(alone)
    gains = np.zeros((len(base), layers, layers))
    weakest = _objects([_weakest(fit, alone)] * layers**2).reshape(layers, layers)
    for (first, second), decrease in fit.decreases_joined(alone).items():
        i, j = first[0], second[0]
        gains[:, i, j] = gains[:, j, i] = decrease / base - 1
        weakest[i, j] = weakest[j, i] = _weakest(fit, [*alone, first + second])
    return _answer(fit, gains, neutral=0.0, groups=weakest)


def block_importance(fit: CrossFit) -> Answer:
    """Returns the share of the full decrease that is lost when a block's off-diagonal row of G is cut (l,).

    Negative: the cut helps on held-out sequences.
    """
    everything = fit.groups("full")
    base = fit.decrease(everything)
    losses, weakest = [], []
    for i in range(len(fit.sketches.blocks)):
        rest = tuple(j for j in everything[0] if j != i)
        cut = [(i,), rest] if rest else [(i,)]
        losses.append(1 - fit.decrease(cut) / base)
        weakest.append(_weakest(fit, [*cut, *everything]))
    return _answer(fit, np.stack(losses, axis=1), neutral=0.0, groups=_objects(weakest))


def greedy_grouping(fit: CrossFit) -> GroupingCurve:
    """Returns the curve from layerwise (one group a block) to full, joining the two groups that gain most each time.

    The choice and the curve use the same numbers, so the middle of the curve flatters by up to its error.
    """
    groups = fit.groups("layerwise")
    base = fit.decrease(groups)
    curve, joined, path = [base / base], [], [tuple(groups)]
    while len(groups) > 1:
        found = fit.decreases_joined(groups, left_out=False)
        pair = max(found, key=lambda each: np.nan_to_num(found[each][0], nan=-np.inf))
        groups = sorted([group for group in groups if group not in pair] + [tuple(sorted(pair[0] + pair[1]))])
        curve.append(fit.decrease(groups) / base)
        joined.append((_name(fit, pair[0]), _name(fit, pair[1])))
        path.append(tuple(groups))
    weakest = _objects([_weakest(fit, [*each, *path[0]]) for each in path])
    return GroupingCurve(
        joined=tuple(joined),
        groups=tuple(tuple(_names(fit, group) for group in each) for each in path),
        relative=_answer(fit, np.stack(curve, axis=1), neutral=1.0, groups=weakest),
    )


def grouping(table: xr.Dataset, *, damping: float) -> xr.Dataset:
    """Returns every grouping answer for each measured row of the `cross_layer` table, along its gradient.

    Variables, each with _stderr, _resolved and _reason: full_over_layerwise (step), merge_gain (step, block,
    other_block), importance (step, block), curve (step, groups: how many are left). About 1 s a row for 14 blocks and
    256 sketches.

    A row of fewer than 4 sequences or 2 rounds is unresolved throughout, with NaN for its numbers.

    Raises:
        UserError: the table was recorded without layer kernels, or a damping that is not positive.
    """
    if "kernel" not in table:
        raise UserError(
            "this cross_layer table holds no layer kernels; record with --set cross_layer.method=kernels"
        )
    if not damping > 0:
        raise UserError(f"damping must be positive, got {damping}")
    rows = sound_rows(table, "kernel")
    blocks = table["block"].values
    found = [_row(rows.isel(step=at), damping) for at in range(rows.sizes["step"])]
    joined = (
        xr.concat(found, dim="step") if found else xr.Dataset(coords={"step": np.empty(0, dtype=np.int64)})
    )
    coords = {"block": blocks, "other_block": blocks, "groups": np.arange(len(blocks), 0, -1)}
    return joined.assign_coords(coords | {"step": rows["step"].values}).assign_attrs(damping=damping)


def _row(row: xr.Dataset, damping: float) -> xr.Dataset:
    layers = row.sizes["block"]
    try:
        fit = CrossFit(sketches_of(row), damping)
    except UserError as error:
        answers = [_nothing(shape, str(error)) for shape in ((), (layers, layers), (layers,), (layers,))]
    else:
        curve = greedy_grouping(fit).relative
        answers = [
            relative_decrease(fit, "full", "layerwise"),
            merge_gains(fit),
            block_importance(fit),
            curve,
        ]
    names = ("full_over_layerwise", "merge_gain", "importance", "curve")
    dims = ((), ("block", "other_block"), ("block",), ("groups",))
    columns = [_variables(name, dim, answer) for name, dim, answer in zip(names, dims, answers, strict=True)]
    return xr.Dataset({name: column for each in columns for name, column in each})


def _nothing(shape: tuple[int, ...], reason: str) -> Answer:
    nan = np.full(shape, np.nan)
    return Answer(
        value=nan, stderr=nan, resolved=np.zeros(shape, bool), reason=np.full(shape, reason, object)
    )


def _variables(name: str, dims: tuple[str, ...], answer: Answer) -> list[tuple[str, tuple]]:
    return [
        (name, (dims, answer.value)),
        (f"{name}_stderr", (dims, answer.stderr)),
        (f"{name}_resolved", (dims, answer.resolved)),
        (f"{name}_reason", (dims, answer.reason)),
    ]


def _answer(fit: CrossFit, values: np.ndarray, *, neutral: float, groups: Group | np.ndarray) -> Answer:
    """Returns the answer for values (1 + b, ...): of all sequences, then with each left out.

    Args:
        neutral: the value that means "makes no difference".
        groups: the group that the sketches serve worst, for each value.
    """
    value, stderr = values[0], _jackknife(values[1:])
    if isinstance(groups, tuple):
        groups = _objects([groups]).reshape(())
    reason = np.full(value.shape, "", dtype=object)
    too_small: dict[Group, str] = {}
    for at in np.ndindex(value.shape):
        group = tuple(groups[at])
        if fit.freedom(group) < LEAST_FREEDOM:
            if group not in too_small:
                too_small[group] = _too_small(fit, group)
            reason[at] = too_small[group]
        else:
            reason[at] = _within_errors(float(value[at]), float(stderr[at]), neutral)
    return Answer(value=value, stderr=stderr, resolved=reason == "", reason=reason)


def _too_small(fit: CrossFit, group: Group) -> str:
    return (
        f"damping {fit.damping:g} is too small for {fit.sketches.rounds} rounds of {len(fit.sketches.tokens)} sequences: "
        f"the solve of {_name(fit, group)} leaves {fit.freedom(group):.0%} of the sketches' freedom, below "
        f"{LEAST_FREEDOM:.0%}; measure with more rounds, or judge at damping "
        f"{fit.least_damping(group, LEAST_FREEDOM):.2g} or above"
    )


def _within_errors(value: float, stderr: float, neutral: float) -> str:
    if not (np.isfinite(value) and np.isfinite(stderr)):
        return "the held-out curvature is not above zero within its errors; measure with more rounds or sequences"
    # A grouping against itself makes exactly no difference, without an error.
    if stderr > 0 and abs(value - neutral) <= STANDARD_ERRORS * stderr:
        return f"within {STANDARD_ERRORS:g} standard errors of no difference; measure with more sequences"
    return ""


def _weakest(fit: CrossFit, groups: Sequence[Group]) -> Group:
    return min(groups, key=fit.freedom)


def _objects(groups: Sequence[Group]) -> np.ndarray:
    """Returns groups as the entries of an array, which numpy would take apart."""
    held = np.empty(len(groups), dtype=object)
    held[:] = list(groups)
    return held


def _jackknife(left_out: np.ndarray) -> np.ndarray:
    count = len(left_out)
    return np.sqrt(((left_out - left_out.mean(0)) ** 2).sum(0) * (count - 1) / count)


def _names(fit: CrossFit, group: Group) -> tuple[str, ...]:
    return tuple(fit.sketches.blocks[i] for i in group)


def _name(fit: CrossFit, group: Group) -> str:
    return " + ".join(_names(fit, group))
