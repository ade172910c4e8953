"""What is declared is what was counted by hand: thirds of a gradient, forward, back to activations, back to weights."""

from __future__ import annotations

import pytest

from hessprobe.curvature import cost


def test_a_gradient_is_the_unit_and_a_pass_a_third_of_it():
    assert cost.passes(1, 2) == 1 and cost.passes(1, 0) == pytest.approx(1 / 3)
    assert cost.layer_kernels(1) == 1 and cost.layer_kernels(4) == 3
    assert cost.line_search(10) == pytest.approx(11 / 3)


def test_products_of_one_group_alone_reused_and_by_halves():
    assert cost.dual_pass(1) == pytest.approx(5 / 3)  # alone
    assert cost.gauss_newton_products() == pytest.approx(4 / 3)  # the linearisation is there
    assert cost.linearised_gradients(1) == pytest.approx(cost.gauss_newton_products() + 1)
    assert cost.tangents(5) * 2 == cost.gauss_newton_products(5)
    assert cost.curvature_along(3, 5) == pytest.approx(1 + 3 * cost.tangents(5))


@pytest.mark.parametrize(("matrix", "alone", "each"), [("gauss_newton", 2, 4 / 3), ("hessian", 3, 2)])
def test_rows_share_what_is_done_once(matrix, alone, each):
    assert cost.products(matrix, 1) == pytest.approx(alone)
    assert cost.products(matrix, 9) - cost.products(matrix, 8) == pytest.approx(each)
    assert cost.products(matrix, 3, times=4) == pytest.approx(4 * cost.products(matrix, 3))


def test_the_residual_by_difference_takes_both():
    assert cost.products("residual", 7) == pytest.approx(
        cost.products("gauss_newton", 7) + cost.products("hessian", 7)
    )


def test_groups_of_equal_work_take_what_their_layers_take():
    # Group i of K pulls back through its own layers and those above, and its tangent starts there: the mean is (K + 1) / 2K.
    for groups in (1, 2, 7):
        share = sum((groups - i) / groups for i in range(groups))
        weights_and_activations = 2 / 3 * (share + 1)  # the matrices' own products are all done once
        assert cost.gauss_newton_products(groups) == pytest.approx(weights_and_activations)
        assert cost.mean_block(groups) == pytest.approx(share / groups)


def test_rows_that_fit_are_at_least_what_must_go_together():
    assert cost.rows_at_once(10, 100, 30) == 3 and cost.rows_at_once(2, 100, 30) == 2
    assert cost.rows_at_once(10, 1, 30) == 1 and cost.rows_at_once(10, 1, 30, least=2) == 2
    assert cost.bytes_per_row(7, 5, 11) == 7 + 10 + 33
