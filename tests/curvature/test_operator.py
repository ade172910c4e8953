"""What every operator offers: its algebra, chunks of rows, restricted products, other libraries' forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import curvlinops
import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.curvature.operator import CurvatureOperator
from hessprobe.errors import UserError
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles
from tests.cases import Case

EXACT = 1e-10
Zoo = Callable[[str], Case]
Seeded = Callable[[int], torch.Generator]
OPERATORS = ("gauss_newton", "hessian", "residual")
SOME = ("mlp_regression", "repeated_module", "decoder_tied", "decoder_ragged")


def pair(case: Case, which: str, **options: object) -> tuple[CurvatureOperator, Tensor]:
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


# -- shape, type, linearity --------------------------------------------------------------------------------


@pytest.mark.parametrize("which", OPERATORS)
def test_says_its_size_type_and_place(zoo_case: Zoo, which: str) -> None:
    case = zoo_case("mlp_classifier")
    operator, truth = pair(case, which)
    assert (operator.size, operator.dtype, operator.device.type) == (len(truth), torch.float64, "cpu")
    assert operator.partition == case.partition


@pytest.mark.parametrize("which", OPERATORS)
def test_is_linear(zoo_case: Zoo, which: str) -> None:
    case = zoo_case("mlp_classifier")
    operator, _ = pair(case, which)
    u, v = case.rows(2, seed=1), case.rows(2, seed=2)
    combined = 2.5 * operator.apply(u) - 0.5 * operator.apply(v)
    assert oracles.relative_error(operator.apply(2.5 * u - 0.5 * v), combined) < EXACT


@pytest.mark.parametrize("which", OPERATORS)
def test_the_same_product_twice_is_the_same_bit_for_bit(zoo_case: Zoo, which: str) -> None:
    case = zoo_case("decoder_tied")
    operator, _ = pair(case, which)
    v = case.rows(2)
    assert torch.equal(operator.apply(v), operator.apply(v))


@pytest.mark.parametrize("which", OPERATORS)
def test_leaves_its_input_as_it_was(zoo_case: Zoo, which: str) -> None:
    case = zoo_case("mlp_classifier")
    operator, _ = pair(case, which)
    v = case.rows(2)
    before = v.clone()
    product = operator.apply(v)
    assert torch.equal(v, before)
    assert product.data_ptr() != v.data_ptr()


def test_single_precision_products_agree_with_the_truth_to_single_precision(generator: Seeded) -> None:
    problem = models.mlp_classifier(generator(21))
    truth = oracles.dense(*problem)
    model = problem.model.float()
    batches = [(inputs.float(), targets) for inputs, targets in problem.batches]
    partition = Partition.of(model, "module")
    v = torch.randn(3, partition.size, generator=generator(1))
    for operator, dense in (
        (GaussNewton(Objective(model), batches, partition), truth.in_order(partition.names).gauss_newton),
        (Hessian(Objective(model), batches, partition), truth.in_order(partition.names).hessian),
    ):
        product = operator.apply(v)
        assert product.dtype == operator.dtype == torch.float32
        assert oracles.relative_error(product.double(), v.double() @ dense) < 1e-4


# -- algebra -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("name", SOME)
def test_damped_adds_a_multiple_of_the_identity(zoo_case: Zoo, name: str, which: str) -> None:
    case = zoo_case(name)
    operator, truth = pair(case, which)
    v = case.rows(3)
    assert oracles.relative_error(operator.damped(0.37).apply(v), v @ truth + 0.37 * v) < EXACT


@pytest.mark.parametrize("which", OPERATORS)
def test_damped_restricted_products_keep_damping_on_the_diagonal_blocks(zoo_case: Zoo, which: str) -> None:
    case = zoo_case("decoder_ragged")
    operator, truth = pair(case, which)
    first, last = case.partition.blocks[0], case.partition.blocks[-1]
    v = masked(case, case.rows(2), [first])
    wanted = v @ truth + 0.37 * v
    damped = operator.damped(0.37)
    for rows in ([last], [first], [last, first]):
        got = damped.apply(v, columns=[first], rows=rows)
        assert oracles.relative_error(got, masked(case, wanted, rows)) < EXACT


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("name", SOME)
def test_block_diagonal_drops_everything_between_blocks(zoo_case: Zoo, name: str, which: str) -> None:
    case = zoo_case(name)
    operator, truth = pair(case, which)
    wanted = oracles.block_diagonal(truth, case.slices)
    assert oracles.relative_error(operator.block_diagonal().to_dense(), wanted) < EXACT


def test_damping_and_block_diagonal_commute(zoo_case: Zoo) -> None:
    case = zoo_case("decoder_ragged")
    v = case.rows(2)
    operator = case.gauss_newton()
    one = operator.damped(0.1).block_diagonal().apply(v)
    other = operator.block_diagonal().damped(0.1).apply(v)
    assert oracles.relative_error(one, other) < EXACT


@pytest.mark.parametrize("which", OPERATORS)
def test_block_diagonal_answers_restricted_products(zoo_case: Zoo, which: str) -> None:
    case = zoo_case("decoder_ragged")
    operator, truth = pair(case, which)
    first, last = case.partition.blocks[0], case.partition.blocks[-1]
    wanted = oracles.block_diagonal(truth, case.slices)
    v = masked(case, case.rows(2), [first])
    diagonal = operator.block_diagonal()
    assert not diagonal.apply(v, columns=[first], rows=[last]).any()
    kept = diagonal.apply(v, columns=[first], rows=[first])
    assert oracles.relative_error(kept, masked(case, v @ wanted, [first])) < EXACT


def test_a_difference_of_equal_operators_is_zero(zoo_case: Zoo) -> None:
    case = zoo_case("mlp_classifier")
    assert not (case.gauss_newton() - case.gauss_newton()).apply(case.rows(2)).any()


def test_operators_under_different_partitions_cannot_be_subtracted(zoo_case: Zoo) -> None:
    case = zoo_case("decoder_tied")
    with pytest.raises(UserError, match="partition"):
        case.hessian() - case.split("parameter").gauss_newton()


# -- restricted products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("name", ["repeated_module", "decoder", "decoder_tied", "decoder_ragged"])
def test_columns_and_rows_pick_blocks_of_the_matrix(zoo_case: Zoo, name: str, which: str) -> None:
    case = zoo_case(name)
    operator, truth = pair(case, which)
    scale = truth.abs().max()
    everything = case.rows(2)
    for column in case.partition.blocks:
        v = masked(case, everything, [column])
        whole = v @ truth
        for rows in (
            [case.partition.blocks[0]],
            [case.partition.blocks[-1]],
            list(case.partition.blocks[-2:]),
        ):
            got = operator.apply(v, columns=[column], rows=rows)
            # Relative to the whole matrix: single blocks may be smaller by far, and R's may be zero.
            assert (got - masked(case, whole, rows)).abs().max() < EXACT * scale
        assert (operator.apply(v, columns=[column]) - whole).abs().max() < EXACT * scale
    for row in case.partition.blocks:
        got = operator.apply(everything, rows=[row])
        assert (got - masked(case, everything @ truth, [row])).abs().max() < EXACT * scale


def test_entries_outside_the_named_columns_do_not_count_or_are_refused(zoo_case: Zoo) -> None:
    # `columns` promises that v is zero elsewhere. A broken promise must not give a mixture of both readings.
    case = zoo_case("decoder_ragged")
    v, column = case.rows(2), case.partition.blocks[0]
    try:
        got = case.gauss_newton().apply(v, columns=[column])
    except UserError:
        return
    assert oracles.relative_error(got, masked(case, v, [column]) @ case.truth.gauss_newton) < EXACT


@pytest.mark.parametrize("argument", ["columns", "rows"])
@pytest.mark.parametrize("which", OPERATORS)
def test_an_unknown_block_lists_the_blocks(zoo_case: Zoo, which: str, argument: str) -> None:
    case = zoo_case("decoder_ragged")
    operator, _ = pair(case, which)
    with pytest.raises(UserError, match=r"no block named 'block\.7'.*embedding, block\.0"):
        operator.apply(case.rows(1), **{argument: ["block.7"]})


# -- chunks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", OPERATORS)
@pytest.mark.parametrize("name", ["mlp_regression", "decoder_ragged"])
def test_a_memory_bound_changes_the_chunks_not_the_rows(zoo_case: Zoo, name: str, which: str) -> None:
    case = zoo_case(name)
    v = case.rows(7)
    whole, _ = pair(case, which)
    wanted = whole.apply(v)
    for memory in (1, 200_000, 1_000_000):  # from one row at a time to a few
        bounded, _ = pair(case, which, memory=memory)
        assert oracles.relative_error(bounded.apply(v), wanted) < EXACT


@pytest.mark.parametrize("which", OPERATORS)
def test_no_rows_give_no_rows(zoo_case: Zoo, which: str) -> None:
    case = zoo_case("mlp_classifier")
    operator, _ = pair(case, which)
    assert operator.apply(case.rows(0)).shape == (0, case.partition.size)


# -- dense, SciPy, curvlinops ------------------------------------------------------------------------------


@pytest.mark.parametrize("which", OPERATORS)
def test_to_dense_is_the_matrix(zoo_case: Zoo, which: str) -> None:
    operator, truth = pair(zoo_case("mlp_classifier"), which)
    assert oracles.relative_error(operator.to_dense(), truth) < EXACT


def test_to_dense_refuses_above_5000_parameters_and_says_what_to_do(generator: Seeded) -> None:
    model = models.redraw(nn.Linear(101, 50, bias=False), generator(1))
    inputs, targets = models.real(generator(2), 3, 101), models.labels(generator(3), 50, 3)
    operator = GaussNewton(Objective(model), [(inputs, targets)], Partition.of(model, "module"))
    with pytest.raises(UserError, match=r"p = 5,050 \(limit 5,000\).*estimator"):
        operator.to_dense()


@pytest.mark.parametrize("which", OPERATORS)
def test_eigsh_runs_on_the_scipy_form(zoo_case: Zoo, which: str) -> None:
    operator, truth = pair(zoo_case("mlp_classifier"), which)
    scipy_form = operator.to_scipy()
    assert scipy_form.dtype == np.float64
    assert scipy_form.shape == tuple(truth.shape)
    start = np.ones(len(truth))
    found = eigsh(scipy_form, k=3, which="LA", v0=start, return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), torch.linalg.eigvalsh(truth)[-3:].numpy(), rtol=1e-8)


def test_the_scipy_form_multiplies_vectors_and_matrices_from_both_sides(zoo_case: Zoo) -> None:
    case = zoo_case("mlp_regression")
    scipy_form, truth = case.gauss_newton().to_scipy(), case.truth.gauss_newton.numpy()
    v = case.rows(3).numpy()
    np.testing.assert_allclose(scipy_form @ v[0], truth @ v[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(scipy_form @ v.T, truth @ v.T, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(scipy_form.rmatvec(v[0]), truth @ v[0], rtol=1e-9, atol=1e-12)


def test_the_scipy_form_is_float64_for_a_single_precision_model(generator: Seeded) -> None:
    problem = models.mlp_classifier(generator(22))
    model = problem.model.float()
    batches = [(inputs.float(), targets) for inputs, targets in problem.batches]
    scipy_form = GaussNewton(Objective(model), batches, Partition.of(model, "module")).to_scipy()
    product = scipy_form @ np.ones(scipy_form.shape[1])
    assert (scipy_form.dtype, product.dtype) == (np.float64, np.float64)


@pytest.mark.parametrize("which", OPERATORS)
def test_curvlinops_multiplies_with_the_curvlinops_form(zoo_case: Zoo, which: str) -> None:
    case = zoo_case("decoder_ragged")
    operator, truth = pair(case, which)
    theirs = operator.to_curvlinops()
    v = case.rows(2)
    assert oracles.relative_error((theirs @ v.T).T, v @ truth) < EXACT
    assert oracles.relative_error(theirs @ v[0], v[0] @ truth) < EXACT


def test_curvlinops_estimators_run_on_the_curvlinops_form(zoo_case: Zoo) -> None:
    case = zoo_case("mlp_classifier")
    truth = case.truth.gauss_newton
    theirs = case.gauss_newton().to_curvlinops()
    samples = 64
    with torch.random.fork_rng():
        torch.manual_seed(4)
        trace = float(curvlinops.hutchinson_trace(theirs, samples))
        low_rank = float(curvlinops.xtrace(theirs, 2 * (len(truth) // 2 - 1)))
    # Var = 2 (|A|_F^2 - sum_i A_ii^2) / samples for Rademacher probes (Hutchinson 1989).
    spread = float(2 * (truth.square().sum() - truth.diagonal().square().sum()) / samples) ** 0.5
    assert abs(trace - float(truth.trace())) < 4 * spread
    # rank(G) <= 6 tokens x 4 free logits < the number of products: XTrace deflates all of it away.
    assert low_rank == pytest.approx(float(truth.trace()), rel=1e-8)


# -- mistakes ----------------------------------------------------------------------------------------------


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


def test_other_parameters_of_the_wrong_length_are_refused(zoo_case: Zoo) -> None:
    case = zoo_case("mlp_classifier")
    v = case.rows(1)
    for operator in (case.gauss_newton, case.hessian):
        with pytest.raises(UserError, match="85"):
            operator(parameters=torch.zeros(84, dtype=torch.float64)).apply(v)
