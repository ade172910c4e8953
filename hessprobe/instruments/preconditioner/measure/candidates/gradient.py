"""Directions that nothing preconditions: the gradient's own, and the step the run really took."""

from __future__ import annotations

from hessprobe.errors import UserError
from hessprobe.instruments.preconditioner.measure.candidates.candidate import (
    Candidate,
    Directions,
    Occasion,
    for_every_damping,
)
from hessprobe.optimization.place import Direction


def _gradient(asked: Occasion) -> Directions:
    return for_every_damping(asked, Direction(vector=-asked.place.gradient, inverse=lambda rows: rows))


def _update(asked: Occasion) -> Directions:
    if asked.snapshot.update is None:
        raise UserError("the optimizer's step is not known at this moment")
    return for_every_damping(asked, Direction(vector=asked.snapshot.update))


gradient = Candidate(answer=_gradient, linear=True)
update = Candidate(answer=_update)
