"""Layer kernels of a batch whose sequences several processes share: those of one process, failures included."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hessprobe.errors import UserError
from hessprobe.kernels.layer_kernels import LayerKernels, layer_kernels
from hessprobe.kernels.plan import NotOneCall
from hessprobe.kernels.stream import Stream
from hessprobe.kernels.verification import verified_plan
from hessprobe.machine.processes import PeerRefused, Processes
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.cases import Case
from tests.models import redraw, seeded
from tests.processes import on_processes

pytestmark = pytest.mark.processes


CASES = ("decoder", "decoder_tied", "decoder_swiglu_layernorm", "layernorm")


def shared(case: Case, processes: Processes) -> Objective:
    return Objective(case.problem.model, loss=case.problem.loss, processes=processes)


def more(case: Case) -> list[tuple[Tensor, Tensor]]:
    """Returns two micro-batches made from the case's first, so that shares are ragged and cut across both."""
    x, y = case.problem.batches[0]
    return [(torch.cat([x, x.flip(0)[1:]]), torch.cat([y, y.roll(1, 0)[1:]])), (x.roll(1, 0), y)]


def agree(found: LayerKernels, wanted: LayerKernels) -> None:
    assert (found.kernel - wanted.kernel).norm() <= 1e-11 * wanted.kernel.norm()
    for name, alignment in wanted.alignment.items():
        assert (found.alignment[name] - alignment).norm() <= 1e-11 * alignment.norm()
    for labels in ("sequence", "round", "tokens"):
        assert torch.equal(getattr(found, labels), getattr(wanted, labels))


def equal_to_one(processes: Processes, cases: Iterable[str], settings: Iterable[dict[str, Any]]) -> None:
    for name in cases:
        case = Case.of(name)
        along = {"v": case.rows(1)[0]}
        for options in settings:
            given = {"rounds": 2, "along": along, **options}
            ours, alone = seeded(5), seeded(5)
            batches = more(case)
            found = layer_kernels(shared(case, processes), batches, case.partition, generator=ours, **given)
            wanted = layer_kernels(case.objective, batches, case.partition, generator=alone, **given)
            agree(found, wanted)
            assert found.routes == wanted.routes
            assert torch.equal(ours.get_state(), alone.get_state())  # for whoever draws next


def failing_once(monkeypatch: pytest.MonkeyPatch, fails: bool, error: Exception) -> None:
    """Makes the next stream of this process fail in the middle of its backward passes, where it `fails`."""
    run, left = Stream.run, [fails]

    def broken(self: Stream, batches, rounds, cotangents):
        def stumbling(number, r, z, targets):
            if left.pop() if left else False:
                raise error
            return cotangents(number, r, z, targets)

        return run(self, batches, rounds, stumbling)

    monkeypatch.setattr(Stream, "run", broken)


def equal_after_failures(processes: Processes) -> None:
    case = Case.of("decoder")
    objective, batches = shared(case, processes), more(case)
    plan = verified_plan(objective, batches, case.partition)
    wanted = layer_kernels(case.objective, batches, case.partition, rounds=2, generator=seeded(5))
    last = processes.rank == processes.count - 1

    with pytest.MonkeyPatch.context() as patch:
        failing_once(patch, last, MemoryError("none left"))
        found = layer_kernels(objective, batches, case.partition, rounds=2, generator=seeded(5), plan=plan)
    agree(found, wanted)
    assert found.division == 2  # in the process that had memory too

    with pytest.MonkeyPatch.context() as patch:
        failing_once(patch, last, NotOneCall(plan.taps[1]))
        found = layer_kernels(objective, batches, case.partition, rounds=2, generator=seeded(5), plan=plan)
    agree(found, wanted)
    name = next(iter(plan.taps[1].names.values()))
    assert found.routes[name] == plan.how and wanted.routes[name] != plan.how

    regression = Case.of("layernorm")
    x, y = regression.problem.batches[0]
    poisoned = x.clone()
    poisoned[-1] = torch.nan  # a sequence of the last process
    plan = verified_plan(regression.objective, (x, y), regression.partition)
    objective = shared(regression, processes)
    kind = UserError if last else PeerRefused
    with pytest.raises(kind, match="returned NaN"), processes.together():
        layer_kernels(
            objective, (poisoned, y), regression.partition, rounds=1, generator=seeded(5), plan=plan
        )
    assert processes.all_say(True)  # still in step


