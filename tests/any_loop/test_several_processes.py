"""Recorders under DistributedDataParallel: the tables of one process on the union of the batches, and no failure that hangs.

Four processes are started once and make all checks, which leave a file each where they failed.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from hessprobe.any_loop import meeting
from hessprobe.any_loop.recorder import Recorder
from hessprobe.errors import UserError
from hessprobe.instruments.snapshot import Row, Snapshot
from hessprobe.machine.processes import ALONE, Processes
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.problem.objective import Objective
from hessprobe.store.writer import RunWriter
from tests.any_loop.loops import Loop, footprint
from tests.any_loop.watching import Seen, assert_untouched
from tests.models import redraw, seeded
from tests.processes import on_processes
from tests.training.runs import CLOCK, attributes, tables

pytestmark = pytest.mark.processes


COUNT = 4
VOCABULARY, LENGTH = 6, 4
LIGHT = {
    "cross_layer": {"sequences": 9, "rounds": 2},
    "gn_hessian": {
        "sequences": 5, "samples": 2, "block_samples": 2, "lanczos_steps": 2, "lanczos_probes": 1, "alphas": [1.0],
        "cg_iterations": 4,
    },
    "preconditioner": {
        "curvature_sequences": [2, 4], "held_out_sequences": 4, "folds": 2, "dampings": [0.1], "cg_iterations": 4,
        "candidates": ["gradient", "update", "kfac", "full_gn"],
    },
}  # fmt: skip
OWN_BATCHES = ("loss_whole_batch", "loss_train_mode")  # what each process checks of its own
Batch = tuple[Tensor, Tensor]


def decoder(dtype: torch.dtype) -> nn.Module:
    config = DecoderConfig(
        layers=1, width=4, feedforward=6, heads=2, vocabulary=VOCABULARY, context=LENGTH, tied=False
    )
    return redraw(Decoder(config, generator=seeded(0)), seeded(1)).to(dtype)


def batches_of(step: int, processes: Processes) -> list[list[Batch]]:
    """Returns every process's micro-batches: ragged, two of the last process's, some labels of no consequence."""
    found = []
    for rank in range(processes.count):
        generator = seeded(100 * step + rank)
        sizes = (4, 2) if rank == processes.count - 1 else (2 + (rank + step) % 3,)
        micro = [torch.randint(VOCABULARY, (2, size, LENGTH), generator=generator) for size in sizes]
        found.append([(x, y.masked_fill(x == rank, -100)) for x, y in micro])
    return found


class Training:
    """A DDP loop: the same in every run of it."""

    def __init__(self, processes: Processes, dtype: torch.dtype = torch.float64) -> None:
        self.processes = processes
        group = processes._group
        self.model = DistributedDataParallel(decoder(dtype), process_group=group)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        torch.manual_seed(processes.rank)

    def step(self, step: int) -> list[Batch]:
        """Trains on this process's batches of a step, and returns them."""
        micro = batches_of(step, self.processes)[self.processes.rank]
        self.optimizer.zero_grad()
        x, y = (torch.cat(part) for part in zip(*micro, strict=True))
        cross_entropy(self.model(x).flatten(0, 1), y.flatten(), reduction="sum").backward()
        self.optimizer.step()
        return micro

    def run(self, steps: int, after: Callable[[int, list[Batch]], object] | None = None) -> dict[str, Any]:
        for step in range(steps):
            micro = self.step(step)
            if after is not None:
                after(step, micro)
        return footprint(Loop(self.model, [self.optimizer], lambda micro: None))


