"""Gauss-Newton's own directions: -(G + mu)^-1 g of its diagonal, of its blocks, of groups of blocks, and of all of it.

The diagonal is of labels sampled apart for up to 16 pieces of the batch, twice: every entry's relative error is about
1.4 / sqrt(2 pieces), 0.25 where there are as many. It costs 2 gradients of the batch; the others are solves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from hessprobe.errors import UserError
from hessprobe.instruments.preconditioner.measure.candidates.candidate import Candidate, Directions, Occasion
from hessprobe.instruments.preconditioner.measure.site import Groups
from hessprobe.optimization.conjugate_gradient import NOT_FINITE
from hessprobe.optimization.inner_problem import groups_of
from hessprobe.optimization.place import Direction
from hessprobe.problem.partition import Partition


def _diagonal(asked: Occasion) -> Directions:
    place = asked.place
    diagonal = place.diagonal(asked.generator)
    return Directions(
        directions=[
            Direction(
                vector=-place.gradient / (diagonal + damping),
                inverse=lambda rows, damping=damping: rows / (diagonal + damping),
                gradients=0.0 if i else place.diagonal_cost,
            )
            for i, damping in enumerate(asked.dampings)
        ]
    )


def solve(groups: Callable[[Partition], Groups]) -> Candidate:
    """Returns the candidate that solves for groups of blocks apart."""

    def answer(asked: Occasion) -> Directions:
        solved = asked.solve(groups(asked.place.partition))
        if NOT_FINITE in solved.outcome:
            raise FloatingPointError("the Gauss-Newton system is not finite")
        return Directions(
            directions=[Direction(vector=x) for x in solved.x],
            residual=solved.residual.tolist(),
            iterations=solved.iterations,
        )

    return Candidate(answer=answer, damped=True, groups=groups)


def of_contiguous_groups(count: int) -> Candidate:
    """Returns the solve for so many groups of neighbouring blocks, as equal as they can be."""

    def groups(partition: Partition) -> Groups:
        blocks = partition.blocks
        if count > len(blocks):
            raise UserError(
                f"preconditioner.groups: {count} groups of {len(blocks)} blocks: give at most as many"
            )
        of = [i * count // len(blocks) for i in range(len(blocks))]
        return tuple(
            tuple(b for b, group in zip(blocks, of, strict=True) if group == i) for i in range(count)
        )

    return solve(groups)


def of_groups(given: Sequence[Sequence[str]]) -> Candidate:
    """Returns the solve for groups of blocks by name, which must be all blocks, each once."""
    return solve(partial(groups_of, tuple(map(tuple, given))))


diagonal_gn = Candidate(answer=_diagonal, most_gradients=2.0, damped=True, linear=True)
layerwise_gn = solve(partial(groups_of, "layerwise"))
full_gn = solve(partial(groups_of, "full"))
