"""Every number of the table `preconditioner` is the dense one's to 1e-8, on batches no two of which are alike."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hessprobe.instruments.preconditioner.measure.probe import PreconditionerProbe
from hessprobe.instruments.preconditioner.recipe import PreconditionerRecipe
from hessprobe.instruments.snapshot import Row, Snapshot
from hessprobe.optimization.place import Place
from hessprobe.problem.partition import Partition
from tests.instruments.preconditioner.asking import BUILT, directions
from tests.instruments.preconditioner.truth import Dense, Truth, problem, snapshot_of

NAMES = ("layernorm", "decoder", "decoder_swiglu_layernorm", "decoder_tied")
SIZES, HELD_OUT, FOLDS, DAMPINGS = (1, 3), 3, 2, (0.5, 0.1)
EXACT = 1e-8
FOLD_OF = [i * FOLDS // HELD_OUT for i in range(HELD_OUT)]


def signs(gradient: Tensor, snapshot: Snapshot) -> Tensor:
    """A user's own candidate, not linear."""
    assert len(snapshot.batches[0][0]) in SIZES
    return -gradient.sign()


class Measured:
    """One row of a model, and the truth it has to equal."""

    def __init__(self, name: str, draws: int) -> None:
        case = problem(name, draws * SIZES[-1] + HELD_OUT)
        self.partition = Partition.of(case.model, "layer" if name.startswith("decoder") else "module")
        self.truth, self.draws = Truth(case, self.partition), draws
        self._sites: dict[tuple[int, int], Dense] = {}
        blocks = self.partition.blocks
        self.recipe = PreconditionerRecipe(
            curvature_sequences=SIZES, held_out_sequences=HELD_OUT, folds=FOLDS, draws=draws, dampings=DAMPINGS,
            candidates=("gradient", "update", "layerwise_gn", "full_gn"), groups=(2,),
            groupings={"ends": ((blocks[0], blocks[-1]), *((b,) for b in blocks[1:-1]))},
            cg_iterations=600, cg_tolerance=1e-11,
        )  # fmt: skip
        self.probe = PreconditionerProbe(self.recipe, {"signs": signs})
        self.snapshot = snapshot_of(case, self.partition)
        self.row = self.probe.measure(self.snapshot)
        self.table = self.probe.table(self.partition)
        self.names = list(self.table.coordinates["candidate"])
        first = draws * SIZES[-1]
        self.held_out = self.truth.over(range(first, first + HELD_OUT))
        self.folds = [
            self.truth.over([first + i for i in range(HELD_OUT) if FOLD_OF[i] == f]) for f in range(FOLDS)
        ]

    def site(self, draw: int, size: int) -> Dense:
        if (draw, size) not in self._sites:
            first = draw * SIZES[-1]
            self._sites[draw, size] = self.truth.over(range(first, first + size))
        return self._sites[draw, size]

    def direction(self, name: str, site: Dense, mu: float) -> Tensor:
        layers = len(self.partition)
        groups = {
            "layerwise_gn": [[i] for i in range(layers)],
            "full_gn": [list(range(layers))],
            "grouped_gn_2": [list(range((layers + 1) // 2)), list(range((layers + 1) // 2, layers))],
            "grouped_gn_ends": [[0, layers - 1], *([i] for i in range(1, layers - 1))],
        }
        if name in groups:
            return site.solved(mu, groups[name])
        return {"gradient": -site.gradient, "update": self.snapshot.update, "signs": -site.gradient.sign()}[
            name
        ]

    def cells(self):
        """Yields every (draw, candidate, size, damping) with its site, damping and direction."""
        for draw in range(self.draws):
            for c, name in enumerate(self.names):
                for s, size in enumerate(SIZES):
                    for m, mu in enumerate(DAMPINGS):
                        site = self.site(draw, size)
                        yield (draw, c, s, m), site, mu, self.direction(name, site, mu)


@cache
def measured(name: str) -> Measured:
    return Measured(name, draws=2 if name == "layernorm" else 1)


def close(found: Any, wanted: Any, scale: float | None = None) -> bool:
    found, wanted = np.asarray(found, dtype=float), np.asarray(wanted, dtype=float)
    assert found.shape == wanted.shape
    return bool((np.abs(found - wanted) <= EXACT * (np.abs(wanted).max() if scale is None else scale)).all())


@pytest.mark.parametrize("name", NAMES)
def test_figures_on_the_batch_a_candidate_was_built_on(name):
    m = measured(name)
    for at, site, mu, d in m.cells():
        damped = site.curvature(d) + mu * float(d @ d)
        wanted = {
            "slope": site.slope(d), "curvature": site.curvature(d), "norm2": float(d @ d),
            "efficiency": site.efficiency(d, mu), "best_alpha": -site.slope(d) / damped,
            "cosine": site.cosine(d, mu),
        }  # fmt: skip
        for variable, value in wanted.items():
            scale = 1.0 if variable in ("cosine", "efficiency") else None
            assert close(m.row[variable][at], value, scale), (variable, at)
        assert 0 <= m.row["efficiency"][at] <= 1 + EXACT


@pytest.mark.parametrize("name", NAMES)
def test_figures_on_held_out_sequences_and_their_folds(name):
    m = measured(name)
    tokens = np.array([fold.tokens for fold in m.folds])
    share = tokens / tokens.sum()
    assert close(m.row["fold_tokens"], tokens) and m.held_out.tokens == tokens.sum()
    assert m.row["loss_held_out"] == pytest.approx(m.held_out.loss, rel=1e-10)
    for at, _, mu, d in m.cells():
        slope = share * [fold.slope(d) for fold in m.folds]
        curvature = share * [fold.curvature(d) for fold in m.folds]
        assert close(m.row["slope_held_out"][at], slope) and close(m.row["curvature_held_out"][at], curvature)
        wanted = m.held_out.efficiency(d, mu)
        assert close(m.row["efficiency_held_out"][at], wanted, 1.0)
        assert 0 <= m.row["efficiency_held_out"][at] <= 1 + EXACT
        # Leaving a fold out is the batch of the others; the optimum stays.
        optimum = -m.held_out.slope(m.held_out.full(mu))
        left = []
        for f in range(FOLDS):
            others = [i for i in range(FOLDS) if i != f]
            weight = tokens[others] / tokens[others].sum()
            s = weight @ [m.folds[i].slope(d) for i in others]
            c = weight @ [m.folds[i].curvature(d) for i in others]
            left.append(s**2 / (c + mu * float(d @ d)) / optimum)
        stderr = np.sqrt((FOLDS - 1) / FOLDS * ((np.array(left) - np.mean(left)) ** 2).sum())
        assert close(m.row["efficiency_held_out_stderr"][at], stderr, 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_optima_and_the_solves_behind_them(name):
    m = measured(name)
    for i, mu in enumerate(DAMPINGS):
        optimum = -m.held_out.slope(m.held_out.full(mu)) / 2
        assert close(m.row["optimal_decrease_held_out"][i], optimum)
        for draw in range(m.draws):
            for s, size in enumerate(SIZES):
                site = m.site(draw, size)
                assert close(m.row["optimal_decrease"][draw, s, i], -site.slope(site.full(mu)) / 2)
    for variable in ("optimal_residual", "optimal_residual_held_out"):
        assert float(np.max(m.row[variable])) < 1e-9
    solves = [i for i, candidate in enumerate(m.names) if "_gn" in candidate]
    others = [i for i in range(len(m.names)) if i not in solves]
    for variable in ("solver_residual", "solver_iterations"):
        assert np.isnan(m.row[variable][:, others]).all()
    assert float(m.row["solver_residual"][:, solves].max()) < 1e-9
    assert float(m.row["solver_iterations"][:, solves].min()) > 2


@pytest.mark.parametrize("name", NAMES)
def test_figures_block_by_block(name):
    m = measured(name)
    site, mu = m.site(0, SIZES[-1]), DAMPINGS[0]
    oracle = m.direction("layerwise_gn", site, mu)
    tokens = np.array([fold.tokens for fold in m.folds])
    for c, candidate in enumerate(m.names):
        d = m.direction(candidate, site, mu)
        slope, curvature = site.by_block(d)
        norm2 = torch.stack([d[i] @ d[i] for i in site.slices])
        assert close(m.row["block_slope"][c], slope) and close(m.row["block_curvature"][c], curvature)
        assert close(m.row["block_norm2"][c], norm2)
        optimum = -site.by_block(oracle)[0]
        efficiency = slope**2 / ((curvature.diagonal() + mu * norm2) * optimum)
        assert close(m.row["block_efficiency"][c], efficiency, 1.0)
        for f, fold in enumerate(m.folds):
            share = tokens[f] / tokens.sum()
            slope, curvature = fold.by_block(d)
            assert close(m.row["block_slope_held_out"][c, :, f], share * slope)
            assert close(m.row["block_curvature_held_out"][c, :, :, f], share * curvature)
    layerwise = m.names.index("layerwise_gn")
    assert close(m.row["block_efficiency"][layerwise], np.ones(len(m.partition)), 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_full_gauss_newton_is_best_on_its_own_batch_and_layerwise_block_by_block(name):
    m = measured(name)
    full = m.names.index("full_gn")
    assert close(m.row["efficiency"][:, full], np.ones((m.draws, len(SIZES), len(DAMPINGS))), 1.0)
    # Groups that leave nothing out are full Gauss-Newton too: of two blocks, the first and the last.
    others = [i for i, name in enumerate(m.names) if name not in ("full_gn", "grouped_gn_ends")]
    assert (m.row["efficiency"][:, others] < 1 - 1e-6).all()


@pytest.mark.parametrize("name", NAMES[:1])
def test_the_row_is_what_the_table_declares_and_says_how_it_was_measured(name):
    m = measured(name)
    assert {v.name for v in m.table.variables} == set(m.row) | {"seconds", "peak_memory"}
    for variable in m.table.variables:
        if variable.name in m.row:
            assert np.shape(m.row[variable.name]) == m.table.row_shape(variable), variable.name
    assert m.names == [*m.recipe.names, "signs"] and list(m.row["candidate_failure"]) == [""] * len(m.names)
    site = m.site(0, SIZES[-1])
    assert float(m.row["loss"]) == pytest.approx(site.loss, rel=1e-10)
    assert m.row["sequences"] == 2 * SIZES[-1] + HELD_OUT
    assert m.row["tokens"] == sum(m.truth.tokens) and m.row["symmetry_gap"] < 1e-12
    assert m.probe.name == m.table.name == "preconditioner" and m.probe.unit_sequences == SIZES[-1]


# -- candidates that are not solves ------------------------------------------------------------------------


def row_of(
    candidates: tuple[str, ...], name: str = "decoder_tied", **given: Any
) -> tuple[Row, Truth, Snapshot]:
    case = problem(name, 6)
    partition = Partition.of(case.model, "layer" if name.startswith("decoder") else "module")
    options = {"curvature_sequences": (3,), "held_out_sequences": 3, "folds": 3, "dampings": (0.1, 0.02),
               "cg_iterations": 400, "cg_tolerance": 1e-10, **given}  # fmt: skip
    probe = PreconditionerProbe(PreconditionerRecipe(candidates=candidates, **options))
    snapshot = snapshot_of(case, partition)
    return probe.measure(snapshot), Truth(case, partition), snapshot


def test_built_candidates_are_judged_by_their_own_directions():
    names = BUILT
    row, truth, snapshot = row_of(names)
    site, held_out = truth.over(range(3)), truth.over(range(3, 6))
    assert list(row["candidate_failure"]) == [""] * len(names)
    place = Place(
        objective=snapshot.objective, partition=snapshot.partition, parameters=snapshot.parameters,
        batches=[tuple(x[:3] for x in snapshot.batches[0])],
        gradient=snapshot.objective.gradient(tuple(x[:3] for x in snapshot.batches[0]), snapshot.partition)[1],
    )  # fmt: skip
    for c, name in enumerate(names):
        generator = snapshot.generator(f"preconditioner/{name}/0/3")
        found = directions(name, place, (0.1, 0.02), generator=generator)
        for i, mu in enumerate((0.1, 0.02)):
            d = found[i].vector
            assert close(row["efficiency"][0, c, 0, i], site.efficiency(d, mu), 1.0), name
            assert close(row["efficiency_held_out"][0, c, 0, i], held_out.efficiency(d, mu), 1.0), name
            assert close(row["cosine"][0, c, 0, i], site.cosine(d, mu), 1.0), name


def test_condition_numbers_of_linear_candidates_are_those_of_the_dense_matrices():
    row, truth, snapshot = row_of(
        ("gradient", "update", "diagonal_gn", "kfac"), "layernorm", condition_steps=200, dampings=(0.3, 0.05)
    )
    site, p = truth.over(range(3)), snapshot.partition.size
    place = Place(
        objective=snapshot.objective, partition=snapshot.partition, parameters=snapshot.parameters,
        batches=[tuple(x[:3] for x in snapshot.batches[0])], gradient=site.gradient,
    )  # fmt: skip
    for c, name in enumerate(("gradient", "update", "diagonal_gn", "kfac")):
        if name == "update":
            assert np.isnan(row["condition"][c]).all() and np.isnan(row["ritz_max"][c]).all()
            continue
        generator = snapshot.generator(f"preconditioner/{name}/0/3")
        found = directions(name, place, (0.3, 0.05), generator=generator)
        for i, mu in enumerate((0.3, 0.05)):
            invert = found[i].inverse
            assert invert is not None
            root = torch.linalg.cholesky(invert(torch.eye(p, dtype=torch.float64)))
            values = torch.linalg.eigvalsh(
                root.T @ (site.matrix + mu * torch.eye(p, dtype=torch.float64)) @ root
            )
            assert row["ritz_max"][c, i] == pytest.approx(float(values[-1]), rel=1e-8)
            assert row["ritz_min"][c, i] == pytest.approx(float(values[0]), rel=1e-6)
            assert row["condition"][c, i] == pytest.approx(float(values[-1] / values[0]), rel=1e-6)


class Stretched:
    """Two rows whose curvature is diag(9, 1) and whose gradient is (1, 1), where steepest descent is worst."""

    low, high = 1.0, 9.0

    def __init__(self) -> None:
        from tests.models import Problem

        model = torch.nn.Linear(2, 1, bias=False).double()
        torch.nn.init.ones_(model.weight)
        x = torch.tensor([[2 * self.high, 0.0], [0.0, 2 * self.low]], dtype=torch.float64).sqrt()
        y = -torch.tensor([[2 / self.high], [2 / self.low]], dtype=torch.float64).sqrt()
        y = y + model(x).detach()
        self.case = Problem(model, [(torch.cat([x, x]), torch.cat([y, y]))], "squared_error")


def test_steepest_descent_reaches_the_kantorovich_value_where_it_is_worst():
    case = Stretched().case
    partition = Partition.of(case.model, "module")
    recipe = PreconditionerRecipe(
        curvature_sequences=(2,), held_out_sequences=2, dampings=(1e-12, 1.0), candidates=("gradient", "full_gn"),
        condition_steps=5, cg_tolerance=1e-12,
    )  # fmt: skip
    row = PreconditionerProbe(recipe).measure(snapshot_of(case, partition))
    for i, mu in enumerate((0.0, 1.0)):
        a, b = Stretched.low + mu, Stretched.high + mu
        assert row["efficiency"][0, 0, 0, i] == pytest.approx(4 * a * b / (a + b) ** 2, rel=1e-9)
        assert row["efficiency_held_out"][0, 0, 0, i] == pytest.approx(4 * a * b / (a + b) ** 2, rel=1e-9)
        assert row["best_alpha"][0, 0, 0, i] == pytest.approx(2 / (a + b), rel=1e-9)
        assert row["condition"][0, i] == pytest.approx(b / a, rel=1e-9)
        assert row["optimal_decrease"][0, 0, i] == pytest.approx((1 / a + 1 / b) / 2, rel=1e-9)
        assert row["efficiency"][0, 1, 0, i] == pytest.approx(1.0, rel=1e-9)
