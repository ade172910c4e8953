"""What a candidate preconditioner is: what it is asked, what it answers, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from torch import Tensor

from hessprobe.errors import UserError, unknown_name
from hessprobe.instruments.preconditioner.candidates import known_candidates
from hessprobe.instruments.preconditioner.measure.site import Groups
from hessprobe.instruments.snapshot import Snapshot
from hessprobe.optimization.damped_solves import DampedSolutions
from hessprobe.optimization.place import Direction, Place
from hessprobe.problem.partition import Partition

Function = Callable[[Tensor, Snapshot], Tensor]


@dataclass(frozen=True, kw_only=True)
class Occasion:
    """What a candidate may look at, none of which it may change.

    Attributes:
        place: theta, a curvature batch and the gradient there.
        snapshot: the moment of training, with the curvature batch as its batches.
        dampings: mu, for a direction each.
        generator: of all that the candidate draws; it depends on the seed, the step, the candidate and the batch alone.
        solve: -(G_SS + mu)^-1 g_S for groups of blocks and every damping, solved once a batch and counted there.
    """

    place: Place
    snapshot: Snapshot
    dampings: Sequence[float]
    generator: torch.Generator
    solve: Callable[[Groups], DampedSolutions]


@dataclass(frozen=True, kw_only=True)
class Directions:
    """A candidate's directions, one for each damping (the same object where they do not depend on it).

    `residual` and `iterations` are of its own solves, one for each damping, where it is a solve.
    """

    directions: Sequence[Direction]
    residual: Sequence[float] | None = None
    iterations: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One candidate.

    Attributes:
        answer: what it does. Whatever it raises is the reason why it has no figures.
        most_gradients: the most that building it takes beyond the gradient, in gradients of its batch.
        damped: whether directions depend on the damping.
        linear: whether directions say their inverse, so that the candidate has a condition number.
        groups: the groups of blocks that it solves for apart, where it is a solve; UserError for blocks they do not fit.
    """

    answer: Callable[[Occasion], Directions]
    most_gradients: float = 0.0
    damped: bool = False
    linear: bool = False
    groups: Callable[[Partition], Groups] | None = None


def loaded(name: str) -> Candidate:
    """Returns the candidate of a known name, or of "package.module:function".

    Raises:
        UserError: no such name, module or function.
    """
    known = {} if ":" in name else known_candidates()
    if ":" not in name and name not in known:
        raise unknown_name("candidate", name, tuple(known))
    module, _, function = known.get(name, name).partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"candidate {name!r}: {error}; wanted 'package.module:function', importable from where you are"
        ) from error
    return candidate_of(name, found)


def candidate_of(name: str, given: object) -> Candidate:
    """Returns a candidate as it is, or the one that a function(gradient (p,), snapshot) -> direction (p,) makes."""
    if isinstance(given, Candidate):
        return given
    if not callable(given):
        raise UserError(
            f"candidate {name!r} is a {type(given).__name__}; wanted a function (gradient, snapshot)"
        )

    def answer(asked: Occasion) -> Directions:
        # Its own copy of everything: what it writes into is nobody else's.
        theta = replace(asked.snapshot, parameters=asked.snapshot.parameters.clone())
        d = given(asked.place.gradient.clone(), theta)
        if not isinstance(d, Tensor):
            wanted = f"wanted a direction, a tensor ({asked.place.partition.size:,},)"
            raise UserError(f"{wanted}, got {type(d).__name__}")
        return for_every_damping(asked, Direction(vector=d.detach().to(theta.parameters)))

    return Candidate(answer=answer)


def for_every_damping(asked: Occasion, direction: Direction) -> Directions:
    """Returns the answer of a candidate that has no damping of its own."""
    return Directions(directions=[direction] * len(asked.dampings))
