"""Which layers a preconditioner should join: held-out decreases of block groupings, from the stored layer kernels.

The decrease is (g.d)^2 / (2 d.(G_held + mu)d), the best step along d = -(blkdiag_S(G) + mu)^-1 g, with G from one
half of the sequences and G_held from the other, both ways averaged (`sketch_space`). An answer holds for a curvature
batch of half the sequences: cross-layer information pays more with more of them. Errors: jackknife over sequences,
given g; 0.9 to 2.2 times the spread over synthetic batches (it counts noise of order k k times: Efron, Stein 1981).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hessprobe.instruments.cross_layer.grouping.answer import Answer, answer, jackknife, objects, weakest
from hessprobe.instruments.cross_layer.grouping.sketch_space import CrossFit
from hessprobe.instruments.cross_layer.grouping.sketches import Sketches


@dataclass(frozen=True, kw_only=True)
class GroupingCurve:
    """Greedy merging from layerwise to full.

    Attributes:
        joined: the two groups that each step joined, as names (l - 1).
        groups: the grouping before the first step and after each (l), as names.
        relative: its decrease over that of layerwise (l,).
        captured: its decrease over that of full (l,).
    """

    joined: tuple[tuple[str, str], ...]
    groups: tuple[tuple[tuple[str, ...], ...], ...]
    relative: Answer
    captured: Answer


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
    return whole, jackknife((whole - weighted) / (1 - share)[:, None, None])


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
    return answer(fit, ratio, neutral=1.0, groups=weakest(fit, [*groups, *base]))


def merge_gains(fit: CrossFit) -> Answer:
    """Returns what joining each pair of blocks adds to the layerwise decrease, as a share of it (l, l); diagonal 0.

    Negative: the pair's cross-layer curvature, estimated from half the sequences, misleads on the other half.
    """
    layers = len(fit.sketches.blocks)
    alone = fit.groups("layerwise")
    base = fit.decrease(alone)
    gains = np.zeros((len(base), layers, layers))
    served = objects([weakest(fit, alone)] * layers**2).reshape(layers, layers)
    for (first, second), decrease in fit.decreases_joined(alone).items():
        i, j = first[0], second[0]
        gains[:, i, j] = gains[:, j, i] = decrease / base - 1
        served[i, j] = served[j, i] = weakest(fit, [*alone, first + second])
    return answer(fit, gains, neutral=0.0, groups=served)


def block_importance(fit: CrossFit) -> Answer:
    """Returns the share of the full decrease that is lost when a block's off-diagonal row of G is cut (l,).

    Negative: the cut helps on held-out sequences.
    """
    everything = fit.groups("full")
    base = fit.decrease(everything)
    losses, served = [], []
    for i in range(len(fit.sketches.blocks)):
        rest = tuple(j for j in everything[0] if j != i)
        cut = [(i,), rest] if rest else [(i,)]
        losses.append(1 - fit.decrease(cut) / base)
        served.append(weakest(fit, [*cut, *everything]))
    return answer(fit, np.stack(losses, axis=1), neutral=0.0, groups=objects(served))


def greedy_grouping(fit: CrossFit) -> GroupingCurve:
    """Returns the curve from layerwise (one group a block) to full, joining the two groups that gain most each time.

    The choice and the curve use the same numbers, so the middle of the curve flatters by up to its error.
    """
    groups = fit.groups("layerwise")
    decreases, joined, path = [fit.decrease(groups)], [], [tuple(groups)]
    while len(groups) > 1:
        found = fit.decreases_joined(groups, left_out=False)
        pair = max(found, key=lambda each: np.nan_to_num(found[each][0], nan=-np.inf))
        groups = sorted([group for group in groups if group not in pair] + [tuple(sorted(pair[0] + pair[1]))])
        decreases.append(fit.decrease(groups))
        joined.append((fit.name(pair[0]), fit.name(pair[1])))
        path.append(tuple(groups))
    curve = np.stack(decreases, axis=1)
    above, below = (objects([weakest(fit, [*each, *end]) for each in path]) for end in (path[0], path[-1]))
    return GroupingCurve(
        joined=tuple(joined),
        groups=tuple(tuple(fit.names(group) for group in each) for each in path),
        relative=answer(fit, curve / curve[:, :1], neutral=1.0, groups=above),
        captured=answer(fit, curve / curve[:, -1:], neutral=1.0, groups=below),
    )
