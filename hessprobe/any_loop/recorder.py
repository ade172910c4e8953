"""The instruments in anybody's training loop: one call a step, which returns at once unless a probe is due.

theta is copied at the call before a due step, so that a row knows the update that was made: it is measured at theta
BEFORE the step, as in hessprobe's own runs, and the update is what training added until the call. The processes of a
data-parallel loop put their batches together, and each measures its share of them.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from operator import index
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import torch
from torch import nn

from hessprobe.any_loop.chosen_probes import Chosen, ChosenProbes, choose
from hessprobe.any_loop.labels import ATTRIBUTE, Labels
from hessprobe.any_loop.measuring import Measuring, names
from hessprobe.any_loop.meeting import Meeting
from hessprobe.any_loop.objective_arguments import objective_of
from hessprobe.any_loop.patience import PATIENCE, Patience
from hessprobe.any_loop.run_folder import open_folder
from hessprobe.any_loop.sharded_parameters import check_whole
from hessprobe.any_loop.trial import Check, checked, gradient_seconds
from hessprobe.any_loop.words import for_recorder
from hessprobe.errors import UserError
from hessprobe.instruments.snapshot import Probe
from hessprobe.machine.processes import Processes, ProcessLost
from hessprobe.measuring.failures import reason_of
from hessprobe.measuring.provenance import machine_attributes
from hessprobe.measuring.row_recorder import Measurement, NothingWritten, ProbeRecorder, RowWriter
from hessprobe.measuring.schedule import Schedule
from hessprobe.measuring.undisturbed import undisturbed
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition

LOGGER = logging.getLogger("hessprobe")
AGAIN = 5.0  # seconds: rows that take less in all are tried twice, and the second time counts
Due = int | str | Iterable[int] | Schedule


class Recorder:
    """Measures the probes on their schedules while a loop of yours trains, into folder/log.zarr.

    Call it after every optimizer step, with the number of the step (counted over the whole run, from 0) and the step's
    batch. It never changes training: weights, gradients, random states, buffers, modes and hooks stay bit for bit. What
    goes wrong in a measurement is written into its row and logged (logger "hessprobe"); a call never raises, and training
    goes on. A probe that failed in 3 rows alike is tried ever more seldom (`retry` tries it at once). `check` measures
    once at the start and says what rows will cost; `measure` records the weights as they are, for a loop over checkpoints.

    Where torch.distributed has several processes, EVERY ONE makes a recorder and calls it after the same steps, with its
    own batch of each: a row is measured on the union of their batches, in the processes' order, each process measures
    its share, and the first alone writes. Made or called by the first alone, it would wait for the others: it says so
    after 30 seconds, and gives up after 5 minutes. Parameters sharded by FSDP2 (fully_shard) take cross_layer alone, from
    layer kernels, at theta after the step: curvature along the update is not known then.

    Args:
        folder: of the run, from the working directory of now. Only the first process's counts.
        objective: the model that is trained, or an hp.Objective of it.
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
        beside: where the folder holds a run that is not gone on with, record into FOLDER-2, FOLDER-3, ... and say so.
        seed: of the probes' random vectors.
        processes: who records together; default: all processes of torch.distributed, in groups of their own. With
            hessprobe.machine.processes.ALONE this process records its own batches alone, whatever others do.
        forward, targets, loss, ignore_index, batch_first, auxiliary: how the model's outputs and loss come from a batch, as
            of hp.Objective; with a model alone. Default: cross-entropy of the model's outputs with the batch's labels.

    Attributes:
        folder: the run's, as it came to be.
        active: whether anything is recorded still.

    Raises:
        UserError: no trainable parameters, a probe that sharded ones cannot have, an unknown probe or option, a schedule
            that is none, a folder that cannot be written or holds a run already, an objective beside other
            arguments; in every process, where one of them met it.
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
        beside: bool = False,
        seed: int = 0,
        processes: Processes | None = None,
        forward: Callable[..., Any] | None = None,
        targets: Callable[..., Any] | None = None,
        loss: Any = None,
        ignore_index: int | None = None,
        batch_first: bool | None = None,
        auxiliary: Any = None,
    ) -> None:
        self.folder = Path(folder).absolute()  # a program may change its working directory
        arguments = {"loss": loss, "forward": forward, "targets": targets, "ignore_index": ignore_index}
        given = objective_of(objective, {**arguments, "batch_first": batch_first, "auxiliary": auxiliary})
        if processes is None and given.processes.count > 1:
            processes = given.processes
        self.model, self.seed, self.active = given.model, seed, True
        optimizers = optimizer if isinstance(optimizer, Sequence) else [optimizer]
        self.optimizers = [one for one in optimizers if one is not None]
        self._last, self._reasons, self._patience = first_step - 1, {}, Patience()
        self._said: set[str] = set()
        self._rows_recorded = 0
        self._left, self._steps, self._seconds = (
            0.0,
            0,
            0.0,
        )  # the last call's end; the loop's own steps, and their time
        self._meeting = Meeting(processes, next(self.model.parameters(), torch.empty(0)).device)
        self.processes = self._meeting.processes
        self._agreed = self.processes.count == 1  # on the number of the first call's step
        self.objective = copy.copy(given)
        self.objective.processes = self.processes
        try:
            with self.processes.together():
                chosen = choose(probes, every, sequences=sequences, seed=seed)
                check_whole(self.model, chosen.probes)
                self.partition = (
                    partition if isinstance(partition, Partition) else Partition.of(self.model, partition)
                )
                asked = {"steps": steps, "first_step": first_step, "resume": resume, "beside": beside}
                self._meeting.check_alike({**asked, **_settings(chosen, self.partition)})
                for probe in chosen.probes:
                    probe.table(self.partition)  # a mistake in its options is told before there is a folder
                self._chosen = chosen
                self._recorder = self._opened(steps, resume, beside)
            self._labels = self.processes.from_first(self._labels_kept)
        except BaseException as error:
            if hasattr(self, "_recorder"):  # another process has failed
                self._recorder.writer.close()
            self._meeting.leave()
            if isinstance(error, UserError) and (said := for_recorder(str(error))) != str(error):
                raise UserError(said) from error
            raise
        self._measuring = self._measuring_into(self._recorder)
        self._still = self._measuring_into(self._recorder)  # what never knows an update
        self._still.at_present = True
        self._look_ahead(first_step)

    def __call__(
        self,
        step: int,
        batch: Batch | list[Batch] | Callable[[], Batch | list[Batch]],
        *,
        loss: Any = None,
    ) -> Sequence[Measurement]:
        """Measures what is due at this step; returns what was measured, most often nothing. Raises nothing.

        Args:
            step: optimizer steps done before the one just made.
            batch: what the step was made on: a batch or, with gradient accumulation, the list of its micro-batches; or a
                function that returns it, called only when a probe is due. Probes read its first sequences. Of several
                processes each gives its own, of any size.
            loss: what the loop itself computed on this batch, a number or a tensor of one; the first row is compared with
                it, and fails where it is another.
        """
        if not self.active:
            return ()
        if self._left:
            self._steps += 1
            self._seconds += perf_counter() - self._left
        found: Sequence[Measurement] = ()
        try:
            found = self._called(step, batch, loss)
        except Exception as error:  # whatever it is, training must go on
            self._stop(step, error)
        self._left = perf_counter()
        return found

    def _called(self, step: int, batch: Any, loss: Any) -> Sequence[Measurement]:
        try:
            step = index(step)
        except TypeError:
            self._say_once(
                f"step {step!r} is no whole number, and nothing is recorded of it: count optimizer steps, from 0"
            )
            return ()
        if step <= self._last:
            self._say_once(
                f"step {step} came after step {self._last}, and nothing is recorded until steps go on beyond it: count "
                "optimizer steps over the whole run, not from 0 in every epoch, and call once a step, with the list of its "
                "micro-batches where gradients are accumulated",
                "out of order",
            )
            return ()
        self._last = step
        if not self._agreed and not self._agree(step):
            return ()
        due = self._next[1] if self._next[0] == step else self._recorder.due(step)
        found = self._measured(self._measuring, step, due, batch, loss) if due else ()
        if self.active:
            self._look_ahead(step + 1)
        return found

    def check(self, batch: Any, loss: Any = None) -> Check:
        """Measures every probe once, writes no row, prints what it found and returns it; see `Check`.

        Says at once which probes cannot measure and why, and what a row of the others costs in steps of this loop (timed
        between the calls so far, else one gradient of this batch), with what would make it cheaper. Changes nothing of
        training. Of several processes all call it. Raises nothing.

        Args:
            batch, loss: as of a call.

        Cost: a row of every probe, and two gradients of the batch.
        """
        found = Check(step_seconds=math.nan, step_from="nothing is recorded any more", probes=())
        if not self.active:
            LOGGER.warning("recorder.check: %s", found.step_from)
            return found
        try:
            found = self._checked(batch, loss)
            if self.processes.is_first:
                print(found)
        except Exception as error:
            self._stop(max(self._last, 0), error)
        self._left = 0.0  # what was spent here is no step of the loop
        return found

    def measure(self, label: Any, batch: Any, *, loss: Any = None) -> Sequence[Measurement]:
        """Measures all probes at the weights as they are, whatever is due: for a loop over checkpoints. Raises nothing.

        No update is known of such weights, so what is about one is NaN. A label that has been measured is measured anew,
        and its row replaced.

        Args:
            label: where the row stands on the step axis: a whole number from 0 on is the step; anything else, a name or
                a path, takes the next free step, and the log's attribute "labels" (JSON) says step -> label.
            batch, loss: as of a call.
        """
        if not self.active:
            self._say_once("measure: this recorder is closed, and nothing is recorded")
            return ()
        found: Sequence[Measurement] = ()
        step = self._last
        try:
            new = not self._labels.knows(label)
            step = self._labels.step_of(label)
            if new:
                self._recorder.writer.annotate({ATTRIBUTE: json.dumps(self._labels.by_step)})
            probes = [probe for probe in self._recorder.probes if self._recorder.has_place(probe, step)]
            if len(probes) < len(self._recorder.probes):
                self._say_once(
                    f"measure: step {step} ({label}) is none of those that every= and steps= leave room for, and is not "
                    "recorded: give a recorder that measures checkpoints a number as every=, and no steps=",
                    "no place",
                )
            found = self._measured(self._still, step, probes, batch, loss)
        except Exception as error:
            self._stop(step, error)
        self._left = 0.0
        return found

    def retry(self, probe: str | None = None) -> None:
        """Tries a probe (default: all) again at its next row, where it was left out for failing again and again."""
        self._patience.forget(probe)

    def due(self, step: int) -> list[str]:
        """Returns the names of the probes that measure at a step."""
        with suppress(TypeError):  # of something that is no step, none
            return names(self._recorder.due(index(step))) if self.active else []
        return []

    @property
    def rows(self) -> int:
        """How many rows have been recorded so far, failed ones too."""
        return self._rows_recorded

    @property
    def sequences(self) -> int:
        """How many sequences the probe that reads most reads at most."""
        return max((probe.sequences for probe in self._recorder.probes), default=0) if self.active else 0

    def close(self) -> None:
        """Ends the recording; nothing is pending, so a process that dies without it loses nothing. May be repeated."""
        self.active = False
        self._measuring.forget()
        with suppress(OSError):  # the folder may be gone, or not ours any more
            self._recorder.writer.close()
        self._meeting.leave()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self, steps: int | None, resume: bool, beside: bool) -> ProbeRecorder:
        """Returns what writes rows: in the first process, into the run's folder."""

        def lay_out(writer: RowWriter) -> ProbeRecorder:
            chosen = self._chosen
            return ProbeRecorder(
                writer, chosen.probes, self.partition, steps, chosen.schedules, words=for_recorder
            )

        def attributes(folder: Path) -> dict[str, Any]:
            device = next(self.model.parameters()).device
            machine = machine_attributes(folder, device, self.partition, self.processes)
            return {**machine, "seed": self.seed, "recipe": json.dumps(self._chosen.recipe)}

        if not self.processes.is_first:
            return lay_out(NothingWritten())
        found = open_folder(self.folder, attributes, lay_out, resume=resume, beside=beside)
        self.folder = getattr(found.writer, "folder", self.folder)
        return found

    def _labels_kept(self) -> Labels:
        writer: Any = self._recorder.writer
        recorded = [step for probe in self._recorder.probes for step in writer.recorded_steps(probe.name)]
        return Labels(json.loads(writer.attributes.get(ATTRIBUTE, "{}")), max(recorded, default=-1))

    def _measuring_into(self, recorder: ProbeRecorder) -> Measuring:
        return Measuring(self.objective, self.partition, self.optimizers, self.seed, self._meeting, recorder)

    def _look_ahead(self, step: int) -> None:
        """Notes what is due at the coming step, and if anything is, theta and the optimizer as they are before it."""
        self._next = step, self._recorder.due(step)
        try:
            self._measuring.keep_before(step, [p for p in self._next[1] if not self._patience.waits(p.name)])
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

    def _measured(
        self, measuring: Measuring, step: int, due: Sequence[Probe], batch: Any, loss: Any
    ) -> list[Measurement]:
        found, tried = [], list(due)
        if measuring is self._measuring:
            tried = [probe for probe in due if not self._patience.waits(probe.name)]
        try:
            for probe in due:
                if probe not in tried:
                    reason = UserError(self._patience.left_out(probe.name))
                    found.append(self._recorder.fail(probe, step, reason, 0.0))
            if tried:
                found += self._heard(step, self._rows(measuring, step, tried, batch, loss))
        except Exception as error:  # no row can be written any more, or not by all processes
            self._stop(step, error)
        self._labels.used(step)
        self._rows_recorded += len(found)
        return found

    def _rows(
        self, measuring: Measuring, step: int, due: Sequence[Probe], batch: Any, loss: Any
    ) -> list[Measurement]:
        with undisturbed(self.model):
            return measuring.rows(step, due, batch, trained=loss)

    def _heard(self, step: int, found: list[Measurement]) -> list[Measurement]:
        """Says what failed, and lets probes wait that fail again and again: the same ones in all processes."""
        for probe, failure in self.processes.from_first(lambda: [(m.probe, m.failure) for m in found]):
            paused = self._patience.heard(probe, failure)
            if not self.processes.is_first:  # the others say the same
                continue
            if failure:
                self._say(step, probe, failure)
            if paused:
                LOGGER.warning(
                    "step %d: %s has failed alike in %d rows, and is tried ever more seldom from here on (the rows between "
                    "say so); recorder.retry(%r) tries it at its next row",
                    step, probe, PATIENCE + 1, probe,
                )  # fmt: skip
        return found

    def _checked(self, batch: Any, loss: Any) -> Check:
        step, probes = self._last + 1, self._recorder.probes
        trial = self._measuring_into(
            ProbeRecorder(NothingWritten(), probes, self.partition, None, words=for_recorder)
        )
        trial.keep_before(step, probes)
        trial.pretend_update()
        found = self._rows(trial, step, probes, batch, loss)
        taken = sum(row.seconds for row in found)
        if self.processes.from_first(lambda: taken < AGAIN):  # the first pays what torch sets up once
            trial.keep_before(step, probes)
            trial.pretend_update()
            found = self._rows(trial, step, probes, batch, loss)
        if self._steps:
            seconds, known = self._seconds / self._steps, f"the mean of {self._steps:,} so far"
        else:
            with undisturbed(self.model):
                seconds = gradient_seconds(self.objective, self.partition, batch)
            known = "taken as one gradient of this batch"
        return checked(found, probes, self._chosen.schedules, seconds, known)

    def _stop(self, step: Any, error: Exception) -> None:
        """Ends the recording, not the training."""
        lost = isinstance(error, ProcessLost)
        if lost or self.processes.is_first:
            goes_on = "" if lost else "; training goes on"
            reason = for_recorder(str(error) if lost else reason_of(error))
            LOGGER.error("step %s: %s. Recording has stopped%s", step, reason, goes_on)
        with suppress(Exception):
            self.close()

    def _say(self, step: int, what: str, reason: str) -> None:
        """Logs a failure, once as long as its reason stays the same."""
        if self._reasons.get(what) != reason:
            self._reasons[what] = reason
            LOGGER.warning("step %d: %s failed: %s (training goes on)", step, what, reason)

    def _say_once(self, text: str, kind: str = "") -> None:
        if (kind or text) not in self._said:
            self._said.add(kind or text)
            LOGGER.warning("%s", text)


def _settings(chosen: ChosenProbes, partition: Partition) -> dict[str, object]:
    """Returns what follows from a recorder's arguments, and must be alike in all processes."""
    schedules = {name: str(schedule) for name, schedule in chosen.schedules.items()}
    return {"probes and their options": chosen.recipe, "schedules": schedules, "blocks": partition.sizes}
