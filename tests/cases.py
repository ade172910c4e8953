"""A zoo problem beside its dense truth, and the operators under test built on it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.curvature.operator import CurvatureOperator
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles

SEED = 20250
OPERATORS = ("gauss_newton", "hessian", "residual")


@dataclass(frozen=True)
class Case:
    """One member of the zoo with everything a test needs."""

    problem: models.Problem
    objective: Objective
    partition: Partition
    as_built: Case | None = None  # under its first partition, which holds the truth of all
    as_drawn: models.Problem | None = (
        None  # a copy: the truth is of the model as it was, whatever a test does to it
    )

    @classmethod
    def of(cls, name: str) -> Case:
        """Builds the named zoo member: transformers split by layer, the others by module."""
        return cls.on(
            models.ZOO[name](models.seeded(SEED)), "layer" if name.startswith("decoder") else "module"
        )

    @classmethod
    def on(cls, problem: models.Problem, by: str = "module") -> Case:
        """Builds the case of any problem."""
        partition = Partition.of(problem.model, by)
        objective = Objective(problem.model, loss=problem.loss)
        return cls(problem, objective, partition, as_drawn=copy.deepcopy(problem))

    def split(self, by: str) -> Case:
        """Returns the same case under another partition; the truth is reordered, not recomputed."""
        partition = Partition.of(self.problem.model, by)
        return Case(self.problem, self.objective, partition, as_built=self.as_built or self)

    @cached_property
    def truth(self) -> oracles.Dense:
        """The dense truth in the partition's order, computed when it is first asked for: a second for the largest."""
        drawn = self.as_drawn or self.problem
        dense = oracles.dense(*drawn) if self.as_built is None else self.as_built.truth
        return dense.in_order(self.partition.names)

    @property
    def slices(self) -> list[slice]:
        return [self.partition.slices[block] for block in self.partition.blocks]

    def gauss_newton(self, **options: Any) -> GaussNewton:
        return GaussNewton(self.objective, self.problem.batches, self.partition, **options)

    def hessian(self, **options: Any) -> Hessian:
        return Hessian(self.objective, self.problem.batches, self.partition, **options)

    def rows(self, k: int, seed: int = 1) -> Tensor:
        """Returns k standard normal rows (k, p)."""
        return torch.randn(k, self.partition.size, generator=models.seeded(seed), dtype=torch.float64)


def rows_of(curvlinops_operator: Any, rows: Tensor) -> Tensor:
    """Returns a curvlinops operator applied to (k, p) rows; it multiplies columns."""
    return (curvlinops_operator @ rows.T).T


def pair(case: Case, which: str, **options: Any) -> tuple[CurvatureOperator, Tensor]:
    """Returns the named operator and the dense matrix it has to equal."""
    if which == "gauss_newton":
        return case.gauss_newton(**options), case.truth.gauss_newton
    if which == "hessian":
        return case.hessian(**options), case.truth.hessian
    return case.hessian(**options) - case.gauss_newton(**options), case.truth.residual


def masked(case: Case, rows: Tensor, blocks: Sequence[str]) -> Tensor:
    """Returns the rows with everything outside the named blocks set to zero."""
    kept = torch.zeros_like(rows)
    for block in blocks:
        kept[:, case.partition.slices[block]] = rows[:, case.partition.slices[block]]
    return kept
