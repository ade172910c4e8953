"""Gauss-Newton's inner problem as data: which model of the loss, for which groups of blocks, solved how.

Everything is checked when the settings are made, or, where it takes the blocks' names, in `groups_of`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hessprobe.errors import UserError, unknown_name
from hessprobe.optimization.inner_solver import INNER_SOLVERS
from hessprobe.optimization.line_search import step_sizes
from hessprobe.optimization.local_model import MODELS
from hessprobe.optimization.schedule import SCHEDULES
from hessprobe.problem.partition import Partition

STRUCTURES = ("full", "layerwise")
SOLVERS = (*INNER_SOLVERS, "cg")
FULL_GRID, GROUPED_GRID = 5, 10  # the reference study's, for full and for layerwise
Group = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class GaussNewtonSettings:
    """How the inner problem is posed and solved; defaults are the reference study's.

    Attributes:
        structure: "full" (all blocks together), "layerwise" (every block on its own), or groups of block names,
            such as (("embedding", "block.0"), ("block.1", "head")): each solved with the others at theta.
        model: "quadratic" or "prox-linear".
        solver: "muon", "adamw", "soap" or "shampoo" on minibatches, or "cg": conjugate gradients on the system
            (G + damping I) delta = -g of the whole outer batch, for the quadratic model.
        damping: mu of the term mu |theta' - theta|^2 / 2 added to the model of the loss (nats per token).
        learning_rate, schedule, clip: of the inner steps; clip bounds each group's gradient norm. "cg" reads none. The
            schedule is one of SCHEDULES; None takes "global-cosine" where outer_steps is given, else "inner-cosine".
        inner_steps: inner steps of one outer step, over the minibatches in turn; None takes one for each.
        cg_iterations: conjugate gradient iterations at most, for each group.
        cg_tolerance: of |g + (G + damping I) delta| / |g|, for each group.
        line_search_grid: number of step sizes 2^(-i/2) tried; None takes 5 for one group and 10 for several.
        warm_start: whether the inner solve starts at the last inner solution, its optimizer state kept.
        outer_steps: length of the run, which "global-cosine" needs.
        predict: whether reports say what decrease the model of the loss promised; 1 gradient a line search minibatch.

    Raises:
        UserError: a name, a number or a combination that does not exist.
    """

    structure: str | Sequence[Sequence[str]] = "full"
    model: str = "quadratic"
    solver: str = "muon"
    damping: float = 0.0
    learning_rate: float = 0.02
    schedule: str | None = None
    clip: float | None = 1.0
    inner_steps: int | None = None
    cg_iterations: int = 50
    cg_tolerance: float = 1e-3
    line_search_grid: int | None = None
    warm_start: bool = True
    outer_steps: int | None = None
    predict: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.structure, str):
            if self.structure not in STRUCTURES:
                raise unknown_name("structure", self.structure, [*STRUCTURES, "groups of block names"])
        else:
            object.__setattr__(self, "structure", _as_groups(self.structure))
        for kind, given, valid in (
            ("model of the loss", self.model, MODELS),
            ("inner solver", self.solver, SOLVERS),
            ("schedule", self.course, SCHEDULES),
        ):
            if given not in valid:
                raise unknown_name(kind, str(given), valid)
        for name in ("inner_steps", "cg_iterations", "outer_steps"):
            count = getattr(self, name)
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise UserError(f"{name} must be a whole number of at least 1, got {count!r}")
        for name in ("learning_rate", "cg_tolerance", "clip"):
            number = getattr(self, name)
            if number is not None and not (math.isfinite(number) and number > 0):
                way_out = ": None does not clip" if name == "clip" else ""
                raise UserError(f"{name} must be positive, got {number}{way_out}")
        if not (math.isfinite(self.damping) and self.damping >= 0):
            raise UserError(f"damping must be 0 or more, got {self.damping}")
        if self.line_search_grid is not None:
            step_sizes(self.line_search_grid)
        self._check_combination()

    @property
    def course(self) -> str:
        """The learning rate's schedule, where none was named too."""
        return self.schedule or ("inner-cosine" if self.outer_steps is None else "global-cosine")

    def step_sizes(self, groups: int) -> tuple[float, ...]:
        """Returns the line search's step sizes for so many groups of blocks."""
        return step_sizes(self.line_search_grid or (FULL_GRID if groups == 1 else GROUPED_GRID))

    def _check_combination(self) -> None:
        if self.course == "global-cosine" and self.outer_steps is None:
            raise UserError(
                "schedule 'global-cosine' falls over the whole run: say how long it is with outer_steps, or choose "
                "inner-cosine or constant"
            )
        if self.solver != "cg":
            return
        if self.model != "quadratic":
            first_order = ", ".join(INNER_SOLVERS)
            raise UserError(
                f"no solver 'cg' for model {self.model!r}: conjugate gradients solve a linear system, and only the "
                f"quadratic model gives one. There are: quadratic with {first_order}, cg; prox-linear with {first_order}"
            )
        if self.inner_steps is not None:
            raise UserError(
                f"inner_steps {self.inner_steps} with solver 'cg': conjugate gradients read the whole outer batch in "
                "every iteration; bound them with cg_iterations"
            )


def groups_of(structure: str | Sequence[Sequence[str]], partition: Partition) -> tuple[Group, ...]:
    """Returns the groups of blocks that a structure means, each in the partition's order.

    Raises:
        UserError: a block that does not exist, stands in two groups, or in none.
    """
    if structure == "full":
        return (partition.blocks,)
    if structure == "layerwise":
        return tuple((block,) for block in partition.blocks)
    named = [block for group in structure for block in group]
    strangers = [block for block in named if block not in partition.blocks]
    if strangers:
        raise UserError(
            f"structure: no block named {', '.join(map(repr, strangers))}. Valid: {', '.join(partition.blocks)}"
        )
    twice = sorted({block for block in named if named.count(block) > 1})
    if twice:
        raise UserError(f"structure: {', '.join(twice)} named more than once; a block belongs to one group")
    missing = [block for block in partition.blocks if block not in named]
    if missing:
        raise UserError(
            f"structure: no group holds {', '.join(missing)}; every block needs one, if of its own"
        )
    return tuple(tuple(block for block in partition.blocks if block in group) for group in structure)


def _as_groups(structure: object) -> tuple[Group, ...]:
    """Returns groups as tuples; raises where they are anything but sequences of names."""
    wanted = (
        "wanted 'full', 'layerwise' or groups of block names, such as (('embedding', 'block.0'), ('head',))"
    )
    if not isinstance(structure, Sequence) or not structure:
        raise UserError(f"structure: {wanted}, got {structure!r}")
    for group in structure:
        if (
            isinstance(group, str)
            or not isinstance(group, Sequence)
            or not group
            or not all(isinstance(b, str) for b in group)
        ):
            raise UserError(f"structure: {wanted}; one group is {group!r}")
    return tuple(tuple(group) for group in structure)
