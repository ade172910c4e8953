"""A probe that asks for it sees the optimizer as it was before the step whose update it is shown; no other run pays
for the copy, and the run goes on as if nobody had looked."""

from __future__ import annotations

import pytest
import torch

from hessprobe.instruments.row_variables import MEASUREMENT_VARIABLES
from hessprobe.instruments.snapshot import Probe, Row, Snapshot
from hessprobe.optimization.baselines import FirstOrderOptimizer
from hessprobe.optimization.gauss_newton import GaussNewton
from hessprobe.optimization.place import Place
from hessprobe.optimization.running import running_optimizer
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.schema.table import Table
from hessprobe.training import loop
from tests import models
from tests.instruments.preconditioner.asking import directions
from tests.training.runs import recipe, state


class Looking(Probe):
    """A probe that keeps the snapshots it is shown."""

    name, every, sequences = "looking", 2, 1

    def __init__(self, needs_optimizer: bool) -> None:
        self.needs_optimizer = needs_optimizer
        self.seen: list[Snapshot] = []

    def table(self, partition: Partition) -> Table:
        return Table(name=self.name, variables=MEASUREMENT_VARIABLES, coordinates={})

    def measure(self, snapshot: Snapshot) -> Row:
        self.seen.append(snapshot)
        names = {v.name for v in MEASUREMENT_VARIABLES} - {"seconds", "peak_memory"}
        return {**dict.fromkeys(names, 1.0), "symmetry_gap": 0.0}

    def cost(self, partition: Partition) -> float:
        return 0.0


def trained(tmp_path, monkeypatch, *settings: str, needs_optimizer: bool = True) -> Looking:
    """Returns what a probe saw in a tiny run without clipping, one step of AdamW a minibatch before its own optimizer."""
    probe = Looking(needs_optimizer)
    monkeypatch.setattr(loop, "build_probes", lambda _: [probe])
    given = ("training.steps=5", "optimizer.clip=0", "optimizer.schedule=constant", *settings)
    loop.train(recipe(tmp_path / "run", *given), tmp_path / "run")
    return probe


def training_batches(snapshot: Snapshot, monkeypatch, tmp_path, *settings: str) -> list:
    """Returns the minibatches of the step that the snapshot was taken before."""
    made = recipe(tmp_path / "run", "training.steps=5", *settings)
    corpus = loop.open_corpus(made)
    count, each = made.optimizer.minibatches, made.optimizer.sequences
    return [
        corpus.batch(seed=made.seed, step=snapshot.step * count + i, sequences=each, stream="train")
        for i in range(count)
    ]


@pytest.mark.parametrize("name", ["adamw", "muon", "soap"])
def test_the_state_is_that_before_the_step_and_its_step_is_the_update(tmp_path, monkeypatch, name):
    settings = (f"optimizer.name={name}", "optimizer.learning_rate=0.03", "optimizer.weight_decay=0")
    seen = trained(tmp_path, monkeypatch, *settings).seen
    assert [s.step for s in seen] == [0, 2, 4]
    assert seen[0].optimizer is not None and seen[0].optimizer.solver == "adamw"  # the warm-up
    for snapshot in seen[1:]:
        running = snapshot.optimizer
        assert running is not None and running.solver == name and snapshot.update is not None
        batches = training_batches(snapshot, monkeypatch, tmp_path, *settings)
        gradient = snapshot.objective.gradient(batches, snapshot.partition, snapshot.named_parameters)[1]
        place = Place(
            objective=snapshot.objective,
            partition=snapshot.partition,
            parameters=snapshot.parameters,
            batches=batches,
            gradient=gradient,
        )
        candidate = "adam" if name == "adamw" else name
        (found,) = directions(candidate, place, [0.1], generator=snapshot.generator("test"), running=running)
        # The update is a difference of thetas in float32.
        torch.testing.assert_close(0.03 * found.vector, snapshot.update, rtol=1e-4, atol=1e-6)
        assert float(snapshot.update.abs().max()) > 1e-3


def test_gauss_newton_runs_under_no_candidates_name(tmp_path, monkeypatch):
    warm, *rest = trained(tmp_path, monkeypatch, "optimizer.name=full_gn").seen
    assert warm.optimizer is not None and warm.optimizer.solver == "adamw"
    assert rest and all(s.optimizer is not None and s.optimizer.solver == "" for s in rest)


def test_nothing_is_copied_where_no_probe_asks(tmp_path, monkeypatch):
    def copied(_: object) -> None:
        raise AssertionError("copied for nobody")

    monkeypatch.setattr(loop, "running_optimizer", copied)
    seen = trained(tmp_path, monkeypatch, "optimizer.name=adamw", needs_optimizer=False).seen
    assert len(seen) == 3 and all(s.optimizer is None for s in seen)


@pytest.mark.parametrize("name", ["soap", "shampoo", "sophia", "kfac"])
def test_a_run_that_is_looked_at_ends_in_the_same_weights(tmp_path, monkeypatch, name):
    ends = []
    for needs in (False, True):
        folder = tmp_path / str(needs)
        trained(folder, monkeypatch, f"optimizer.name={name}", needs_optimizer=needs)
        ends.append(state(folder / "run"))
    assert torch.equal(ends[0]["parameters"], ends[1]["parameters"])
    torch.testing.assert_close(ends[0]["optimizer"], ends[1]["optimizer"], rtol=0, atol=0)


@pytest.mark.parametrize("solver", ["adamw", "soap", "shampoo", "sophia", "kfac", "ekfac"])
def test_the_copy_stays_as_it_is_while_the_run_goes_on(solver):
    problem = models.ZOO["decoder_ragged"](models.seeded(7))
    partition = Partition.of(problem.model)
    optimizer = FirstOrderOptimizer(Objective(problem.model), partition, solver=solver, learning_rate=0.01)
    optimizer.step(list(problem.batches))
    one, same = running_optimizer(optimizer), running_optimizer(optimizer)
    assert one is not None and same is not None and one.solver == solver
    torch.testing.assert_close(one.state, same.state, rtol=0, atol=0)
    optimizer.step(list(problem.batches))
    torch.testing.assert_close(one.state, same.state, rtol=0, atol=0)
    later = running_optimizer(optimizer)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(one.state, later.state, rtol=0, atol=0)  # type: ignore[union-attr]


def test_what_is_known_of_a_run_is_said():
    problem = models.ZOO["decoder_ragged"](models.seeded(7))
    objective, partition = Objective(problem.model), Partition.of(problem.model)
    kfac = FirstOrderOptimizer(
        objective, partition, solver="kfac", learning_rate=1.0, damping=0.3, trust=0.02, refresh=4
    )
    found = running_optimizer(kfac)
    assert found is not None and (found.refresh, found.damping, found.trust) == (4, 0.3, 0.02)
    assert running_optimizer(torch.optim.SGD(problem.model.parameters(), lr=0.1)) is None
    gauss_newton = running_optimizer(GaussNewton(problem.model, objective, partition=partition))
    assert gauss_newton is not None and gauss_newton.solver == ""