def fewer_than_processes(processes: Processes) -> None:
    case = Case.of("decoder")
    x, y = case.problem.batches[0]
    one = (x[:1], y[:1])
    found = layer_kernels(shared(case, processes), one, case.partition, rounds=2, generator=seeded(5))
    wanted = layer_kernels(case.objective, one, case.partition, rounds=2, generator=seeded(5))
    agree(found, wanted)


def backward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    nn.functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten()).backward()


def sharded_equal_to_whole(processes: Processes, settings: Iterable[dict[str, Any]]) -> None:
    """Under FSDP2, with ragged batches of the processes: parameters and gradients stay as they were."""
    mesh = init_device_mesh("cpu", (processes.count,))
    batches = [
        (torch.randint(6, (3 + rank, 4), generator=seeded(rank)), torch.full((3 + rank, 4), rank))
        for rank in range(processes.count)
    ]
    for tied in (False, True):
        config = DecoderConfig(layers=2, width=4, feedforward=6, heads=2, vocabulary=6, context=8, tied=tied)
        whole = redraw(Decoder(config, generator=seeded(0)), seeded(1))
        model = copy.deepcopy(whole)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        partition, plain = Partition.of(model), Partition.of(whole)
        assert partition == plain
        backward(model, batches[processes.rank])
        before = [(p.detach().clone(), p.grad.clone()) for p in model.parameters()]
        objective = Objective(model, processes=processes)
        plan = verified_plan(objective, batches, partition)
        wanted_plan = verified_plan(Objective(whole), batches, plain)
        assert plan.routes == wanted_plan.routes and bool(plan.fallback) == tied
        for options in settings:
            found = layer_kernels(
                objective, batches, partition, rounds=2, generator=seeded(5), plan=plan, **options
            )
            wanted = layer_kernels(Objective(whole), batches, plain, rounds=2, generator=seeded(5))
            agree(found, wanted)
            assert found.loss == pytest.approx(float(Objective(whole).loss(batches).detach()), rel=1e-12)
        for p, (value, gradient) in zip(model.parameters(), before, strict=True):
            assert torch.equal(p.detach().to_local(), value.to_local())
            assert torch.equal(p.grad.to_local(), gradient.to_local())
        model.zero_grad()
        backward(model, batches[processes.rank])  # the next step trains as the one before
        for p, (_, gradient) in zip(model.parameters(), before, strict=True):
            assert torch.equal(p.grad.to_local(), gradient.to_local())
        with pytest.raises(UserError, match="at its own parameters"):
            theta = torch.zeros(partition.size, dtype=torch.float64)
            layer_kernels(objective, batches, partition, generator=seeded(5), parameters=theta, plan=plan)
        with pytest.raises(
            UserError, match=f"{processes.count + 1} micro-batches for {processes.count} processes"
        ):
            layer_kernels(objective, [*batches, batches[0]], partition, generator=seeded(5), plan=plan)


def everything(processes: Processes, folder: Path) -> None:
    equal_to_one(
        processes, CASES, ({}, {"cotangent": "sign"}, {"memory": 3000}, {"division": 2}, {"rounds": 1})
    )
    equal_after_failures(processes)
    fewer_than_processes(processes)
    sharded_equal_to_whole(processes, ({}, {"memory": 3000}, {"division": 2}))


def the_same_with_more(processes: Processes, folder: Path) -> None:
    equal_to_one(processes, ("decoder_tied",), ({"rounds": 1},))
    sharded_equal_to_whole(processes, ({},))


@pytest.mark.parametrize(("count", "checks"), [(2, everything), (4, the_same_with_more)])
def test_kernels_of_shared_sequences_are_those_of_one_process(count: int, checks, tmp_path: Path):
    on_processes(count, checks, tmp_path)
