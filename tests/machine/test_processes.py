"""Processes in step: sums, shares, and failures that reach everyone instead of leaving someone waiting."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from hessprobe.errors import UserError
from hessprobe.machine.processes import (
    ALONE,
    PeerFailed,
    PeerOutOfMemory,
    PeerRefused,
    Processes,
    ProcessLost,
    together,
)
from hessprobe.problem.objective import Objective
from tests import processes as processes_of_tests
from tests.cases import Case
from tests.processes import on_processes

pytestmark = pytest.mark.processes


def sums(processes: Processes) -> None:
    rank, count = processes.rank, processes.count
    a, b = processes.total(torch.full((2, 3), float(rank)), torch.tensor(rank + 1))
    assert a.unique().tolist() == [count * (count - 1) / 2] and int(b) == count * (count + 1) / 2
    strided = torch.ones(3, 2).mT
    assert processes.total(strided)[0] is strided and bool((strided == count).all())
    assert processes.most(torch.tensor([rank, -rank])).tolist() == [count - 1, 0]
    assert processes.all_say(True) and not processes.all_say(rank != 1)
    assert processes.gathered({"rank": rank}) == [{"rank": r} for r in range(count)]
    assert processes.from_first(lambda: f"written by {rank}") == "written by 0"


def exchange(processes: Processes) -> None:
    """Rows of ragged processes: together their inner products are those of all rows."""
    counts = [2 + rank for rank in range(processes.count)]
    rows = torch.randn(sum(counts), 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = rows.split(counts)[processes.rank]
    found, columns = processes.exchanged(own, counts)
    assert torch.equal(found, rows[:, columns])
    (gram,) = processes.total(found @ found.mT)
    assert torch.allclose(gram, rows @ rows.mT, rtol=1e-13, atol=1e-13)
    few, columns = processes.exchanged(own[:, :1], counts)  # fewer columns than processes
    assert torch.equal(few, rows[:, :1][:, columns])


@together(lambda processes, **_: processes)
def refusing(processes: Processes, *, refuses: bool) -> int:
    """Returns the rank, or raises in one process."""
    if refuses:
        raise MemoryError("none left")
    return processes.rank


def failures(processes: Processes) -> None:
    last = processes.count - 1
    mine = processes.rank == last

    # A function that is a region: it fails in all, and they go on together.
    with pytest.raises(MemoryError):
        refusing(processes, refuses=mine)

    # In an inner region, handled there by all: they go on together.
    with processes.together():
        with pytest.raises(MemoryError) as caught, processes.together():
            if mine:
                raise MemoryError("none left")
            processes.total(torch.ones(3))
        if not mine:
            assert caught.type is PeerOutOfMemory and f"process {last}: MemoryError: none" in str(
                caught.value
            )
        assert int(processes.total(torch.tensor(1))[0]) == processes.count

    # In the outer one, while the others are further in: no retry of theirs must take it for its own.
    retried = []
    with pytest.raises(MemoryError if mine else PeerFailed), processes.together():
        if mine:
            raise MemoryError("around")
        try:
            with processes.together():
                processes.total(torch.ones(3))
        except MemoryError:
            retried.append(True)
    assert not retried

    # Caught where it must not be: what comes next in the region fails too, and nobody waits.
    with pytest.raises(KeyError if mine else PeerFailed), processes.together():
        if mine:
            raise KeyError("lost")
        try:
            processes.total(torch.ones(1))
        except PeerFailed:
            processes.total(torch.ones(2))

    # At the end, when the others are through; a user's mistake stays one, and says more where asked.
    with pytest.raises(UserError) as told, processes.together(detail=lambda error: len(str(error))):
        processes.total(torch.ones(2))
        if mine:
            raise UserError("wanted a, got b")
    assert mine or (told.type is PeerRefused and told.value.detail == 15)

    # In several at once.
    with pytest.raises((KeyError, ValueError)), processes.together():
        raise (KeyError if mine else ValueError)("all of them")
    with pytest.raises(ZeroDivisionError if processes.is_first else PeerFailed):
        processes.from_first(lambda: 1 // 0)
    assert processes.all_say(True)


def out_of_step(processes: Processes) -> None:
    with pytest.raises(ProcessLost, match="fallen out of step"):
        if processes.is_first:
            processes.total(torch.ones(2))
        else:
            processes.most(torch.ones(2))


def shares(processes: Processes) -> None:
    case = Case.of("layernorm")
    objective = Objective(case.problem.model, loss=case.problem.loss, processes=processes)
    batches = case.problem.batches
    whole = torch.cat([x for x, _ in batches])
    found = processes.gathered([(own.first, own.batch[0]) for own in objective.share(batches)])
    parts = [part for own in found for part in own]
    assert torch.equal(torch.cat([x for _, x in parts]), whole)
    assert [first for first, _ in parts] == [0, *torch.tensor([len(x) for _, x in parts]).cumsum(0)[:-1]]
    sizes = [sum(len(x) for _, x in own) for own in found]
    assert max(sizes) - min(sizes) <= 1
    assert objective.alone.share(batches)[0].batch is batches[0]
    # Sequences that see each other stay together, in one process.
    given = Objective(
        case.problem.model,
        loss=case.problem.loss,
        processes=processes,
        forward=lambda m, b: (z := m(b[0])) - z.mean(0),
    )
    held = processes.gathered([(own.start, own.stop) for own in given.share(batches)])
    assert [ends for own in held for ends in own] == [(0, len(x)) for x, _ in batches]


def everything(processes: Processes, folder: Path) -> None:
    sums(processes)
    exchange(processes)
    failures(processes)
    shares(processes)
    out_of_step(processes)


@pytest.mark.parametrize("count", [2, 3])
def test_processes_stay_in_step(count: int, tmp_path: Path):
    on_processes(count, everything, tmp_path)


def one_dies(processes: Processes, folder: Path) -> None:
    if processes.is_first:
        processes.total(torch.ones(1))
        os.kill(os.getpid(), signal.SIGKILL)
    processes.total(torch.ones(1))
    with pytest.raises(ProcessLost, match="process 1 of 2 has lost another one"), processes.together():
        processes.total(torch.ones(1))
    (folder / "noticed").touch()


def test_a_process_that_died_is_noticed(tmp_path: Path):
    # Not on_processes: it stops those that are left as soon as it sees one dead.
    both = [
        torch.multiprocessing.get_context("spawn").Process(
            target=processes_of_tests._one, args=(rank, one_dies, 2, tmp_path)
        )
        for rank in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert both[0].exitcode == -signal.SIGKILL and (tmp_path / "noticed").exists()


def test_one_process_alone_needs_nobody():
    x = torch.ones(2)
    assert ALONE.total(x)[0] is x and ALONE.most(x) is x and ALONE.gathered(3) == [3]
    assert ALONE.from_first(lambda: 4) == 4 and ALONE.exchanged(x[None], [1])[1] == slice(0, 2)
    assert refusing(ALONE, refuses=False) == 0 and refusing.__doc__ == refusing.__wrapped__.__doc__
    with pytest.raises(KeyError), ALONE.together():
        raise KeyError
    assert Processes.of_group().count == 1
