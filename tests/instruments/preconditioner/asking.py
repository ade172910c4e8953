"""Candidates asked at a place, without a probe around them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hessprobe.instruments.preconditioner.measure.candidates.candidate import Occasion, loaded
from hessprobe.instruments.preconditioner.measure.site import Groups
from hessprobe.instruments.preconditioner.recipe import CANDIDATES
from hessprobe.instruments.snapshot import Snapshot
from hessprobe.optimization.damped_solves import DampedSolutions
from hessprobe.optimization.place import Direction, Place
from hessprobe.optimization.running import RunningOptimizer

# Those that answer to a place alone: no solve, and not the step the run took.
BUILT = tuple(name for name in CANDIDATES if name not in ("update", "layerwise_gn", "full_gn"))


def directions(
    name: str,
    place: Place,
    dampings: Sequence[float],
    *,
    generator: torch.Generator,
    running: RunningOptimizer | None = None,
) -> list[Direction]:
    """Returns a candidate's direction at a place for each damping."""
    snapshot = Snapshot(
        step=3, objective=place.objective, partition=place.partition, parameters=place.parameters,
        batches=place.batches, update=None, seed=0, optimizer=running,
    )  # fmt: skip

    def solve(groups: Groups) -> DampedSolutions:
        raise AssertionError(f"{name} solves for {groups}")

    asked = Occasion(place=place, snapshot=snapshot, dampings=dampings, generator=generator, solve=solve)
    return list(loaded(name).answer(asked).directions)
