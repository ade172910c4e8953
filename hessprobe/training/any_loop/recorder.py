"""The instruments in anybody's training loop: one call a step, which returns at once unless a probe is due.

theta is copied at the call before a due step, so that a row knows the update that was made: it is measured at theta
BEFORE the step, as in hessprobe's own runs, and the update is what training added until the call.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError
from hessprobe.optimization.running import RunningOptimizer
from hessprobe.probes.probe import Probe, Snapshot
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition
from hessprobe.store.writer import RunWriter
from hessprobe.training.any_loop.chosen_probes import Chosen, choose
from hessprobe.training.any_loop.one_process import check_whole, is_follower
from hessprobe.training.any_loop.probe_batches import first_sequences, placed
from hessprobe.training.any_loop.torch_optimizers import running
from hessprobe.training.any_loop.undisturbed import undisturbed
from hessprobe.training.probe_schedule import Schedule
from hessprobe.training.recorder import Measurement, ProbeRecorder
from hessprobe.training.setup import machine_attributes

LOGGER = logging.getLogger("hessprobe")
Due = int | str | Iterable[int] | Schedule


class Recorder:
    """Measures the probes on their schedules while a loop of yours trains, into folder/log.zarr.

    Call it after every optimizer step, with the number of the step (counted over the whole run, from 0) and the step's
    batch. It never changes training: weights, gradients, random states, buffers, modes and hooks stay bit for bit. What
    goes wrong in a measurement is written into its row and logged (logger "hessprobe"); training goes on.

    Args:
        folder: of the run.
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

    Raises:
        UserError: no trainable parameters, sharded ones, an unknown probe or option, a schedule that is none, a folder
            that cannot be written or holds a run already.

    Cost: a step that is not due takes some microseconds, the step before a due one a copy of theta (p numbers, held
    until then), and of the optimizer's state where the preconditioner probe is due.
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
    ) -> None:
        self.folder = Path(folder)
        self.objective = objective if isinstance(objective, Objective) else Objective(objective)
        self.model = self.objective.model
        chosen = choose(probes, every, sequences=sequences, seed=seed)
        check_whole(self.model)
        self.partition = (
            partition if isinstance(partition, Partition) else Partition.of(self.model, partition)
        )
        optimizers = optimizer if isinstance(optimizer, Sequence) else [optimizer]
        self.optimizers = [one for one in optimizers if one is not None]
        self.seed = seed
        self.active = not is_follower()
        self._last, self._seen_wrong, self._reasons = first_step - 1, False, {}
        self._before: tuple[int, Tensor, RunningOptimizer | None] | None = None
        self._next: tuple[int, list[Probe]] = (first_step, [])
        if self.active:
            writer = self._writer(resume, chosen.recipe)
            try:
                self._recorder = ProbeRecorder(writer, chosen.probes, self.partition, steps, chosen.schedules)
            except BaseException:
                writer.close()
                raise
            self._look_ahead(first_step)

    def __call__(
        self, step: int, batch: Batch | list[Batch] | Callable[[], Batch | list[Batch]]
    ) -> Sequence[Measurement]:
        """Measures what is due at this step; returns what was measured, most often nothing.

        Args:
            step: optimizer steps done before the one just made.
            batch: what the step was made on: a batch or, with gradient accumulation, the list of its micro-batches; or a
                function that returns it, called only when a probe is due. Probes read its first sequences.
        """
        if not self.active:
            return ()
        step = index(step)
        if step <= self._last:
            return self._out_of_order(step)
        self._last = step
        due = self._next[1] if self._next[0] == step else self._recorder.due(step)
        found = self._measured(step, due, batch) if due else ()
        if self.active:
            self._look_ahead(step + 1)
        return found

    def due(self, step: int) -> list[str]:
        """Returns the names of the probes that measure at a step."""
        return [probe.name for probe in self._recorder.due(step)] if self.active else []

    @property
    def sequences(self) -> int:
        """How many sequences the probe that reads most reads at most."""
        return max((probe.sequences for probe in self._recorder.probes), default=0) if self.active else 0

    def close(self) -> None:
        """Ends the recording; nothing is pending, so a process that dies without it loses nothing."""
        if hasattr(self, "_recorder"):
            self._recorder.writer.close()
        self.active, self._before = False, None

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
            attributes = machine_attributes(self.folder, device, self.partition)
            return RunWriter.create(
                self.folder, {**attributes, "seed": self.seed, "recipe": json.dumps(recipe)}
            )
        except UserError as error:
            raise UserError(str(error).replace("--resume", "resume=True")) from error

    def _look_ahead(self, step: int) -> None:
        """Notes what is due at the coming step, and if anything is, theta and the optimizer as they are before it."""
        due = self._recorder.due(step)
        self._next = step, due
        self._before = None
        if not due:
            return
        try:
            optimizer = None
            if self.optimizers and any(probe.needs_optimizer for probe in due):
                optimizer = running(self.optimizers, self.model, self.partition)
            self._before = step, _measurable(self.partition.vector(self.model)), optimizer
        except Exception as error:  # most likely no memory for a copy: the row then has no update
            self._say(step, "update", f"theta before the step could not be kept: {error}")

    def _measured(self, step: int, due: Sequence[Probe], batch: Any) -> list[Measurement]:
        found: list[Measurement] = []
        try:
            with undisturbed(self.model):
                start = time.perf_counter()
                try:
                    snapshot = self._snapshot(step, batch() if callable(batch) else batch)
                except Exception as error:
                    seconds = time.perf_counter() - start
                    found = [self._recorder.fail(probe, step, error, seconds) for probe in due]
                else:
                    found = [self._row(probe, snapshot) for probe in due]
        except Exception as error:  # no row can be written any more
            LOGGER.error("step %d: %s. Recording has stopped; training goes on", step, error)
            self.close()
        for measurement in found:
            if measurement.failure:
                self._say(step, measurement.probe, measurement.failure)
        return found

    def _row(self, probe: Probe, snapshot: Snapshot) -> Measurement:
        start = time.perf_counter()
        try:
            own = replace(snapshot, batches=first_sequences(self.objective, snapshot.batches, probe))
        except Exception as error:
            return self._recorder.fail(probe, snapshot.step, error, time.perf_counter() - start)
        try:
            return self._recorder.record(probe, own)
        except (
            ValueError
        ) as error:  # a row that does not fit the probe's own table, or (UserError) a full disk
            if isinstance(error, UserError):
                raise
            return self._recorder.fail(probe, snapshot.step, error, time.perf_counter() - start)

    def _snapshot(self, step: int, batch: Any) -> Snapshot:
        theta = _measurable(self.partition.vector(self.model))
        before, optimizer = None, None
        if self._before is not None and self._before[0] == step:
            _, before, optimizer = self._before
        self._before = None
        return Snapshot(
            step=step,
            objective=self.objective,
            partition=self.partition,
            parameters=theta if before is None else before,
            batches=self.objective.micro_batches(placed(batch, theta.device)),
            update=None if before is None else theta.sub_(before),
            seed=self.seed,
            optimizer=optimizer,
        )

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


def _measurable(theta: Tensor) -> Tensor:
    """Returns theta in at least float32: curvature in half precision is noise."""
    return theta.float() if theta.dtype in (torch.float16, torch.bfloat16) else theta
