"""The candidates of one recipe, by their names in the table, and what each answers on one curvature batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hessprobe.errors import UserError
from hessprobe.instruments.preconditioner.measure.candidates.candidate import (
    Candidate,
    Directions,
    Function,
    Occasion,
    candidate_of,
    loaded,
)
from hessprobe.instruments.preconditioner.measure.candidates.gauss_newton import (
    of_contiguous_groups,
    of_groups,
)
from hessprobe.instruments.preconditioner.measure.site import Groups, Site
from hessprobe.instruments.preconditioner.recipe import GROUPED, PreconditionerRecipe
from hessprobe.problem.partition import Partition


class Candidates:
    """The candidates of a recipe and a user's own, by name, in the order of the table.

    Args:
        own: further ones, a `Candidate` or function(gradient (p,), snapshot) -> direction (p,) each; the snapshot's batches
            are those of the curvature batch.

    Raises:
        UserError: a candidate that cannot be imported, or a name that is taken.
    """

    def __init__(
        self, recipe: PreconditionerRecipe, own: Mapping[str, Candidate | Function] | None = None
    ) -> None:
        self.dampings, own = recipe.dampings, own or {}
        taken = sorted(set(own) & set(recipe.names))
        if taken:
            raise UserError(
                f"preconditioner: candidates need names of their own, and {', '.join(taken)} exist"
            )
        self.all: dict[str, Candidate] = {
            **{name.rpartition(":")[2]: loaded(name) for name in recipe.candidates},
            **{f"{GROUPED}{count}": of_contiguous_groups(count) for count in recipe.groups},
            **{f"{GROUPED}{name}": of_groups(groups) for name, groups in recipe.groupings.items()},
            **{name: candidate_of(name, given) for name, given in own.items()},
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, as the table has them."""
        return tuple(self.all)

    def groups(self, partition: Partition) -> list[Groups]:
        """Returns the groups of blocks of every candidate that is a solve.

        Raises:
            UserError: more groups than blocks, or groups that are not all blocks, each once.
        """
        return [each.groups(partition) for each in self.all.values() if each.groups is not None]

    def answer(self, name: str, site: Site, generator: torch.Generator) -> Directions:
        """Returns what a candidate does at a site; what it costs is counted there.

        Raises:
            UserError: a direction that is zero or of another shape, a step that is not known.
            FloatingPointError: a direction that is not finite.
            Exception: whatever a candidate raises.
        """
        asked = Occasion(
            place=site.place,
            snapshot=site.snapshot,
            dampings=self.dampings,
            generator=generator,
            solve=site.solve,
        )
        found = self.all[name].answer(asked)
        for direction in dict.fromkeys(found.directions):
            _check(direction.vector, site.place.parameters)
        site.spent += sum(direction.gradients for direction in dict.fromkeys(found.directions))
        return found


def _check(d: Tensor, theta: Tensor) -> None:
    if d.shape != theta.shape:
        raise UserError(f"wanted a direction {tuple(theta.shape)}, got {tuple(d.shape)}")
    if not bool(torch.isfinite(d).all()):
        raise FloatingPointError("the direction holds NaN or infinity")
    if not bool(d.any()):
        raise UserError("the direction is zero")