@contextmanager
def logged() -> Iterator[list[str]]:
    """Yields the lines that hessprobe logs inside."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hessprobe")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def said_by_all(what: Callable[[], object], processes: Processes, message: str) -> None:
    """Every process refuses, with a message that holds this."""
    with pytest.raises(UserError) as found:
        what()
    assert message in str(found.value), found.value
    dist.barrier()


def halves(name: str) -> str:
    return "blocks" if name.startswith("blocks") else "outside"


# -- what is measured ----------------------------------------------------------------------------------------


def same_tables(processes: Processes, folder: Path, dtype: torch.dtype, tolerance: float) -> None:
    """All three tables are those of one process with all batches; training is what it is without a recorder."""
    bare = Training(processes, dtype).run(2)
    training = Training(processes, dtype)
    options: dict[str, Any] = {"every": [1], "seed": 3, "optimizer": training.optimizer, "partition": halves}
    objective = Objective(training.model)
    given = processes if processes.count < COUNT else None
    shared = Recorder(folder / "shared", objective, [LIGHT], processes=given, **options)
    assert objective.processes is ALONE and shared.processes.count == processes.count
    alone = None
    if processes.is_first:
        alone = Recorder(folder / "alone", training.model, [LIGHT], processes=ALONE, **options)

    def after(step: int, micro: list[Batch]) -> None:
        found = shared(step, lambda: micro if len(micro) > 1 else micro[0])
        assert [(m.probe, m.failure) for m in found] == [(name, "") for name in LIGHT if step == 1]
        if alone is not None:
            alone(step, [batch for part in batches_of(step, processes) for batch in part])

    assert_untouched(training.run(2, after), bare)
    shared.close()
    if alone is None:
        return
    alone.close()
    assert attributes(folder / "shared")["processes"] == processes.count
    one, other = tables(folder / "alone"), tables(folder / "shared")
    assert set(one) == set(other) == set(LIGHT)
    for name, table in one.items():
        assert table.failure.values.tolist() == [""]
        for variable in {str(v) for v in table.data_vars} - {*CLOCK, *OWN_BATCHES, "symmetry_gap"}:
            wanted, got = table[variable].values, other[name][variable].values
            if wanted.dtype.kind != "f":
                assert wanted.tolist() == got.tolist(), variable
                continue
            # Differences of numbers that are nearly the same, and conjugate gradients, make more of rounding.
            loose = name == "preconditioner" or "stderr" in variable or "residual" in variable
            factor = 20 if loose else 1
            scale = factor * tolerance * np.nanmax(np.abs(wanted), initial=0)
            np.testing.assert_allclose(got, wanted, rtol=0, atol=scale, err_msg=f"{name}.{variable}")


def four_in_float64(processes: Processes, folder: Path) -> None:
    same_tables(processes, folder, torch.float64, 1e-12)


def four_in_float32(processes: Processes, folder: Path) -> None:
    same_tables(processes, folder, torch.float32, 1e-4)  # no processor rounds so; a wrong share is far more


def two_in_float64(processes: Processes, folder: Path) -> None:
    pair = dist.new_group([0, 1])
    if processes.rank < 2:
        same_tables(Processes.of_group(pair), folder, torch.float64, 1e-12)


def shares_of_any_size(processes: Processes, folder: Path) -> None:
    """Fewer sequences than processes, a process without any and one without a target: the loss of all tokens together."""
    rank, model, probe = processes.rank, decoder(torch.float64), Seen()
    x = torch.randint(VOCABULARY, (COUNT, 2, LENGTH), generator=seeded(5))
    y = x.roll(1, 0)
    y[2] = -100
    given: list[tuple[Any, list[Batch]]] = [
        ([(x[rank], y[rank])] if rank in (1, 3) else [], [(x[1], y[1]), (x[3], y[3])]),
        ((x[rank, :rank], y[rank, :rank]), [(x[r, :r], y[r, :r]) for r in (1, 2, 3)]),
        ((x[rank], y[rank]), [(x[r], y[r]) for r in range(COUNT)]),
        ([(x[1, :1], y[1, :1])] if rank == 1 else [], [(x[1, :1], y[1, :1])]),
        ([], []),
    ]
    with Recorder(folder, model, probe, every=1) as held:
        for step, (own, union) in enumerate(given):
            (found,) = held(step, own)
            if not union:
                assert found.failure == "no batch given: wanted a batch or a non-empty list of batches"
                continue
            assert found.failure == "" and found.row is not None
            assert float(found.row["loss"]) == pytest.approx(
                float(Objective(model).loss(union).detach()), rel=1e-12
            )
            assert [len(batch[1]) for batch in probe.snapshots[-1].batches] == [
                len(batch[1]) for batch in union
            ]
    assert hasattr(held, "_recorder")
    if processes.is_first:
        assert [bool(reason) for reason in tables(folder)["seen"].failure.values] == [False] * 4 + [True]


def little_travels(processes: Processes, folder: Path) -> None:
    """A process sends the sequences that a probe can read at most, and not the memory they are a part of."""
    from hessprobe.measuring.probe_batches import own_sequences

    x = torch.randint(VOCABULARY, (1000, LENGTH), generator=seeded(5))
    (sent,) = own_sequences(Objective(decoder(torch.float64)), (x, x), 3)
    assert [part.untyped_storage().nbytes() for part in sent] == [3 * LENGTH * 8] * 2


# -- what goes wrong -----------------------------------------------------------------------------------------


class Falls(Seen):
    """Fails in one process, at one step, between two collectives."""

    def measure(self, snapshot: Snapshot) -> Row:
        if snapshot.step == 1 and snapshot.objective.processes.rank == 3:
            raise RuntimeError("out of luck")
        return super().measure(snapshot)


def a_row_fails_in_all(processes: Processes, folder: Path) -> None:
    """What fails in one process is in the row, once in the log, and the next row is measured."""
    rank, model = processes.rank, decoder(torch.float64)
    x = torch.randint(VOCABULARY, (2, LENGTH), generator=seeded(rank))

    def unlucky() -> Batch:
        if rank == 1:
            raise OSError("the file is gone")
        return x, x

    given = [
        (x, x),
        (x, x),
        unlucky,
        (x,) if rank == 2 else (x, x),
        lambda: {x} if rank == 0 else (x, x),
        (x, x),
        (x, x),
    ]
    reasons = [
        "",
        "process 3: RuntimeError: out of luck",
        "process 1: OSError: the file is gone",
        "process 2: wanted a batch (inputs, targets) or a mapping with 'labels', got tuple",
        "process 0: wanted a batch (inputs, targets) or a mapping with 'labels', got set",
        "",
        "process 2 holds other parameters than process 0",
    ]
    with logged() as lines, Recorder(folder, model, Falls(), every=1) as held:
        for step, (batch, reason) in enumerate(zip(given, reasons, strict=True)):
            if step == 6 and rank == 2:
                next(model.parameters()).data.mul_(1.1)
            (found,) = held(step, batch)
            own = reason.removeprefix("process 3: ") if rank == 3 and step == 1 else reason
            assert found.failure[: len(own)] == own if own else found.failure == "", found.failure
        assert held.active
    assert len(lines) == (len(list(filter(None, reasons))) if rank == 0 else 0)
    if processes.is_first:
        rows = tables(folder)["seen"].failure.values
        for row, reason in zip(rows, reasons, strict=True):
            assert str(row)[: len(reason)] == reason and bool(row) == bool(reason)


def unknown_before_in_one(processes: Processes, folder: Path) -> None:
    """Where one process does not know theta before the step, no process takes it to be known."""
    model, probe, x = decoder(torch.float64), Seen(), torch.arange(LENGTH)[None]
    with Recorder(folder, model, probe, every=1) as held:
        if processes.rank == 2:
            held._measuring.forget()
        held(0, (x, x))
        held(1, (x, x))
    assert [snapshot.update is None for snapshot in probe.snapshots] == [True, False]


def steps_that_differ(processes: Processes, folder: Path) -> None:
    """Recording ends in all processes at once, at the first call already, and says why; training goes on."""
    rank, model, x = processes.rank, decoder(torch.float64), torch.arange(LENGTH)[None]
    said = "process 1 has another step than process 0 (9, and 3 there)"
    with logged() as lines, Recorder(folder / "due", model, Seen(), every=3) as held:
        assert len(held(0, (x, x))) == 1
        assert not held(9 if rank == 1 else 3, (x, x)) and not held.active
        assert held(12, (x, x)) == ()
    with Recorder(folder / "first", model, Seen(), every=50) as held, logged() as more:
        assert held(rank + 1, (x, x)) == () and not held.active
    if processes.is_first:
        (line,) = lines
        assert line.startswith(f"step 3: {said}") and line.endswith("Recording has stopped; training goes on")
        assert more[0].startswith("step 1: process 1 has another step than process 0 (2, and 1 there)")
        rows = tables(folder / "due")["seen"]
        assert rows.step.values.tolist() == [0, 3] and str(rows.failure.values[1]).startswith(said)
    else:
        assert not lines and not more


def mistakes_in_the_call(processes: Processes, folder: Path) -> None:
    """What one process cannot do is refused in all; so are recorders that differ."""
    rank, model = processes.rank, decoder(torch.float64)

    def made(
        where: str, model: nn.Module = model, probes: Any = "cross_layer", **options: Any
    ) -> Callable[[], Recorder]:
        return lambda: Recorder(folder / where, model, probes, **options)

    made("held")().close()
    said_by_all(made("held"), processes, "already holds a run; continue it with resume=True")
    with made("held", resume=True)() as held:
        assert held.due(0) == ["cross_layer"]
    (folder / "file").touch()
    said_by_all(made("file/run"), processes, "cannot write a run to")
    said_by_all(
        made("a", probes="cross_layers" if rank == 2 else "cross_layer"),
        processes,
        "no probe named 'cross_layers'",
    )
    frozen = decoder(torch.float64).requires_grad_(rank != 1)
    said_by_all(made("b", frozen), processes, "has no trainable parameters")
    said_by_all(
        made("c", seed=rank), processes, "process 1 has another probes and their options than process 0"
    )
    said_by_all(
        made("d", first_step=rank),
        processes,
        "process 1 has another first_step than process 0 (1, and 0 there)",
    )
    said_by_all(made("e", every=2 + rank // 2), processes, "process 2 has another")
    assert not any((folder / name).exists() for name in "abcde")


def a_full_disk(processes: Processes, folder: Path) -> None:
    """The first process's disk ends the recording everywhere."""
    model, x = decoder(torch.float64), torch.arange(LENGTH)[None]

    def full(*_: object) -> None:
        raise UserError("no space left on disk")

    with (
        logged() as lines,
        Recorder(folder, model, Seen(), every=1) as held,
        pytest.MonkeyPatch.context() as patch,
    ):
        held(0, (x, x))
        patch.setattr(RunWriter, "write", full)
        held(1, (x, x))
        assert not held.active
    wanted = ["step 1: no space left on disk. Recording has stopped; training goes on"]
    assert lines == (wanted if processes.is_first else [])


