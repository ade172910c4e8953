"""What tests of a Gauss-Newton step share: problems of their own with an optimizer, data, and the dense truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hessprobe.optimization.gauss_newton import GaussNewton
from hessprobe.optimization.inner_problem import GaussNewtonSettings
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles
from tests.cases import Case

RATE, OUTER = 0.03, 4


def fresh(name: str, by: str | Callable[[str], str] = "layer", **settings) -> tuple[Case, GaussNewton]:
    """Returns a zoo problem of its own (steps move the model) and an optimizer on it."""
    problem = models.ZOO[name](models.seeded(7))
    partition = Partition.of(problem.model, by)
    objective = Objective(problem.model, loss=problem.loss)
    chosen = GaussNewtonSettings(**{"learning_rate": RATE, "outer_steps": OUTER, **settings})
    # The dense truth is made where a test needs it, at the theta it needs.
    case = Case(problem, objective, partition)
    return case, GaussNewton(problem.model, objective, partition=partition, settings=chosen)


def text(seed: int, count: int = 2, vocabulary: int = 7) -> list:
    """Returns minibatches with something to learn that carries over: every token is its own target."""
    g = models.seeded(seed)
    return [(tokens, tokens) for tokens in torch.randint(vocabulary, (count, 2, 4), generator=g)]


def theta_of(case: Case) -> Tensor:
    return case.partition.vector(case.problem.model)


def truth_on(case: Case, batches: list) -> oracles.Dense:
    """Returns the dense truth at the model's present parameters, in the partition's order."""
    return oracles.dense(case.problem.model, batches, case.problem.loss).in_order(case.partition.names)


def regression(seed: int, poison: bool = False) -> list:
    g = models.seeded(seed)
    batches = [(models.real(g, 4, 3), models.real(g, 4, 2)) for _ in range(2)]
    if poison:
        batches[0][0][1, 1] = math.nan
    return batches


def points(seed: int, *counts: int) -> list:
    """Returns minibatches of the given sizes for the zoo's `layernorm`."""
    g = models.seeded(seed)
    return [(models.real(g, n, 3), models.labels(g, 4, n)) for n in counts]


def named_groups(case: Case, structure) -> list[tuple[str, ...]]:
    """Returns the groups of blocks that a structure means, written out."""
    blocks = case.partition.blocks
    known = {"full": [blocks], "layerwise": [(block,) for block in blocks]}
    return known[structure] if isinstance(structure, str) else list(structure)
