"""Held-out decreases of any grouping of blocks, in the M x M space of sketches, cross-fitted.

Every group is solved for on one half of the sequences (`sketched_solve`) and judged on the other. The curvature is
d1.(G_held + mu)d2 with d1, d2 from different rounds of the same sequences, so that the sketches' noise is not squared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import ThreadpoolController

from hessprobe.errors import UserError, unknown_name
from hessprobe.instruments.cross_layer.grouping.sketched_solve import SketchHalf, coefficients, least_damping
from hessprobe.instruments.cross_layer.grouping.sketches import Sketches

Group = tuple[int, ...]
STRUCTURES = ("layerwise", "full")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Way:
    """One direction of the cross-fit: two solves from one half of the sequences, judged on the other half."""

    built: np.ndarray  # (n,) sequences
    judged: np.ndarray  # (n',) sequences
    share: np.ndarray  # (n,) of the tokens in `built`
    judged_share: np.ndarray
    parts: tuple[SketchHalf, SketchHalf]
    judges: np.ndarray  # (n' R,) sketches in order of sequence
    weight: np.ndarray  # (n' R,) their weights in G_held


@dataclass(frozen=True, kw_only=True, eq=False)
class _Piece:
    """What a group adds to a direction; row 0 with every sequence, row 1 + i with the i-th of the half left out."""

    projections: np.ndarray  # (2, 1 + n, n' R) <w_S, d_S> on the judging sketches, of either solve
    slope: np.ndarray  # (1 + n,)
    norm2: np.ndarray  # (1 + n,) d1.d2
    freedom: float  # z / mu, the lower of the two solves

    def __add__(self, other: _Piece) -> _Piece:
        return _Piece(
            projections=self.projections + other.projections,
            slope=self.slope + other.slope,
            norm2=self.norm2 + other.norm2,
            freedom=min(self.freedom, other.freedom),
        )

    def whole(self) -> _Piece:
        """Returns the row with every sequence alone."""
        return _Piece(
            projections=self.projections[:, :1],
            slope=self.slope[:1],
            norm2=self.norm2[:1],
            freedom=self.freedom,
        )

    def __sub__(self, other: _Piece) -> _Piece:
        return _Piece(
            projections=self.projections - other.projections,
            slope=self.slope - other.slope,
            norm2=self.norm2 - other.norm2,
            freedom=self.freedom,
        )


class CrossFit:
    """Held-out decreases of any grouping at one damping; a group is solved once, whatever groupings it is part of.

    The systems are small and many: more BLAS threads than one wait for each other at every of them (measured 4 to 20
    times slower), so solves run on one, whatever the process is set to.

    Args:
        sketches: of one batch.
        damping: mu, above 0, of the exact solve that is meant.
        corrected: False takes z = mu: right only where the sketches are not a sample but all of G.
    """

    def __init__(self, sketches: Sketches, damping: float, *, corrected: bool = True) -> None:
        if not damping > 0:
            raise UserError(f"damping must be positive, got {damping}")
        self.sketches = sketches
        self.damping = float(damping)
        self.corrected = corrected
        halves = [np.arange(start, len(sketches.tokens), 2) for start in (0, 1)]
        self.ways = [self._way(*halves), self._way(*halves[::-1])]
        self._pieces: dict[Group, tuple[_Piece, _Piece]] = {}
        self._blas = ThreadpoolController()

    def decrease(self, groups: Sequence[Group]) -> np.ndarray:
        """Returns (g.d)^2 / (2 d.(G_held + mu)d) in nats (1 + b,), of all sequences, then with each left out.

        The mean over both ways; NaN where the curvature comes out below zero.
        """
        with self._one_thread():
            return self._decrease(self._direction(groups))

    def decreases_joined(
        self, groups: Sequence[Group], *, left_out: bool = True
    ) -> dict[tuple[Group, Group], np.ndarray]:
        """Returns `decrease` for every two of the groups joined, the others left as they are.

        Each is (1 + b,) or, without `left_out`, (1,).
        """
        with self._one_thread():
            together = self._direction(groups, left_out)
            found = {}
            for k, second in enumerate(groups):
                for first in groups[:k]:
                    three = (self.pieces(group, left_out) for group in (first, second, first + second))
                    one, other = (
                        whole - a - b + joined for whole, a, b, joined in zip(together, *three, strict=True)
                    )
                    found[first, second] = self._decrease((one, other), left_out)
            return found

    def _one_thread(self):
        return self._blas.limit(limits=1, user_api="blas")

    def _direction(self, groups: Sequence[Group], left_out: bool = True) -> tuple[_Piece, _Piece]:
        """Returns the sum of the groups' pieces, for either way."""
        members = [self.pieces(group, left_out) for group in groups]
        return _total([m[0] for m in members]), _total([m[1] for m in members])

    def _decrease(self, pieces: tuple[_Piece, _Piece], left_out: bool = True) -> np.ndarray:
        found = np.zeros(1 + len(self.sketches.tokens) if left_out else 1)
        for way, piece in zip(self.ways, pieces, strict=True):
            products = piece.projections[0] * piece.projections[1]  # (1 + n, n' R)
            curvature = products @ way.weight
            built = _best_step(piece.slope, curvature + self.damping * piece.norm2)
            found[0] += built[0] / 2
            if not left_out:
                continue
            by_sequence = (products[0] * way.weight).reshape(len(way.judged), -1).sum(1)
            fewer = (curvature[0] - by_sequence) / (1 - way.judged_share)
            judged = _best_step(piece.slope[0], fewer + self.damping * piece.norm2[0])
            found[1 + way.built] += built[1:] / 2
            found[1 + way.judged] += judged / 2
        return found

    def pieces(self, group: Group, left_out: bool = True) -> tuple[_Piece, _Piece]:
        """Returns what a group of blocks adds to the direction, for either way.

        Without `left_out`, with every sequence alone, which is cheaper.
        """
        group = tuple(sorted(group))
        first, second = self._pieces.get(group, (None, None))
        if first is None or second is None or (left_out and len(first.slope) == 1):
            s, chosen = self.sketches, list(group)
            kernel, alignment = s.kernel[chosen].sum(0, dtype=float), s.alignment[chosen].sum(0)
            norm2 = float(s.norm2[chosen].sum())
            with self._one_thread():
                first, second = (self._piece(way, kernel, alignment, norm2, left_out) for way in self.ways)
            self._pieces[group] = (first, second)
        return (first, second) if left_out else (first.whole(), second.whole())

    def freedom(self, group: Group) -> float:
        """Returns the share of the sketches' degrees of freedom that the group's solves leave, 1 - d_eff(mu) / m."""
        return min(piece.freedom for piece in self.pieces(group, left_out=False))

    def least_damping(self, group: Group, freedom: float) -> float:
        """Returns the smallest damping at which the group's solves leave that share of the sketches' freedom."""
        kernel = self.sketches.kernel[list(group)].sum(0)
        with self._one_thread():
            return max(least_damping(part, kernel, freedom) for way in self.ways for part in way.parts)

    def names(self, group: Group) -> tuple[str, ...]:
        """Returns the names of a group's blocks."""
        return tuple(self.sketches.blocks[i] for i in group)

    def name(self, group: Group) -> str:
        """Returns a group's own name, `block.0 + block.1`."""
        return " + ".join(self.names(group))

    def groups(self, grouping: str | Sequence[Sequence[str]]) -> list[Group]:
        """Returns a grouping as block indices: "layerwise", "full", or groups of names, each block in one of them.

        Raises:
            UserError: a block missing, named twice, or unknown.
        """
        blocks = self.sketches.blocks
        if isinstance(grouping, str):
            if grouping not in STRUCTURES:
                raise unknown_name("grouping", grouping, STRUCTURES)
            everything = tuple(range(len(blocks)))
            return [everything] if grouping == "full" else [(i,) for i in everything]
        named = [name for group in grouping for name in group]
        for name in named:
            if name not in blocks:
                raise unknown_name("block", name, blocks)
        missing = [b for b in blocks if b not in named]
        twice = sorted({n for n in named if named.count(n) > 1})
        if missing or twice:
            raise UserError(
                "a grouping holds each block once; "
                + " and ".join(
                    [f"missing: {', '.join(missing)}"] * bool(missing)
                    + [f"twice: {', '.join(twice)}"] * bool(twice)
                )
            )
        return [tuple(sorted(blocks.index(name) for name in group)) for group in grouping if len(group)]

    def _way(self, built: np.ndarray, judged: np.ndarray) -> _Way:
        s = self.sketches
        share, judged_share = _shares(s.tokens[built]), _shares(s.tokens[judged])
        judges = self._sketches_of(judged, np.unique(s.round))
        return _Way(
            built=built,
            judged=judged,
            share=share,
            judged_share=judged_share,
            parts=(self._part(built, share, 0), self._part(built, share, 1)),
            judges=judges,
            weight=np.repeat(judged_share / s.rounds, s.rounds),
        )

    def _part(self, built: np.ndarray, share: np.ndarray, which: int) -> SketchHalf:
        rounds = np.unique(self.sketches.round)[which::2]
        root = np.sqrt(np.repeat(share / len(rounds), len(rounds)))
        return SketchHalf(index=self._sketches_of(built, rounds), root=root, rounds=len(rounds))

    def _sketches_of(self, sequences: np.ndarray, rounds: np.ndarray) -> np.ndarray:
        s = self.sketches
        index = np.flatnonzero(np.isin(s.sequence, sequences) & np.isin(s.round, rounds))
        return index[np.lexsort((s.round[index], s.sequence[index]))]

    def _piece(
        self, way: _Way, kernel: np.ndarray, alignment: np.ndarray, norm2: float, left_out: bool
    ) -> _Piece:
        mu, (one, two) = self.damping, way.parts
        (y1, z1), (y2, z2) = (
            coefficients(
                part,
                kernel,
                alignment,
                damping=mu,
                corrected=self.corrected,
                left_out=way.share if left_out else way.share[:0],
            )
            for part in way.parts
        )
        onto = [y @ kernel[np.ix_(part.index, way.judges)] for y, part in ((y1, one), (y2, two))]
        slopes = [y @ alignment[part.index] for y, part in ((y1, one), (y2, two))]
        between = np.einsum("bm,bm->b", y1 @ kernel[np.ix_(one.index, two.index)], y2)
        return _Piece(
            projections=(np.stack(onto) - alignment[way.judges]) / mu,
            slope=((slopes[0] + slopes[1]) / 2 - norm2) / mu,
            norm2=(norm2 - slopes[0] - slopes[1] + between) / mu**2,
            freedom=min(z1, z2) / mu,
        )


def _best_step(slope: np.ndarray, curvature: np.ndarray) -> np.ndarray:
    return np.where(curvature > 0, slope**2 / (2 * np.where(curvature > 0, curvature, 1.0)), np.nan)


def _shares(tokens: np.ndarray) -> np.ndarray:
    return tokens / tokens.sum()


def _total(pieces: list[_Piece]) -> _Piece:
    total = pieces[0]
    for piece in pieces[1:]:
        total = total + piece
    return total
