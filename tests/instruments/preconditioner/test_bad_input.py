"""What goes wrong in one candidate or one batch is told where it happened, and spoils nothing else of a run."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.instruments.preconditioner.measure import site as preconditioner_site
from hessprobe.instruments.preconditioner.measure.candidates.candidate import (
    Candidate,
    Directions,
    Occasion,
    for_every_damping,
)
from hessprobe.instruments.preconditioner.measure.probe import PreconditionerProbe
from hessprobe.instruments.preconditioner.recipe import PreconditionerRecipe
from hessprobe.instruments.snapshot import Row, Snapshot
from hessprobe.measuring.row_recorder import ProbeRecorder
from hessprobe.optimization.place import Direction
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.store.reader import open_run
from hessprobe.store.writer import RunWriter
from tests.instruments.preconditioner.truth import problem, snapshot_of
from tests.models import Problem, labels, real, redraw, seeded


def recipe(**given: Any) -> PreconditionerRecipe:
    values = {
        "curvature_sequences": (2, 3), "held_out_sequences": 3, "folds": 3, "dampings": (0.5, 0.1),
        "candidates": ("gradient", "layerwise_gn"), "cg_iterations": 60, "cg_tolerance": 1e-9, **given,
    }  # fmt: skip
    return PreconditionerRecipe(**values)


@cache
def case() -> tuple[Problem, Partition]:
    found = problem("layernorm", 9)
    return found, Partition.of(found.model, "module")


def snapshot(**given: Any) -> Snapshot:
    return snapshot_of(*case(), **given)


def measured(candidates: dict[str, Any] | None = None, **given: Any) -> tuple[Row, list[str]]:
    probe = PreconditionerProbe(recipe(**given), candidates)
    return probe.measure(snapshot()), list(probe.candidates.names)


# -- candidates that fail ----------------------------------------------------------------------------------


def raising(gradient: Tensor, at: Snapshot) -> Tensor:
    if len(at.batches[0][0]) == 3:
        raise ArithmeticError("no square root")
    return -gradient


FAILING = {
    "raises on the larger batch": (raising, r"draw 0, 3 sequences: ArithmeticError: no square root"),
    "NaN": (lambda g, _: g * torch.nan, "draw 0, 2 sequences: .* the direction holds NaN or infinity"),
    "zero": (lambda g, _: 0 * g, "draw 0, 2 sequences: the direction is zero"),
    "another shape": (lambda g, _: g[:2], r"wanted a direction \(\d+,\), got \(2,\)"),
    "not a tensor": (lambda g, _: 1.0, "wanted a direction, a tensor .* got float"),
}


@pytest.mark.parametrize("which", FAILING)
def test_a_candidate_that_fails_says_why_and_the_others_stand(which):
    function, reason = FAILING[which]
    alone, _ = measured()
    row, names = measured({"mine": function})
    assert names == ["gradient", "layerwise_gn", "mine"]
    assert list(row["candidate_failure"][:2]) == ["", ""]
    assert re.search(reason, row["candidate_failure"][2])
    for variable in ("efficiency", "slope_held_out"):
        np.testing.assert_array_equal(row[variable][:, :2], alone[variable])
    np.testing.assert_array_equal(row["block_curvature"][:2], alone["block_curvature"])
    sound = [0] if which.startswith("raises") else []
    missing = [i for i in range(2) if i not in sound]
    assert np.isnan(row["efficiency"][0, 2, missing]).all() and np.isnan(row["block_slope"][2]).all()
    assert np.isfinite(row["efficiency"][0, 2, sound]).all()


def test_an_inverse_that_is_not_positive_definite_leaves_the_rest_of_the_candidate():
    def answer(asked: Occasion) -> Directions:
        odd = Direction(vector=-asked.place.gradient, inverse=lambda rows: -rows)
        return for_every_damping(asked, odd)

    row, _ = measured({"odd": Candidate(answer=answer, linear=True)}, condition_steps=3)
    assert (
        "condition number: conditioning: the preconditioner's inverse is not positive definite"
        in (row["candidate_failure"][2])
    )
    assert np.isnan(row["condition"][2]).all() and np.isfinite(row["efficiency"][:, 2]).all()


def test_what_a_candidate_writes_into_is_its_own():
    def writing(gradient: Tensor, at: Snapshot) -> Tensor:
        at.parameters.zero_()
        return gradient.neg_()

    alone, _ = measured()
    found = snapshot()
    before = found.parameters.clone()
    row = PreconditionerProbe(recipe(), {"writing": writing}).measure(found)
    assert torch.equal(found.parameters, before)
    np.testing.assert_array_equal(row["efficiency"][:, :2], alone["efficiency"])
    np.testing.assert_allclose(row["efficiency"][:, 2], alone["efficiency"][:, 0], rtol=1e-12)


def test_without_a_known_step_that_candidate_says_so():
    probe = PreconditionerProbe(recipe(candidates=("update", "gradient")))
    row = probe.measure(snapshot(update=None))
    assert row["candidate_failure"][0].endswith("the optimizer's step is not known at this moment")
    assert np.isnan(row["efficiency"][:, 0]).all() and np.isfinite(row["efficiency"][:, 1]).all()


def test_an_unfinished_solve_is_stored_with_its_residual():
    row, _ = measured(cg_iterations=1)
    assert (row["optimal_residual"] > 1e-3).all() and (row["optimal_residual_held_out"] > 1e-3).all()
    assert (row["solver_residual"][:, 1] > 1e-3).all() and (row["solver_iterations"][:, 1] == 1).all()
    assert np.isfinite(row["efficiency"]).all()


# -- batches that cannot be taken --------------------------------------------------------------------------


# Recipe, and what a batch of 9 sequences has of it: draws, sizes, held-out sequences, of a recipe of its own.
FEWER = {
    "draws": ({"draws": 2, "held_out_sequences": 4}, (1, [2, 3], 4)),
    "sizes": ({"curvature_sequences": (2, 3, 6), "held_out_sequences": 6}, (1, [2, 3], 6)),
    "held out": ({"curvature_sequences": (3,), "held_out_sequences": 9, "folds": 9}, (1, [2], 7)),
    "below the smallest": (
        {"curvature_sequences": (20, 40), "held_out_sequences": 40, "folds": 8},
        (1, [4], 5),
    ),
}


@pytest.mark.parametrize("what", FEWER)
def test_fewer_sequences_than_laid_out_are_measured_as_a_recipe_of_that_size_and_said_once(what, caplog):
    given, (draws, sizes, held_out) = FEWER[what]
    given = {"draws": 1, **given}
    probe = PreconditionerProbe(recipe(**given))
    row, _ = probe.measure(snapshot()), probe.measure(snapshot())
    folds = min(probe.recipe.folds, held_out)
    own, _ = measured(
        **{
            **given,
            "draws": draws,
            "curvature_sequences": sizes,
            "held_out_sequences": held_out,
            "folds": folds,
        }
    )
    read = row["curvature_sequences_read"]
    assert read[: len(sizes)].tolist() == sizes and np.isnan(read[len(sizes) :]).all()
    assert row["held_out_sequences_read"] == held_out
    assert row["sequences"] == 9 and own["gradient_equivalents"] == pytest.approx(row["gradient_equivalents"])
    for name in ("efficiency", "efficiency_held_out", "efficiency_held_out_stderr"):
        np.testing.assert_allclose(row[name][:draws, :, : len(sizes)], own[name], rtol=1e-6)
        assert np.isnan(row[name][draws:]).all() and np.isnan(row[name][:, :, len(sizes) :]).all()
    np.testing.assert_allclose(row["block_efficiency"], own["block_efficiency"], rtol=1e-6)
    np.testing.assert_allclose(row["fold_tokens"][:folds], own["fold_tokens"])
    assert (
        not row["fold_tokens"][folds:].any()
        and not row["slope_held_out"][:draws, :, : len(sizes), :, folds:].any()
    )
    (said,) = [record.getMessage() for record in caplog.records]
    assert "9 sequences in this batch, and " in said and "curvature_sequences_read" in said


def test_a_single_sequence_is_refused():
    one = snapshot()
    with pytest.raises(UserError, match="1 sequence in this batch, and it needs at least 2"):
        PreconditionerProbe(recipe()).measure(replace(one, batches=[tuple(x[:1] for x in one.batches[0])]))


class Crowd(nn.Module):
    """A sequence that looks at the rest of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x - x.mean(0))


