"""The Gauss-Newton operator equals (1/N) J^T (d2 loss/dz2) J, whatever the model, loss and batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from curvlinops import GGNLinearOperator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles
from tests.cases import Case, rows_of

EXACT = 1e-10
Zoo = Callable[[str], Case]
Seeded = Callable[[int], torch.Generator]


@pytest.mark.parametrize("name", models.ZOO)
def test_dense_form_equals_the_oracle(zoo_case: Zoo, name: str) -> None:
    case = zoo_case(name)
    assert oracles.relative_error(case.gauss_newton().to_dense(), case.truth.gauss_newton) < EXACT


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("name", models.ZOO)
def test_products_with_k_rows_equal_the_oracle(zoo_case: Zoo, name: str, k: int) -> None:
    case = zoo_case(name)
    v = case.rows(k)
    product = case.gauss_newton().apply(v)
    assert not product.requires_grad
    assert oracles.relative_error(product, v @ case.truth.gauss_newton) < EXACT


@pytest.mark.parametrize("by", ["layer", "module", "parameter"])
def test_every_partition_describes_the_same_matrix(zoo_case: Zoo, by: str) -> None:
    case = zoo_case("decoder_swiglu_layernorm").split(by)
    v = case.rows(2)
    assert oracles.relative_error(case.gauss_newton().apply(v), v @ case.truth.gauss_newton) < EXACT


@pytest.mark.parametrize("name", ["decoder", "decoder_ragged", "custom_loss", "layernorm"])
def test_is_symmetric_and_positive_semidefinite(zoo_case: Zoo, name: str) -> None:
    dense = zoo_case(name).gauss_newton().to_dense()
    assert oracles.relative_error(dense, dense.T) < EXACT
    eigenvalues = torch.linalg.eigvalsh((dense + dense.T) / 2)
    assert eigenvalues[0] > -EXACT * eigenvalues[-1]


def test_linear_regression_equals_x_transposed_x() -> None:
    problem = models.linear_regression(models.seeded(5))
    case = Case.on(problem)
    closed_form = oracles.linear_regression_curvature(problem.batches[0][0], outputs=3)
    assert oracles.relative_error(case.gauss_newton().to_dense(), closed_form) < EXACT


def test_softmax_regression_equals_its_closed_form() -> None:
    problem = models.softmax_regression(models.seeded(6))
    assert isinstance(problem.model, nn.Linear)
    closed_form = oracles.softmax_regression_curvature(problem.batches[0][0], problem.model.weight.detach())
    assert oracles.relative_error(Case.on(problem).gauss_newton().to_dense(), closed_form) < EXACT


@pytest.mark.parametrize(
    "name",
    ["mlp_classifier", "layernorm", "repeated_module", "decoder", "decoder_swiglu_layernorm", "decoder_tied"],
)
def test_equals_curvlinops_on_cross_entropy(generator: Seeded, name: str) -> None:
    problem = models.ZOO[name](generator(7))
    inputs, targets = problem.batches[0]
    targets = targets.clamp(min=0)  # with ignored targets curvlinops averages over batches, not tokens
    case = Case.on(models.Problem(problem.model, [(inputs, targets)], "cross_entropy"))
    named = dict(problem.model.named_parameters())
    flat_logits = nn.Sequential(problem.model, nn.Flatten(0, -2)) if targets.ndim > 1 else problem.model
    theirs = GGNLinearOperator(
        flat_logits,
        nn.CrossEntropyLoss(),
        [named[parameter] for parameter in case.partition.names],  # type: ignore[misc]
        [(inputs, targets.reshape(-1))],
        # Their accumulation divides by the number of targets, so the batch size must count those.
        batch_size_fn=lambda _: targets.numel(),
        check_deterministic=False,
    )
    v = case.rows(3)
    with sdpa_kernel(SDPBackend.MATH):  # left to themselves they meet fused attention and raise
        expected = rows_of(theirs, v)
    assert oracles.relative_error(case.gauss_newton().apply(v), expected) < EXACT


def test_equals_curvlinops_on_squared_error(zoo_case: Zoo) -> None:
    # MSELoss averages over rows and outputs without the half: its curvature is 2/c times ours.
    case = zoo_case("mlp_regression")
    named = dict(case.problem.model.named_parameters())
    theirs = GGNLinearOperator(
        case.problem.model,
        nn.MSELoss(),
        [named[parameter] for parameter in case.partition.names],  # type: ignore[misc]
        case.problem.batches,
        check_deterministic=False,
    )
    v = case.rows(3)
    outputs = case.problem.batches[0][1].shape[-1]
    assert oracles.relative_error(case.gauss_newton().apply(v) * 2 / outputs, rows_of(theirs, v)) < EXACT


def test_micro_batches_are_weighted_by_their_valid_targets(zoo_case: Zoo) -> None:
    case = zoo_case("decoder_ragged")
    v = case.rows(2)
    products, tokens = [], []
    for batch in case.problem.batches:
        products.append(GaussNewton(case.objective, batch, case.partition).apply(v))
        tokens.append(case.objective.tokens(batch))
    assert len(set(tokens)) > 1, "the zoo member is ragged by construction"
    weighted = sum(n * product for n, product in zip(tokens, products, strict=True)) / sum(tokens)
    assert isinstance(weighted, Tensor)
    assert oracles.relative_error(case.gauss_newton().apply(v), weighted) < EXACT


def test_a_micro_batch_without_a_valid_target_adds_nothing(zoo_case: Zoo) -> None:
    case = zoo_case("decoder_ragged")
    inputs, targets = case.problem.batches[0]
    empty = (inputs, torch.full_like(targets, models.IGNORED))
    v = case.rows(2)
    with_empty = GaussNewton(case.objective, [*case.problem.batches, empty], case.partition)
    assert oracles.relative_error(with_empty.apply(v), v @ case.truth.gauss_newton) < EXACT


def test_another_ignore_index_is_respected(generator: Seeded) -> None:
    problem = models.mlp_classifier(generator(8))
    inputs, targets = problem.batches[0]
    partition = Partition.of(problem.model, "module")
    renamed = [(inputs, targets.masked_fill(targets == models.IGNORED, 0))]
    truth = oracles.dense(problem.model, renamed, "cross_entropy", ignore_index=0).in_order(partition.names)
    operator = GaussNewton(Objective(problem.model, ignore_index=0), renamed, partition)
    assert oracles.relative_error(operator.to_dense(), truth.gauss_newton) < EXACT


def cross_entropy_written_out(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.logsumexp(outputs, -1) - outputs.gather(-1, targets[:, None])[:, 0]


def squared_error_written_out(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().sum(-1)


@pytest.mark.parametrize(
    ("name", "loss"),
    [("softmax_regression", cross_entropy_written_out), ("mlp_regression", squared_error_written_out)],
)
def test_a_loss_given_as_a_function_equals_its_closed_form_twin(
    zoo_case: Zoo, name: str, loss: Callable[[Tensor, Tensor], Tensor]
) -> None:
    case = zoo_case(name)
    v = case.rows(3)
    by_autodiff = GaussNewton(Objective(case.problem.model, loss=loss), case.problem.batches, case.partition)
    assert oracles.relative_error(by_autodiff.apply(v), case.gauss_newton().apply(v)) < EXACT


def test_can_be_taken_at_other_parameters_than_the_models(
    generator: Seeded,
) -> None:
    case = Case.on(models.mlp_classifier(generator(9)))
    before = case.partition.vector(case.problem.model)
    theta = before + 0.3 * case.rows(1)[0]
    there = oracles.dense(*case.problem, theta=case.partition.unflatten(theta)).in_order(case.partition.names)
    v = case.rows(2)
    assert (
        oracles.relative_error(case.gauss_newton(parameters=theta).apply(v), v @ there.gauss_newton) < EXACT
    )
    assert torch.equal(case.partition.vector(case.problem.model), before)


def test_follows_the_model_where_no_parameters_are_given(generator: Seeded) -> None:
    case = Case.on(models.mlp_classifier(generator(9)))
    operator, v = case.gauss_newton(), case.rows(2)
    operator.apply(v)
    case.partition.assign(case.problem.model, case.partition.vector(case.problem.model) + 0.1)
    now = oracles.dense(*case.problem).in_order(case.partition.names)
    assert oracles.relative_error(operator.apply(v), v @ now.gauss_newton) < EXACT


def test_a_dataloaders_list_of_two_tensors_is_one_batch(zoo_case: Zoo) -> None:
    case = zoo_case("mlp_classifier")
    v = case.rows(2)
    as_list = GaussNewton(case.objective, list(case.problem.batches[0]), case.partition)
    assert torch.equal(as_list.apply(v), case.gauss_newton().apply(v))


@pytest.mark.parametrize("name", ["mlp_regression", "repeated_module", "decoder_tied"])
def test_block_tangents_are_the_jacobian_applied_block_by_block(zoo_case: Zoo, name: str) -> None:
    # <J_i d_i, (d2 loss/dz2) J_j d_j> / N = d_i . G_ij d_j: the curvature along a step, pair by pair.
    case = zoo_case(name)
    batch, direction = case.problem.batches[0], case.rows(1)[0]
    one = Case.on(models.Problem(case.problem.model, [batch], case.problem.loss)).split(case.partition.kind)
    blocks = [(block,) for block in case.partition.blocks]
    z, (tangents,) = case.gauss_newton().tangents(batch, direction[None], blocks)
    assert not z.requires_grad and not tangents.requires_grad
    targets = case.objective.targets(batch)
    curved = torch.einsum("ncd,lnd->lnc", oracles.logit_hessians(case.problem.loss, z, targets), tangents)
    pairs = torch.einsum("inc,jnc->ij", tangents, curved) / one.truth.tokens
    wanted = torch.stack(
        [
            torch.stack([direction[i] @ one.truth.gauss_newton[i, j] @ direction[j] for j in case.slices])
            for i in case.slices
        ]
    )
    assert oracles.relative_error(pairs, wanted) < EXACT


def test_parameters_that_are_nan_give_nan_not_numbers(generator: Seeded) -> None:
    case = Case.on(models.mlp_classifier(generator(10)))
    theta = torch.full((case.partition.size,), float("nan"), dtype=torch.float64)
    assert case.gauss_newton(parameters=theta).apply(case.rows(1)).isnan().any()
