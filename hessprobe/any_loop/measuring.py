"""One due step measured: theta as it was before it, the batches of all processes, and a row of every probe that is due.

Whatever happens to one process, all make the same collectives: what can fail in one alone is told the others with its part
of the batch, or is inside a region that all leave together (Processes.together).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hessprobe.any_loop.meeting import Contribution, Meeting, OutOfStep
from hessprobe.any_loop.torch_optimizers import running
from hessprobe.errors import UserError
from hessprobe.instruments.snapshot import Probe, Snapshot
from hessprobe.machine.processes import ProcessLost, together
from hessprobe.measuring.probe_batches import first_sequences, own_sequences
from hessprobe.measuring.row_recorder import Measurement, ProbeRecorder
from hessprobe.measuring.snapshots import Snapshots
from hessprobe.measuring.undisturbed import undisturbed
from hessprobe.optimization.running import RunningOptimizer
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition
from hessprobe.problem.row_checks import UNCHECKED, Checked, RowChecks
from hessprobe.problem.shares import is_sharded

LOGGER = logging.getLogger("hessprobe")


class Measuring:
    """Measures what is due into the rows of a ProbeRecorder.

    Args:
        objective: with the meeting's processes.
        optimizers: what trains.
        seed: of the probes' random vectors.

    Attributes:
        at_present: whether a loss that is passed is of the weights as they are now; else of those before the step.
    """

    def __init__(
        self,
        objective: Objective,
        partition: Partition,
        optimizers: Sequence[Any],
        seed: int,
        meeting: Meeting,
        recorder: ProbeRecorder,
    ) -> None:
        self.objective, self.partition, self.optimizers = objective, partition, optimizers
        self.snapshots = Snapshots(objective=objective, partition=partition, seed=seed)
        self.meeting, self.processes, self.recorder = meeting, meeting.processes, recorder
        self.sharded = is_sharded(objective.model)
        self._before: tuple[int, Tensor, RunningOptimizer | None] | None = None
        self.at_present = False
        self._checks, self._noted = RowChecks(objective, partition, undisturbed), set[str]()

    def keep_before(self, step: int, due: Sequence[Probe]) -> None:
        """Keeps theta, and the optimizer where a probe asks for it, as they are before a step that is due.

        Nothing of sharded parameters: they are measured as they are after the step, and the update is not known.
        """
        self._before = None
        if due and not self.sharded:
            optimizer = None
            if self.optimizers and any(probe.needs_optimizer for probe in due):
                optimizer = running(self.optimizers, self.objective.model, self.partition)
            self._before = step, self.snapshots.theta(), optimizer

    def forget(self) -> None:
        """Frees what was kept."""
        self._before = None

    def pretend_update(self) -> None:
        """Takes theta before the step for slightly other than it was: a row that is tried then costs what a row costs."""
        self.at_present = True
        if self._before is not None:
            self._before[1].mul_(1 + 1e-3)

    def rows(self, step: int, due: Sequence[Probe], batch: Any, *, trained: Any = None) -> list[Measurement]:
        """Measures and writes the rows that are due, a failed one with its reason.

        Args:
            trained: the loss that the loop itself computed on the batch, where it says so.

        Raises:
            UserError: the disk is full.
            OutOfStep: the processes are not at the same step; the rows say so.
            ProcessLost: another process has died or does not come; the rows say so.
        """
        found: list[Measurement] = []
        start = time.perf_counter()
        try:
            try:
                snapshot, checked = self._snapshot(step, due, batch, trained)
            except ProcessLost:
                raise
            except Exception as error:  # in all processes: in this one, or told by another
                with self.processes.together():
                    seconds = time.perf_counter() - start
                    found = [self.recorder.fail(probe, step, error, seconds) for probe in due]
                if isinstance(error, OutOfStep):
                    raise
            else:
                for probe in due:
                    found.append(self._row(probe, snapshot, checked))
        except ProcessLost as error:
            with suppress(Exception):
                for probe in due[len(found) :]:
                    self.recorder.fail(probe, step, error, time.perf_counter() - start)
            raise
        return found

    @together(lambda self, *_: self.processes)
    def _row(self, probe: Probe, snapshot: Snapshot, checked: Checked) -> Measurement:
        start = time.perf_counter()
        try:
            own = snapshot.batches
            if not self.sharded or self.processes.count == 1:  # else each has brought its part of them
                own = first_sequences(snapshot.micro_batches, probe.sequences)
        except UserError as error:  # they cannot be cut, in no process
            return self.recorder.fail(probe, snapshot.step, error, time.perf_counter() - start)
        try:
            return self.recorder.record(probe, replace(snapshot, batches=own), checked.row)
        except UserError:  # a full disk
            raise
        except ValueError as error:  # a row that does not fit the probe's own table
            return self.recorder.fail(probe, snapshot.step, error, time.perf_counter() - start)

    def _snapshot(
        self, step: int, due: Sequence[Probe], batch: Any, trained: Any
    ) -> tuple[Snapshot, Checked]:
        before, optimizer, checked = None, None, UNCHECKED
        if self._before is not None and self._before[0] == step:
            _, before, optimizer = self._before
        self._before = None

        def check(held: MicroBatches) -> None:
            nonlocal checked
            checked = self._checked(held, before, trained)

        if self.processes.count == 1:
            batches = self._held(batch() if callable(batch) else batch)
            check(batches)
        else:
            solver = "no optimizer" if optimizer is None else f"optimizer {optimizer.solver!r}"
            known = "" if before is None else f"theta and {solver}"
            batches, alike = self.meeting.all_parts(
                step, tuple(names(due)), lambda: self._part(due, batch, known, check)
            )
            before, optimizer = (before, optimizer) if alike else (None, None)
        with self.processes.together():
            there = self._held(batches).checked()
            snapshot = self.snapshots.take(step, there, before=before, optimizer=optimizer)
        return snapshot, checked

    def _held(self, given: Any) -> MicroBatches:
        """Returns micro-batches on the model's device; those that are there already, as they are."""
        if isinstance(given, MicroBatches):
            return given
        return self.objective.held(given).placed(next(self.objective.model.parameters()).device)

    def _checked(self, batches: MicroBatches, before: Tensor | None, trained: Any) -> Checked:
        """Returns what the checks find of this process's whole batch; in no talk with the others.

        Nothing of sharded parameters: each pass needs all processes, and they have batches of other sizes.
        """
        if self.sharded:
            return UNCHECKED
        theta = self.snapshots.theta() if before is None or self.at_present else before
        found = self._checks.check(batches, theta, trained, before=before is not None or self.at_present)
        for note in found.notes:
            if note not in self._noted and self.processes.is_first:
                LOGGER.warning("%s (said once)", note)
            self._noted.add(note)
        return found

    def _part(
        self, due: Sequence[Probe], batch: Batch, known: str, check: Callable[[MicroBatches], None]
    ) -> Contribution:
        """Returns what this process brings to the rows: as many of its sequences as any of them reads."""
        given, limit = batch() if callable(batch) else batch, max(probe.sequences for probe in due)
        counted = self.objective.counted(given)
        if counted.hold_targets:  # one of several processes may have had nothing to read
            check(self._held(given))
        weights = 0.0, 0.0
        if self.sharded:  # a pass needs all processes, so each must have its own sequences to run
            limit = max(1, limit // self.processes.count)
        else:
            theta = self.partition.vector(self.objective.model)
            weights = float(theta.sum(dtype=torch.float64)), float(theta.norm(dtype=torch.float64))
        return Contribution(
            batches=own_sequences(self.objective, counted, limit),
            known=known,
            weights=weights,
        )


def names(probes: Iterable[Probe]) -> list[str]:
    """Returns the probes' names."""
    return [probe.name for probe in probes]