@pytest.mark.parametrize("why", ["sequences see each other", "read by a function of the user's"])
def test_a_batch_that_cannot_be_cut_is_refused_and_one_that_need_not_be_is_taken(why):
    g = seeded(3)
    model = redraw(Crowd() if "see" in why else nn.Sequential(nn.Linear(4, 4)), g)
    parts = [(real(g, n, 4), labels(g, 4, n)) for n in (2, 1, 3)]
    whole = tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))
    crowding = None if "see" in why else lambda model, batch: model(batch[0] - batch[0].mean(0))
    objective = Objective(model, forward=crowding)
    partition, probe = Partition.of(model, "module"), PreconditionerProbe(recipe())
    at = snapshot_of(Problem(model, parts, "cross_entropy"), partition, objective=objective)
    with pytest.raises(UserError, match="this batch of 6 sequences cannot be cut"):
        probe.measure(replace(at, batches=[whole]))
    assert np.isfinite(probe.measure(at)["efficiency"]).all()


def test_any_division_into_micro_batches_gives_the_same_row():
    probe, (inputs, targets) = PreconditionerProbe(recipe(draws=2)), case()[0].batches[0]
    row = probe.measure(snapshot())
    for sizes in ((4, 5), (1, 1, 7)):
        parts = list(zip(inputs.split(sizes), targets.split(sizes), strict=True))
        again = probe.measure(snapshot(batches=parts))
        for variable in ("efficiency", "slope_held_out", "block_curvature_held_out", "fold_tokens"):
            np.testing.assert_allclose(again[variable], row[variable], rtol=1e-7, atol=1e-12)


