"""Optimizers of several processes: the steps of one, and an error in one is an error in all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hessprobe.errors import UserError
from hessprobe.machine.processes import ALONE, PeerFailed, PeerOutOfMemory, PeerRefused, Processes
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.optimization import group_models
from hessprobe.optimization.baselines import FirstOrderOptimizer
from hessprobe.optimization.gauss_newton import GaussNewton
from hessprobe.optimization.report import StepReport
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.models import labels, redraw, seeded
from tests.processes import on_processes

pytestmark = pytest.mark.processes


STEPS = 3
GAUSS_NEWTON = {
    "full_gn": {},
    "layerwise_gn": {"structure": "layerwise", "damping": 0.1},
    "prox_linear": {"model": "prox-linear", "solver": "adamw"},
    "cg": {"solver": "cg", "damping": 0.1, "cg_iterations": 3},
}
FIRST_ORDER = ("adamw", "soap", "sophia", "kfac")
SOME = ("full_gn", "layerwise_gn", "cg", "adamw")  # by three processes


def batches(seed: int) -> list:
    """Returns minibatches of 1, 3 and 2 sequences: one of them leaves two processes of three without any."""
    g = seeded(seed)
    return [(torch.randint(7, (n, 4), generator=g), labels(g, 7, n, 4, ignore=0.2)) for n in (1, 3, 2)]


def problem(processes: Processes) -> tuple[Objective, Partition]:
    config = DecoderConfig(layers=1, width=8, feedforward=8, heads=2, vocabulary=7, context=4)
    model = redraw(Decoder(config, generator=seeded(1)), seeded(2))
    return Objective(model, processes=processes), Partition.of(model)


def optimizer(name: str, processes: Processes) -> GaussNewton | FirstOrderOptimizer:
    objective, partition = problem(processes)
    if name in GAUSS_NEWTON:
        options = {"learning_rate": 0.03, "outer_steps": STEPS, **GAUSS_NEWTON[name]}
        return GaussNewton(objective.model, objective, partition=partition, **options)
    return FirstOrderOptimizer(
        objective, partition, solver=name, learning_rate=0.5 if name == "kfac" else 0.03, outer_steps=STEPS,
        accumulate=name != "soap", refresh=2 if name in ("sophia", "kfac") else None,
    )  # fmt: skip


def stepped(name: str, processes: Processes) -> tuple[torch.Tensor, list[StepReport]]:
    run = optimizer(name, processes)
    reports = [run.step(batches(step), batches(10 + step)) for step in range(STEPS)]
    return run.partition.vector(run.objective.model), reports


def close(found: float, wanted: float) -> bool:
    return found == pytest.approx(wanted, rel=1e-9, abs=1e-11, nan_ok=True)


def equal_to_one(processes: Processes, wanted: dict[str, Any], names: Sequence[str]) -> None:
    start = problem(ALONE)
    for name in names:
        theta, reports = stepped(name, processes)
        alone, their_reports = wanted[name]
        assert (alone - start[1].vector(start[0].model)).norm() > 1e-2  # there was something to compute
        assert (theta - alone).norm() <= 1e-10 * alone.norm(), name
        for mine, one in zip(reports, their_reports, strict=True):
            assert (mine.outcome, mine.tokens) == (one.outcome, one.tokens)
            for number in (
                "loss",
                "gradient_norm",
                "step_size",
                "predicted_decrease",
                "gradient_equivalents",
            ):
                assert close(getattr(mine, number), getattr(one, number)), (name, number)
            assert len(mine.inner_loss) == len(one.inner_loss)
            assert all(map(close, mine.inner_loss, one.inner_loss))


def each_its_own_engine(processes: Processes, wanted: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    """The last process cannot take tangents forward: it goes another way, and what they find is the same."""
    last = processes.rank == processes.count - 1

    def refused(*_, **__):
        raise RuntimeError("no forward mode here")

    with patch.context() as own:
        if last:
            own.setattr(group_models, "local_gradient", refused)
        run = optimizer("full_gn", processes)
        assert isinstance(run, GaussNewton)
        for step in range(STEPS):
            run.step(batches(step), batches(10 + step))
    assert run.local.engine == ("shared" if last else "forward-mode")
    alone, _ = wanted["full_gn"]
    assert (run.partition.vector(run.objective.model) - alone).norm() <= 1e-10 * alone.norm()


FAILURES = (
    ("full_gn", RuntimeError("a broken kernel"), PeerFailed),
    ("full_gn", torch.OutOfMemoryError("gone"), PeerOutOfMemory),
    ("layerwise_gn", UserError("no such thing"), PeerRefused),
    ("cg", RuntimeError("a broken kernel"), PeerFailed),
    ("adamw", torch.OutOfMemoryError("gone"), PeerOutOfMemory),
    ("kfac", RuntimeError("a broken kernel"), PeerFailed),
)


def an_error_in_one_is_an_error_in_all(
    processes: Processes,
    patch: pytest.MonkeyPatch,
    failures: Sequence[tuple[str, Exception, type[Exception]]],
) -> None:
    last = processes.count - 1
    for name, error, peer in failures:
        run = optimizer(name, processes)
        left = [2 if name in GAUSS_NEWTON else 0]  # passes that succeed
        outputs = run.objective.outputs

        def breaking(*given, error=error, outputs=outputs, left=left, **named):
            left[0] -= 1
            if left[0] < 0:
                raise error
            return outputs(*given, **named)

        with patch.context() as own:
            if processes.rank == last:
                own.setattr(run.objective, "outputs", breaking)
            with pytest.raises(type(error) if processes.rank == last else peer, match=str(error)) as raised:
                run.step(batches(1), batches(11))
        if processes.rank != last:
            assert str(raised.value).startswith(f"process {last}: ")
        assert processes.gathered(processes.rank) == list(range(processes.count))  # still in step


def everything(processes: Processes, folder: Path, wanted: dict[str, Any]) -> None:
    """Checks all three processes, then two of them: to start some costs more than all they do here."""
    torch.manual_seed(processes.rank)  # nothing may draw from it
    group = dist.new_group([0, 1])
    equal_to_one(processes, wanted, SOME)
    with pytest.MonkeyPatch.context() as patch:
        an_error_in_one_is_an_error_in_all(processes, patch, FAILURES[:2])
        if processes.rank == 2:
            return
        assert isinstance(group, dist.ProcessGroup)
        pair = Processes.of_group(group)
        equal_to_one(pair, wanted, tuple(wanted))
        each_its_own_engine(pair, wanted, patch)
        an_error_in_one_is_an_error_in_all(pair, patch, FAILURES[2:])


def test_several_processes_take_the_steps_of_one_and_fail_together(tmp_path):
    alone = {name: stepped(name, ALONE) for name in (*GAUSS_NEWTON, *FIRST_ORDER)}
    on_processes(3, everything, tmp_path, alone)
