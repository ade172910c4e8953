"""What every operator offers: its algebra, chunks of rows, restricted products, other libraries' forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.curvature.hessian import Hessian
from hessprobe.errors import UserError
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests import models, oracles
from tests.cases import OPERATORS, Case, masked, pair

EXACT = 1e-10
Zoo = Callable[[str], Case]
Seeded = Callable[[int], torch.Generator]
SOME = ("mlp_regression", "repeated_module", "decoder_tied", "decoder_ragged")


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
    v = case.rows(4)  # a matrix that is another one differs on random rows
    assert oracles.relative_error(operator.block_diagonal().apply(v), v @ wanted) < EXACT


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
        _ = case.hessian() - case.split("parameter").gauss_newton()


# -- restricted products -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "which"),
    [
        *(
            (name, which)
            for name in ("repeated_module", "decoder", "decoder_tied")
            for which in OPERATORS[:2]
        ),
        ("repeated_module", "residual"),
        ("decoder_ragged", "gauss_newton"),
    ],
)
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


def test_no_columns_or_no_rows_give_zeros(zoo_case: Zoo) -> None:
    case = zoo_case("mlp_classifier")
    for which in OPERATORS:
        operator, _ = pair(case, which)
        assert not operator.apply(case.rows(2), columns=[]).any()
        assert not operator.apply(case.rows(2), rows=[]).any()


def test_rows_may_be_views_that_share_memory(zoo_case: Zoo) -> None:
    case = zoo_case("mlp_classifier")
    v = case.rows(1).expand(3, -1)
    strided = case.rows(6).T.contiguous().T[::2]
    for which in OPERATORS:
        operator, truth = pair(case, which)
        assert oracles.relative_error(operator.apply(v), v @ truth) < EXACT
        assert oracles.relative_error(operator.apply(strided), strided @ truth) < EXACT
        assert oracles.relative_error(operator.damped(0.1).apply(v), v @ truth + 0.1 * v) < EXACT


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


@pytest.mark.parametrize("which", ["gauss_newton", "hessian"])
def test_the_memory_bound_decides_how_many_rows_go_together(zoo_case: Zoo, which: str) -> None:
    case = zoo_case("decoder_ragged")
    chunks = [getattr(case, which)(memory=memory).rows_at_once(7) for memory in (1, 200_000, 2**30)]
    assert chunks[0] == 1 < chunks[1] < chunks[2] == 7


@pytest.mark.parametrize("which", OPERATORS)
def test_no_rows_give_no_rows(zoo_case: Zoo, which: str) -> None:
    case = zoo_case("mlp_classifier")
    operator, _ = pair(case, which)
    assert operator.apply(case.rows(0)).shape == (0, case.partition.size)