def test_one_held_out_sequence_has_figures_and_no_error():
    row, _ = measured(held_out_sequences=1)
    assert row["slope_held_out"].shape[-1] == 1 and np.isfinite(row["efficiency_held_out"]).all()
    assert np.isnan(row["efficiency_held_out_stderr"]).all()


@pytest.mark.parametrize("damping", [0.0, -0.1])
def test_dampings_are_above_zero(damping):
    with pytest.raises(ValidationError, match="greater than 0"):
        recipe(dampings=(damping,))


class Flat(nn.Module):
    """Outputs that do not depend on the parameters at zero, but have curvature elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a * self.b


@pytest.mark.parametrize("failure", ["zero gradient", "NaN"])
def test_a_row_that_cannot_be_measured_is_marked_and_the_next_one_is_measured(tmp_path, failure):
    good, probe = snapshot(), PreconditionerProbe(recipe(every=3), {"mine": raising})
    if failure == "NaN":
        bad = replace(good, step=3, parameters=torch.full_like(good.parameters, torch.nan))
    else:
        model = Flat().double()
        batch = (real(seeded(1), 9, 3), labels(seeded(2), 3, 9))
        flat = Partition.of(model, lambda name: "module")
        bad = replace(good, step=3, objective=Objective(model), partition=flat, parameters=flat.vector(model),
                      batches=[batch], update=None)  # fmt: skip
    reason = "the gradient is zero" if failure == "zero gradient" else "the loss is nan"
    with RunWriter.create(tmp_path, {}) as writer:
        held = ProbeRecorder(writer, [probe], good.partition, steps=9)
        assert held.record(probe, replace(good, step=0)).failure == ""
        found = held.record(probe, bad)
        assert found.row is None and reason in found.failure
        assert held.record(probe, replace(good, step=6)).failure == ""
    table = open_run(tmp_path)["preconditioner"]
    assert list(np.asarray(table["candidate_failure"].sel(step=0))) == [
        "", "", "draw 0, 3 sequences: ArithmeticError: no square root",
    ]  # fmt: skip
    assert bool(np.isnan(table["efficiency"].sel(step=3)).all())
    np.testing.assert_allclose(
        table["efficiency"].sel(step=6, candidate="gradient"), measured()[0]["efficiency"][:, 0], rtol=1e-12
    )


# -- recipes that do not fit -------------------------------------------------------------------------------


def test_functions_are_imported_by_name_and_mistakes_are_told_at_once():
    here = "tests.instruments.preconditioner.test_bad_input"
    probe = PreconditionerProbe(recipe(candidates=("gradient", f"{here}:raising")))
    assert probe.candidates.names == ("gradient", "raising")
    assert "no square root" in probe.measure(snapshot())["candidate_failure"][1]
    for wrong, reason in {
        "no_such_package.x:f": "No module named 'no_such_package'",
        f"{here}:no_such_function": "no attribute 'no_such_function'",
        f"{here}:FAILING": "is a dict; wanted a function",
    }.items():
        with pytest.raises(UserError, match=reason):
            PreconditionerProbe(recipe(candidates=(wrong,)))
    with pytest.raises(UserError, match="names of their own, and gradient exist"):
        PreconditionerProbe(recipe(), {"gradient": raising})


def test_groupings_that_do_not_fit_the_blocks_are_told_before_anything_is_measured():
    partition = case()[1]
    with pytest.raises(UserError, match=r"9 groups of 3 blocks: give at most as many"):
        PreconditionerProbe(recipe(groups=(9,))).table(partition)
    with pytest.raises(UserError, match="no block named 'tail'"):
        PreconditionerProbe(recipe(groupings={"odd": (("tail",),)})).table(partition)


# -- what a measurement leaves alone, and what it costs ----------------------------------------------------


def test_the_model_its_mode_and_torchs_generators_stay_as_they_are():
    found = copy.deepcopy(case()[0])
    found.model.train()
    before = {name: x.clone() for name, x in found.model.state_dict().items()}
    state = torch.get_rng_state()
    names = ("adam", "sophia", "muon", "soap", "kfac", "ekfac", "diagonal_gn")
    PreconditionerProbe(recipe(candidates=names)).measure(snapshot_of(found, case()[1]))
    assert found.model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in found.model.state_dict().items())
    assert all(not module._forward_hooks and not module._backward_hooks for module in found.model.modules())
    assert all(p.grad is None for p in found.model.parameters())


def test_it_measures_at_the_snapshots_parameters_and_depends_on_seed_and_step_alone():
    found, partition = copy.deepcopy(case()[0]), case()[1]
    names = ("gradient", "kfac", "full_gn")
    at = snapshot_of(found, partition)
    first = PreconditionerProbe(recipe(candidates=names)).measure(at)
    partition.assign(found.model, at.parameters + 1)
    again = PreconditionerProbe(recipe(candidates=names)).measure(at)
    np.testing.assert_array_equal(first["efficiency"], again["efficiency"])
    other = PreconditionerProbe(recipe(candidates=names)).measure(replace(at, step=4))
    np.testing.assert_array_equal(first["efficiency"][:, [0, 2]], other["efficiency"][:, [0, 2]])
    assert not np.array_equal(first["efficiency"][:, 1], other["efficiency"][:, 1])  # sampled labels


def test_a_row_costs_at_most_what_was_foreseen_and_nearly_that():
    names = ("gradient", "update", "adam", "muon", "soap", "kfac", "diagonal_gn", "layerwise_gn", "full_gn")
    probe = PreconditionerProbe(
        recipe(candidates=names, groups=(2,), draws=2, cg_iterations=4, condition_steps=2)
    )
    row, foreseen = probe.measure(snapshot()), probe.cost(case()[1])
    assert 0.85 * foreseen < row["gradient_equivalents"] <= foreseen
    assert probe.vectors(case()[1]) > 10 and probe.needs_optimizer


def test_directions_are_judged_once_whatever_the_dampings(monkeypatch):
    calls: list[tuple[int, int]] = []
    real_one = preconditioner_site.curvature_along

    def noted(operator: Any, d: Tensor, **options: Any) -> Any:
        calls.append((options["folds"], len(options["groups"])))
        return real_one(operator, d, **options)

    monkeypatch.setattr(preconditioner_site, "curvature_along", noted)
    PreconditionerProbe(recipe(candidates=("gradient", "update"))).measure(snapshot())
    optima = [(3, 1)] * 2 + [(1, 1)] * 4 + [(1, 3)]
    # On the smaller batch whole, on the larger by block; the update is the same on the held-out one.
    candidates = [(1, 1)] * 2 + [(1, 3)] * 2 + [(3, 1)] * 2 + [(3, 3)] * 2
    assert sorted(calls) == sorted(optima + candidates)
