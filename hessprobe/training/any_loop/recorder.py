"""The instruments in anybody's training loop: one call a step, which returns at once unless a probe is due.

theta is copied at the call before a due step, so that a row knows the update that was made: it is measured at theta
BEFORE the step, as in hessprobe's own runs, and the update is what training added until the call. The processes of a
data-parallel loop put their batches together, and each measures its share of them.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from hessprobe.errors import UserError
from hessprobe.probes.probe import Probe
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition
from hessprobe.problem.processes import Processes, ProcessLost
from hessprobe.store.writer import RunWriter
from hessprobe.training.any_loop.chosen_probes import Chosen, ChosenProbes, choose
from hessprobe.training.any_loop.measuring import Measuring, names
from hessprobe.training.any_loop.meeting import Meeting
from hessprobe.training.any_loop.sharded_parameters import check_whole
from hessprobe.training.any_loop.undisturbed import undisturbed
from hessprobe.training.probe_schedule import Schedule
from hessprobe.training.recorder import Measurement, NothingWritten, ProbeRecorder, RowWriter
from hessprobe.training.setup import machine_attributes

LOGGER = logging.getLogger("hessprobe")
Due = int | str | Iterable[int] | Schedule


class Recorder:
    """Measures the probes on their schedules while a loop of yours trains, into folder/log.zarr.

    Call it after every optimizer step, with the number of the step (counted over the whole run, from 0) and the step's
    batch. It never changes training: weights, gradients, random states, buffers, modes and hooks stay bit for bit. What
    goes wrong in a measurement is written into its row and logged (logger "hessprobe"); training goes on.

    Where torch.distributed has several processes, EVERY ONE makes a recorder and calls it after the same steps, with its
    own batch of each: a row is measured on the union of their batches, in the processes' order, each process measures
    its share, and the first alone writes. Made or called by the first alone, it would wait for the others: it says so
    after 30 seconds, and gives up after 5 minutes. Parameters sharded by FSDP2 (fully_shard) take cross_layer alone, from
    layer kernels, at theta after the step: curvature along the update is not known then.

    Args:
        folder: of the run. Only the first process's counts.
        objective: the model and its loss; a model alone means cross-entropy.
        probes: names ("cross_layer", "gn_hessian", "preconditioner"), names with the options of their section of a
            recipe ({"cross_layer": {"sequences": 16}}), or Probe objects; in a list, or one mapping.
        every: when they are due: 50 (steps 0, 50, ...), "log" or "log:4" (so many steps per factor of ten), a
            collection of steps, or one of these per probe in a mapping; default: `every` of its options, or 50.
        partition: "layer", "module", "parameter", a function from a parameter's name to its block's, or a Partition.
            Only parameters that require gradients now are measured.
        optimizer: what trains, or several: torch optimizers or hessprobe's. Only the preconditioner probe asks for it.
        steps: length of the run, nothing is due beyond; None where it is not known: the tables then grow.
        sequences: how many of a batch's sequences cross_layer and gn_hessian read at most (default: 64 and 32).
        first_step: the number of the first call's step, so that its update is known too.
        resume: go on with the run in the folder, if there is one.
        seed: of the probes' random vectors.
        processes: who records together; default: all processes of torch.distributed, in groups of their own. With
            hessprobe.problem.processes.ALONE this process records its own batches alone, whatever others do.

    Raises:
        UserError: no trainable parameters, a probe that sharded ones cannot have, an unknown probe or option, a schedule
            that is none, a folder that cannot be written or holds a run already; in every process, where one of them met it.
            Processes that have not come within 5 minutes, or that differ in what they ask for.

    Cost: a step that is not due takes some microseconds, the step before a due one a copy of theta (p numbers, held
    until then), and of the optimizer's state where the preconditioner probe is due. The first sequences of the processes'
    batches travel to all of them, and what the sums over processes move (see Processes.total).
    """

    def __init__(
        self,
        folder: Path | str,
        objective: Objective | nn.Module,
        probes: Chosen = ("cross_layer",),
        *,
        every: Due | Mapping[str, Due] | None = None,
        partition: str | Callable[[str], str] | Partition = "layer",
        optimizer: object | Sequence[object] | None = None,
        steps: int | None = None,
        sequences: int | None = None,
        first_step: int = 0,
        resume: bool = False,
        seed: int = 0,
        processes: Processes | None = None,
    ) -> None:
        self.folder = Path(folder)
        given = objective if isinstance(objective, Objective) else Objective(objective)
        if processes is None and given.processes.count > 1:
            processes = given.processes
        self.model, self.seed, self.active = given.model, seed, True
        optimizers = optimizer if isinstance(optimizer, Sequence) else [optimizer]
        self.optimizers = [one for one in optimizers if one is not None]
        self._last, self._seen_wrong, self._reasons = first_step - 1, False, {}
        self._meeting = Meeting(processes, next(self.model.parameters(), torch.empty(0)).device)
        self.processes = self._meeting.processes
        self._agreed = self.processes.count == 1  # on the number of the first call's step
        self.objective = copy.copy(given)
        self.objective.processes = self.processes
        writer: RowWriter = NothingWritten()
        try:
            with self.processes.together():
                chosen = choose(probes, every, sequences=sequences, seed=seed)
                check_whole(self.model, chosen.probes)
                self.partition = (
                    partition if isinstance(partition, Partition) else Partition.of(self.model, partition)
                )
                asked = {"steps": steps, "first_step": first_step, "resume": resume}
                self._meeting.check_alike({**asked, **_settings(chosen, self.partition)})
                if self.processes.is_first:
                    writer = self._writer(resume, chosen.recipe)
                self._recorder = ProbeRecorder(writer, chosen.probes, self.partition, steps, chosen.schedules)
        except BaseException:
            writer.close()
            self._meeting.leave()
            raise
        self._measuring = Measuring(
            self.objective, self.partition, self.optimizers, seed, self._meeting, self._recorder
        )
        self._look_ahead(first_step)

    def __call__(
        self,
        step: int,
        batch: Batch | list[Batch] | Callable[[], Batch | list[Batch]],
        *,
        loss: Any = None,
    ) -> Sequence[Measurement]:
        """Measures what is due at this step; returns what was measured, most often nothing.

        Args:
            step: optimizer steps done before the one just made.
            batch: what the step was made on: a batch or, with gradient accumulation, the list of its micro-batches; or a
                function that returns it, called only when a probe is due. Probes read its first sequences. Of several
                processes each gives its own, of any size.
            loss: what the loop computed on the batch, or a list of its micro-batches' losses; the first row is compared
                with it, and fails where another loss is measured.
        """
        if not self.active:
            return ()
        step = index(step)
        if step <= self._last:
            return self._out_of_order(step)
        self._last = step
        if not self._agreed and not self._agree(step):
            return ()
        due = self._next[1] if self._next[0] == step else self._recorder.due(step)
        found = self._measured(step, due, batch, loss) if due else ()
        if self.active:
            self._look_ahead(step + 1)
        return found

    def due(self, step: int) -> list[str]:
        """Returns the names of the probes that measure at a step."""
        return names(self._recorder.due(step)) if self.active else []

    @property
    def sequences(self) -> int:
        """How many sequences the probe that reads most reads at most."""
        return max((probe.sequences for probe in self._recorder.probes), default=0) if self.active else 0

    def close(self) -> None:
        """Ends the recording; nothing is pending, so a process that dies without it loses nothing."""
        self._recorder.writer.close()
        self._meeting.leave()
        self._measuring.forget()
        self.active = False

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _writer(self, resume: bool, recipe: Mapping[str, Any]) -> RunWriter:
        try:
            if resume and (self.folder / "log.zarr").exists():
                return RunWriter.reopen(self.folder)
            device = next(self.model.parameters()).device
            attributes = machine_attributes(self.folder, device, self.partition, self.processes)
            return RunWriter.create(
                self.folder, {**attributes, "seed": self.seed, "recipe": json.dumps(recipe)}
            )
        except UserError as error:
            raise UserError(str(error).replace("--resume", "resume=True")) from error

    def _look_ahead(self, step: int) -> None:
        """Notes what is due at the coming step, and if anything is, theta and the optimizer as they are before it."""
        self._next = step, self._recorder.due(step)
        try:
            self._measuring.keep_before(*self._next)
        except Exception as error:  # most likely no memory for a copy: the row then has no update
            self._say(step, "update", f"theta before the step could not be kept: {error}")

    def _agree(self, step: int) -> bool:
        """Compares the processes' steps at the first call, due or not; ends the recording where they differ."""
        self._agreed = True
        try:
            self._meeting.check_step(step)
        except Exception as error:
            self._stop(step, error)
        return self.active

    def _measured(self, step: int, due: Sequence[Probe], batch: Any, loss: Any) -> list[Measurement]:
        found: list[Measurement] = []
        try:
            with undisturbed(self.model):
                found = self._measuring.rows(step, due, batch, trained=loss)
        except Exception as error:  # no row can be written any more, or not by all processes
            self._stop(step, error)
        for measurement in found:
            if measurement.failure and self.processes.is_first:  # the others say the same
                self._say(step, measurement.probe, measurement.failure)
        return found

    def _stop(self, step: int, error: Exception) -> None:
        """Ends the recording, not the training."""
        lost = isinstance(error, ProcessLost)
        if lost or self.processes.is_first:
            goes_on = "" if lost else "; training goes on"
            LOGGER.error("step %d: %s. Recording has stopped%s", step, error, goes_on)
        self.close()

    def _say(self, step: int, what: str, reason: str) -> None:
        """Logs a failure, once as long as its reason stays the same."""
        if self._reasons.get(what) != reason:
            self._reasons[what] = reason
            LOGGER.warning("step %d: %s failed: %s (training goes on)", step, what, reason)

    def _out_of_order(self, step: int) -> Sequence[Measurement]:
        if not self._seen_wrong:
            self._seen_wrong = True
            LOGGER.warning(
                "step %d came after step %d, and nothing is recorded until steps go on beyond it: count optimizer steps "
                "over the whole run, not from 0 in every epoch, and call once a step, with the list of its micro-batches "
                "where gradients are accumulated",
                step,
                self._last,
            )
        return ()


def _settings(chosen: ChosenProbes, partition: Partition) -> dict[str, object]:
    """Returns what follows from a recorder's arguments, and must be alike in all processes."""
    schedules = {name: str(schedule) for name, schedule in chosen.schedules.items()}
    return {"probes and their options": chosen.recipe, "schedules": schedules, "blocks": partition.sizes}
