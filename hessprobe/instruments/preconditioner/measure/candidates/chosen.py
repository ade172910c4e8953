"""What every candidate of the preconditioner probe answers on one curvature batch: a direction for each damping."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import cast

import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.instruments.preconditioner.measure.site import Groups, Site
from hessprobe.instruments.preconditioner.recipe import PreconditionerRecipe
from hessprobe.instruments.snapshot import Snapshot
from hessprobe.optimization.conjugate_gradient import NOT_FINITE
from hessprobe.optimization.directions import directions
from hessprobe.optimization.inner_problem import groups_of
from hessprobe.optimization.place import Direction
from hessprobe.problem.partition import Partition

Candidate = Callable[[Tensor, Snapshot], Tensor]
SOLVED = ("layerwise_gn", "full_gn")
GROUPED = "grouped_gn_"
# The most that a candidate takes beyond the gradient, in gradients of its batch: see `directions`.
MOST_GRADIENTS = {
    "adam": 1.0, "sophia": 2.0, "muon": 1.0, "shampoo": 1.0, "soap": 1.0, "kfac": 3.7, "ekfac": 5.3,
    "diagonal_gn": 2.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A candidate's directions, one for each damping (the same object where they do not depend on it).

    `residual` and `iterations` are of its own solves, one for each damping, where it is a solve.
    """

    directions: Sequence[Direction]
    residual: Sequence[float] | None = None
    iterations: Sequence[int] | None = None


class Candidates:
    """The candidates of a recipe and a user's own, by their names in the table.

    Args:
        own: further candidates, function(gradient (p,), snapshot) -> direction (p,); the snapshot's batches are those of
            the curvature batch.

    Raises:
        UserError: a function that cannot be imported, or a name that is taken.
    """

    def __init__(self, recipe: PreconditionerRecipe, own: Mapping[str, Candidate] | None = None) -> None:
        self.recipe = recipe
        self.functions = {
            name.rpartition(":")[2]: imported(name) for name in recipe.candidates if ":" in name
        }
        taken = sorted(set(own or {}) & set(recipe.names))
        if taken:
            raise UserError(
                f"preconditioner: candidates need names of their own, and {', '.join(taken)} exist"
            )
        self.functions.update(own or {})
        self.names = (*recipe.names, *(own or {}))

    def groups(self, name: str, partition: Partition) -> Groups | None:
        """Returns the groups of blocks that a candidate solves for apart, or None where it is no solve.

        Raises:
            UserError: more groups than blocks, or groups that are not all blocks, each once.
        """
        blocks = partition.blocks
        if name in self.functions:
            return None
        if name in SOLVED:
            return groups_of("full" if name == "full_gn" else "layerwise", partition)
        if not name.startswith(GROUPED):
            return None
        given = name.removeprefix(GROUPED)
        if given in self.recipe.groupings:
            return groups_of(self.recipe.groupings[given], partition)
        count = int(given)
        if count > len(blocks):
            raise UserError(
                f"preconditioner.groups: {count} groups of {len(blocks)} blocks: give at most as many"
            )
        of = [i * count // len(blocks) for i in range(len(blocks))]
        return tuple(
            tuple(b for b, group in zip(blocks, of, strict=True) if group == i) for i in range(count)
        )

    def answer(self, name: str, site: Site, generator: torch.Generator) -> Answer:
        """Returns what a candidate does at a site; what it costs is counted there.

        Raises:
            UserError: a direction that is zero or of another shape, a step that is not known.
            FloatingPointError: a direction that is not finite.
            Exception: whatever a candidate raises.
        """
        found = self._answer(name, site, generator)
        for direction in dict.fromkeys(found.directions):
            _check(direction.vector, site.place.parameters)
        site.spent += sum(direction.gradients for direction in dict.fromkeys(found.directions))
        return found

    def _answer(self, name: str, site: Site, generator: torch.Generator) -> Answer:
        dampings, snapshot = self.recipe.dampings, site.snapshot
        if (groups := self.groups(name, site.partition)) is not None:
            solved = site.solve(groups)
            if NOT_FINITE in solved.outcome:
                raise FloatingPointError("the Gauss-Newton system is not finite")
            return Answer(
                directions=[Direction(vector=x) for x in solved.x],
                residual=solved.residual.tolist(),
                iterations=solved.iterations,
            )
        if name == "update":
            if snapshot.update is None:
                raise UserError("the optimizer's step is not known at this moment")
            return Answer(directions=[Direction(vector=snapshot.update)] * len(dampings))
        if name in self.functions:
            # Its own copy of everything: what it writes into is nobody else's.
            theta = replace(snapshot, parameters=snapshot.parameters.clone())
            d = self.functions[name](site.place.gradient.clone(), theta)
            if not isinstance(d, Tensor):
                raise UserError(
                    f"wanted a direction, a tensor ({site.partition.size:,},), got {type(d).__name__}"
                )
            return Answer(directions=[Direction(vector=d.detach().to(theta.parameters))] * len(dampings))
        found = directions(name, site.place, dampings, generator=generator, running=snapshot.optimizer)
        return Answer(directions=found)


def imported(name: str) -> Candidate:
    """Returns the function that "package.module:function" names.

    Raises:
        UserError: no such module or function.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"candidate {name!r}: {error}; wanted 'package.module:function', importable from where you are"
        ) from error
    if not callable(found):
        raise UserError(
            f"candidate {name!r} is a {type(found).__name__}; wanted a function (gradient, snapshot)"
        )
    return cast(Candidate, found)


def _check(d: Tensor, theta: Tensor) -> None:
    if d.shape != theta.shape:
        raise UserError(f"wanted a direction {tuple(theta.shape)}, got {tuple(d.shape)}")
    if not bool(torch.isfinite(d).all()):
        raise FloatingPointError("the direction holds NaN or infinity")
    if not bool(d.any()):
        raise UserError("the direction is zero")