@contextmanager
def impatient() -> Iterator[list[str]]:
    """Yields the lines logged while recorders wait for seconds, not minutes."""
    with pytest.MonkeyPatch.context() as patch, logged() as lines:
        patch.setattr(meeting, "WAIT", timedelta(seconds=3))
        patch.setattr(meeting, "PATIENCE", 0.5)
        yield lines


def called_by_the_first_alone(processes: Processes, folder: Path) -> None:
    """It waits for the others, says so, gives up, and training's sums are as they were."""
    model, x = decoder(torch.float64), torch.arange(LENGTH)[None]
    with impatient() as lines:
        held = Recorder(folder, model, Seen(), every=1)
        held(0, (x, x))
        if processes.is_first:
            assert not held(1, (x, x)) and not held.active
            assert "has been waiting for the other processes at step 1" in lines[0]
            assert lines[1].startswith(
                "step 1: process 0 of 4 has lost another one: it died or does not answer"
            )
            assert lines[1].endswith("Recording has stopped")
            rows = tables(folder)["seen"].failure.values
            assert rows[0] == "" and "does not answer" in str(rows[1])
    total = torch.ones(2)
    dist.all_reduce(total)
    assert total.tolist() == [COUNT, COUNT]
    if processes.rank == 1:  # those who come later need not wait
        assert not held(1, (x, x)) and not held.active
    held.close()


