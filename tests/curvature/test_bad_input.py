"""Mistakes in a call get one sentence that says what was wanted, what was given and the way out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.errors import UserError
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models
from tests.cases import OPERATORS, Case, pair

EXACT = 1e-10
Zoo = Callable[[str], Case]
Seeded = Callable[[int], torch.Generator]


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("shape", [(2, 84), (2, 86), (85,), (1, 2, 85), ()])
def test_vectors_of_the_wrong_shape_are_refused(zoo_case: Zoo, which: str, shape: tuple[int, ...]) -> None:
    operator, _ = pair(zoo_case("mlp_classifier"), which)
    with pytest.raises(UserError, match="85") as caught:
        operator.apply(torch.zeros(shape, dtype=torch.float64))
    assert str(shape) in str(caught.value), "the message says what was given"


@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
def test_a_model_with_nothing_to_train_is_refused(generator: Seeded, kind: type) -> None:
    problem = models.mlp_classifier(generator(23))
    problem.model.requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameters"):
        kind(Objective(problem.model), problem.batches, Partition.of(problem.model, "module"))


@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
@pytest.mark.parametrize("batches", ["all ignored", "none"])
def test_batches_without_a_single_target_are_refused(generator: Seeded, kind: type, batches: str) -> None:
    problem = models.mlp_classifier(generator(24))
    inputs, targets = problem.batches[0]
    given = [] if batches == "none" else [(inputs, torch.full_like(targets, models.IGNORED))]
    partition = Partition.of(problem.model, "module")
    with pytest.raises(UserError, match="target" if given else "no batch"):
        kind(Objective(problem.model), given, partition).apply(
            torch.zeros(1, partition.size, dtype=torch.float64)
        )


@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
def test_targets_that_do_not_fit_the_outputs_are_refused(generator: Seeded, kind: type) -> None:
    problem = models.mlp_classifier(generator(25))
    inputs, targets = problem.batches[0]
    partition = Partition.of(problem.model, "module")
    v = torch.zeros(1, partition.size, dtype=torch.float64)
    with pytest.raises(UserError, match="fit"):
        kind(Objective(problem.model), [(inputs, targets[:-1])], partition).apply(v)


@pytest.mark.parametrize("kind", [GaussNewton, Hessian])
def test_class_labels_under_squared_error_are_refused_not_broadcast(generator: Seeded, kind: type) -> None:
    # (5, 5) outputs minus (5,) labels broadcasts into a number that means nothing.
    problem = models.mlp_classifier(generator(26))
    batch = (models.real(generator(1), 5, 4), models.labels(generator(2), 5, 5))
    partition = Partition.of(problem.model, "module")
    v = torch.zeros(1, partition.size, dtype=torch.float64)
    with pytest.raises(UserError):
        kind(Objective(problem.model, loss="squared_error"), [batch], partition).apply(v)


def test_a_vector_of_another_type_is_refused_with_the_way_to_convert_it(zoo_case: Zoo) -> None:
    case = zoo_case("mlp_classifier")
    with pytest.raises(UserError, match=r"float64.*float32.*v\.to"):
        case.gauss_newton().apply(case.rows(1).float())


def test_other_parameters_of_the_wrong_length_are_refused(zoo_case: Zoo) -> None:
    case = zoo_case("mlp_classifier")
    v = case.rows(1)
    for operator in (case.gauss_newton, case.hessian):
        with pytest.raises(UserError, match="85"):
            operator(parameters=torch.zeros(84, dtype=torch.float64)).apply(v)
