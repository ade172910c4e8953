"""Slope and curvature along directions equal the dense ones, for any groups of blocks and any part of the sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from hessprobe.curvature.along import curvature_along
from hessprobe.curvature.gauss_newton import GaussNewton
from hessprobe.errors import UserError
from tests import models, oracles
from tests.cases import SEED, Case
from tests.curvature.awkward_models import AWKWARD, awkward

EXACT = 1e-10
SOME = ("mlp_regression", "custom_loss", "decoder_swiglu_layernorm", "decoder_tied")
Zoo = Callable[[str], Case]


def pairs(matrix: Tensor, d: Tensor, slices: list[slice]) -> Tensor:
    """Returns d_i . A_ij d_j, dense."""
    return torch.stack([torch.stack([d[i] @ matrix[i, j] @ d[j] for j in slices]) for i in slices])


@pytest.mark.parametrize("keep", [0, 2**30])
@pytest.mark.parametrize("name", SOME)
def test_blocks_equal_the_dense_truth_and_make_up_the_whole(zoo_case: Zoo, name: str, keep: int) -> None:
    case = zoo_case(name)
    operator, d = case.gauss_newton().linearised(keep), case.rows(2)
    found = curvature_along(operator, d)
    assert found.slope.shape == (2, 1, len(case.slices)) and int(found.tokens) == case.truth.tokens
    whole = curvature_along(operator, d, groups=[case.partition.blocks])
    for i in range(2):
        wanted = torch.stack([case.truth.gradient[where] @ d[i, where] for where in case.slices])
        assert oracles.relative_error(found.slope[i, 0], wanted) < EXACT
        dense = pairs(case.truth.gauss_newton, d[i], case.slices)
        assert oracles.relative_error(found.curvature[i, 0], dense) < EXACT
        assert float(whole.slope[i]) == pytest.approx(float(wanted.sum()), rel=1e-10)
        assert float(whole.curvature[i]) == pytest.approx(float(dense.sum()), rel=1e-10)


def test_groups_take_blocks_together(zoo_case: Zoo) -> None:
    case = zoo_case("repeated_module")
    d, (first, *middle, last) = case.rows(1), case.partition.blocks
    apart = curvature_along(case.gauss_newton(), d).curvature[0, 0]
    found = curvature_along(case.gauss_newton(), d, groups=[middle, (last, first)]).curvature[0, 0]
    inner, outer = list(range(1, 1 + len(middle))), [0, len(middle) + 1]
    rows = [[apart[a][:, b].sum() for b in (inner, outer)] for a in (inner, outer)]
    torch.testing.assert_close(found, torch.stack([torch.stack(row) for row in rows]))


@cache
def singles() -> tuple[Case, list[oracles.Dense]]:
    """Returns a case of micro-batches of 3 and 1 rows, one target ignored, and the truth of every row alone."""
    problem, g = models.mlp_classifier(models.seeded(SEED)), models.seeded(2)
    batches = [(models.real(g, n, 4), models.labels(g, 5, n)) for n in (3, 1)]
    batches[0][1][1] = models.IGNORED
    case = Case.on(problem._replace(batches=batches))
    rows = [(x[None], y[None]) for batch in batches for x, y in zip(*batch, strict=True)]
    rows = [(x, y) for x, y in rows if int(y) != models.IGNORED]
    alone = [oracles.dense(problem.model, [one], "cross_entropy") for one in rows]
    return case, [truth.in_order(case.partition.names) for truth in alone]


@pytest.mark.parametrize("folds", [1, 2, 3, 4])
@pytest.mark.parametrize("cut", [False, True])
def test_folds_are_the_sequences_own_parts(monkeypatch: pytest.MonkeyPatch, folds: int, cut: bool) -> None:
    case, alone = singles()
    if cut:
        monkeypatch.setattr(GaussNewton, "FILLS_CPU", 1)
    (d,) = case.rows(1)
    found = curvature_along(case.gauss_newton(), d[None], folds=folds)
    own = dict(zip((0, 2, 3), alone, strict=True))  # the second row carries no target
    for f in range(folds):
        mine = [truth for i, truth in own.items() if i * folds // 4 == f]
        assert int(found.tokens[f]) == len(mine)
        slope, curvature = torch.zeros_like(found.slope[0, f]), torch.zeros_like(found.curvature[0, f])
        for truth in mine:
            slope += torch.stack([truth.gradient[where] @ d[where] for where in case.slices]) / 3
            curvature += pairs(truth.gauss_newton, d, case.slices) / 3
        torch.testing.assert_close(found.slope[0, f], slope, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(found.curvature[0, f], curvature, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", AWKWARD.values(), ids=AWKWARD)
def test_models_without_forward_mode_have_them_too(generator: Callable, kind: type) -> None:
    case = awkward(kind, generator)
    d = case.rows(1)
    found = curvature_along(case.gauss_newton(), d).curvature[0, 0]
    assert oracles.relative_error(found, pairs(case.truth.gauss_newton, d[0], case.slices)) < EXACT


def test_a_direction_that_is_not_finite_spoils_no_other(zoo_case: Zoo) -> None:
    case = zoo_case("mlp_regression")
    d = case.rows(3)
    d[1, 0] = torch.nan
    found, alone = (curvature_along(case.gauss_newton(), rows, folds=2) for rows in (d, d[[0, 2]]))
    assert found.slope[1].isnan().all() and found.curvature[1].isnan().all()
    torch.testing.assert_close(found.slope[[0, 2]], alone.slope)
    torch.testing.assert_close(found.curvature[[0, 2]], alone.curvature)
    only_nan = curvature_along(case.gauss_newton(), d[1:2])
    assert only_nan.slope.isnan().all() and int(only_nan.tokens) == case.truth.tokens


def test_mistakes_are_told_with_the_way_out(zoo_case: Zoo) -> None:
    case = zoo_case("decoder_tied")
    operator, d = case.gauss_newton(), case.rows(1)
    with pytest.raises(UserError, match=r"d\[None\]"):
        curvature_along(operator, d[0])
    with pytest.raises(UserError, match="wanted 1 to 2, the batch's sequences, got 3"):
        curvature_along(operator, d, folds=3)
    with pytest.raises(UserError, match="'tail'"):
        curvature_along(operator, d, groups=[("tail",)])