def a_process_that_dies(processes: Processes, folder: Path) -> None:
    """What was recorded is kept, and the log says what happened."""
    model, x = decoder(torch.float64), torch.arange(LENGTH)[None]
    with logged() as lines, Recorder(folder, model, Dies(), every=1) as held:
        held(0, (x, x))
        held(1, (x, x))
        assert not held.active
    (line,) = [line for line in lines if "has been waiting" not in line]
    assert line.startswith(f"step 1: process {processes.rank} of 4 has lost another one")
    if processes.is_first:
        rows = tables(folder)["seen"].failure.values
        assert rows[0] == "" and "has lost another one" in str(rows[1])


def made_by_the_first_alone(processes: Processes, folder: Path) -> None:
    """The last check, since torch.distributed's groups are counted in every process: one that is not there says so."""
    if processes.is_first:
        with (
            impatient() as lines,
            pytest.raises(UserError, match="process 0 of 4, and not all of them have made a recorder in 3 s"),
        ):
            Recorder(folder, decoder(torch.float64), Seen())
        assert "at its construction" in lines[0]


class Dies(Seen):
    """Ends its process at step 1, without a word."""

    def measure(self, snapshot: Snapshot) -> Row:
        if snapshot.step == 1 and snapshot.objective.processes.rank == 3:
            os._exit(0)
        return super().measure(snapshot)


CHECKS: dict[str, Callable[[Processes, Path], None]] = {
    check.__name__.replace("_", " "): check
    for check in (
        four_in_float64, four_in_float32, two_in_float64, shares_of_any_size, little_travels, a_row_fails_in_all,
        unknown_before_in_one, steps_that_differ, mistakes_in_the_call, a_full_disk, called_by_the_first_alone,
        a_process_that_dies, made_by_the_first_alone,
    )
}  # fmt: skip


def all_checks(processes: Processes, folder: Path) -> None:
    for name, check in CHECKS.items():
        place = folder / name
        place.mkdir(exist_ok=True)
        try:
            check(processes, place)
        except (Exception, pytest.fail.Exception):
            (place / f"failed-{processes.rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    on_processes(COUNT, all_checks, folder)
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_in_four_processes(checked, name):
    failed = [path.read_text(encoding="utf-8") for path in sorted((checked / name).glob("failed-*.txt"))]
    assert not failed, "\n".join(failed)
