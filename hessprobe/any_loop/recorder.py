"""The instruments in anybody's training loop: one call a step, which returns at once unless a probe is due.

theta is copied at the call before a due step, so that a row knows the update that was made: it is measured at theta
BEFORE the step, as in hessprobe's own runs, and the update is what training added until the call. The processes of a
data-parallel loop put their batches together, and each measures its share of them.
"""

from __future__ import annotations

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

from torch import nn

from hessprobe.any_loop.chosen_probes import Chosen
from hessprobe.any_loop.complaints import Complaints
from hessprobe.any_loop.labels import ATTRIBUTE
from hessprobe.any_loop.measuring import names
from hessprobe.any_loop.objective_arguments import objective_of
from hessprobe.any_loop.opening import RecorderArguments, opened
from hessprobe.any_loop.rows import Rows
from hessprobe.any_loop.trial import Check
from hessprobe.any_loop.words import for_recorder
from hessprobe.machine.processes import Processes, ProcessLost
from hessprobe.measuring.failures import reason_of
from hessprobe.measuring.row_recorder import Measurement
from hessprobe.measuring.schedule import Schedule
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition

LOGGER = logging.getLogger("hessprobe")
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
        arguments = {"loss": loss, "forward": forward, "targets": targets, "ignore_index": ignore_index}
        given = objective_of(objective, {**arguments, "batch_first": batch_first, "auxiliary": auxiliary})
        self.model, self.seed, self.active = given.model, seed, True
        optimizers = optimizer if isinstance(optimizer, Sequence) else [optimizer]
        self.optimizers = [one for one in optimizers if one is not None]
        asked = RecorderArguments(
            probes=probes, every=every, partition=partition, steps=steps, sequences=sequences, first_step=first_step,
            resume=resume, beside=beside, seed=seed, processes=processes,
        )  # fmt: skip
        whole = Path(folder).absolute()  # a program may change its working directory
        self._opened = opened(whole, given, asked)
        self.folder, self.objective = self._opened.folder, self._opened.objective
        self.partition, self.processes = self._opened.partition, self.objective.processes
        self._recorder, self._complaints = self._opened.recorder, Complaints()
        self._measuring = Rows(self._opened, self.optimizers, seed, self._complaints)
        self._last, self._rows_recorded = first_step - 1, 0
        self._agreed = self.processes.count == 1  # on the number of the first call's step
        self._left = 0.0  # the last call's end
        self._steps, self._seconds = 0, 0.0  # the loop's own, between calls
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
            self._complaints.once(
                f"step {step!r} is no whole number, and nothing is recorded of it: count optimizer steps, from 0"
            )
            return ()
        if step <= self._last:
            self._complaints.once(
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
        found = self._recorded(step, self._measuring.of_step(step, due, batch, loss)) if due else ()
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
            found = self._measuring.trial(self._last + 1, batch, loss, (self._steps, self._seconds))
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
            self._complaints.once("measure: this recorder is closed, and nothing is recorded")
            return ()
        found: Sequence[Measurement] = ()
        step = self._last
        try:
            labels = self._opened.labels
            new = not labels.knows(label)
            step = labels.step_of(label)
            if new:
                self._recorder.writer.annotate({ATTRIBUTE: json.dumps(labels.by_step)})
            probes = [probe for probe in self._recorder.probes if self._recorder.has_place(probe, step)]
            if len(probes) < len(self._recorder.probes):
                self._complaints.once(
                    f"measure: step {step} ({label}) is none of those that every= and steps= leave room for, and is not "
                    "recorded: give a recorder that measures checkpoints a number as every=, and no steps=",
                    "no place",
                )
            found = self._recorded(step, self._measuring.as_it_is(step, probes, batch, loss))
        except Exception as error:
            self._stop(step, error)
        self._left = 0.0
        return found

    def retry(self, probe: str | None = None) -> None:
        """Tries a probe (default: all) again at its next row, where it was left out for failing again and again."""
        self._measuring.patience.forget(probe)

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
        self._opened.meeting.leave()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _look_ahead(self, step: int) -> None:
        """Notes what is due at the coming step, and if anything is, theta and the optimizer as they are before it."""
        self._next = step, self._recorder.due(step)
        self._measuring.keep_before(*self._next)

    def _agree(self, step: int) -> bool:
        """Compares the processes' steps at the first call, due or not; ends the recording where they differ."""
        self._agreed = True
        try:
            self._opened.meeting.check_step(step)
        except Exception as error:
            self._stop(step, error)
        return self.active

    def _recorded(self, step: int, rows: Iterable[Measurement]) -> list[Measurement]:
        """Returns rows that are measured one after the other, as far as they came."""
        found = []
        try:
            for row in rows:
                found.append(row)  # noqa: PERF402 (those before a failure are kept)
        except Exception as error:  # no row can be written any more, or not by all processes
            self._stop(step, error)
        self._opened.labels.used(step)
        self._rows_recorded += len(found)
        return found

    def _stop(self, step: Any, error: Exception) -> None:
        """Ends the recording, not the training."""
        lost = isinstance(error, ProcessLost)
        if lost or self.processes.is_first:
            goes_on = "" if lost else "; training goes on"
            reason = for_recorder(str(error) if lost else reason_of(error))
            LOGGER.error("step %s: %s. Recording has stopped%s", step, reason, goes_on)
        with suppress(Exception):
            self.close()
