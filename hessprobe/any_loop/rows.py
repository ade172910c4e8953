"""The rows of a call: of the probes that are due, those are tried that do not fail again and again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from hessprobe.any_loop.complaints import Complaints
from hessprobe.any_loop.measuring import Measuring
from hessprobe.any_loop.opening import Opened
from hessprobe.any_loop.patience import PATIENCE, Patience
from hessprobe.any_loop.trial import Check, checked, gradient_seconds
from hessprobe.any_loop.words import for_recorder
from hessprobe.errors import UserError
from hessprobe.instruments.snapshot import Probe
from hessprobe.measuring.row_recorder import Measurement, NothingWritten, ProbeRecorder
from hessprobe.measuring.undisturbed import undisturbed

LOGGER = logging.getLogger("hessprobe")
AGAIN = 5.0  # seconds: rows that take less in all are tried twice, and the second time counts


class Rows:
    """Measures what a recorder is called for, and leaves training undisturbed.

    Args:
        optimizers: what trains.
        seed: of the probes' random vectors.
    """

    def __init__(self, opened: Opened, optimizers: Sequence[Any], seed: int, complaints: Complaints) -> None:
        self.opened, self.recorder, self.processes = opened, opened.recorder, opened.objective.processes
        self._optimizers, self._seed, self._complaints = optimizers, seed, complaints
        self.patience = Patience()
        self._stepping, self._still = self._into(opened.recorder), self._into(opened.recorder)
        self._still.at_present = True  # it never knows an update

    def keep_before(self, step: int, due: Sequence[Probe]) -> None:
        """Notes theta, and the optimizer, as they are before a step at which something is due."""
        try:
            self._stepping.keep_before(step, [probe for probe in due if not self.patience.waits(probe.name)])
        except Exception as error:  # most likely no memory for a copy: the row then has no update
            self._complaints.failed(step, "update", f"theta before the step could not be kept: {error}")

    def forget(self) -> None:
        """Frees what was noted of the time before a step."""
        self._stepping.forget()

    def of_step(self, step: int, due: Sequence[Probe], batch: Any, loss: Any) -> Iterator[Measurement]:
        """Yields the rows of a step that was made: first those that are left out, then what was measured."""
        tried = []
        for probe in due:
            if self.patience.waits(probe.name):
                reason = UserError(self.patience.left_out(probe.name))
                yield self.recorder.fail(probe, step, reason, 0.0)
            else:
                tried.append(probe)
        if tried:
            yield from self._heard(step, self._measured(self._stepping, step, tried, batch, loss))

    def as_it_is(self, step: int, due: Sequence[Probe], batch: Any, loss: Any) -> Iterator[Measurement]:
        """Yields the rows of the weights as they are, whatever failed before."""
        if due:
            yield from self._heard(step, self._measured(self._still, step, due, batch, loss))

    def trial(self, step: int, batch: Any, loss: Any, known: tuple[int, float]) -> Check:
        """Returns what a row of every probe costs; none is written.

        Args:
            known: how many steps the loop has made between calls, and in how many seconds.
        """
        probes, partition = self.recorder.probes, self.opened.partition
        trial = self._into(ProbeRecorder(NothingWritten(), probes, partition, None, words=for_recorder))

        def tried() -> list[Measurement]:
            trial.keep_before(step, probes)
            trial.pretend_update()
            return self._measured(trial, step, probes, batch, loss)

        found = tried()
        taken = sum(row.seconds for row in found)
        if self.processes.from_first(lambda: taken < AGAIN):  # the first pays what torch sets up once
            found = tried()
        if known[0]:
            seconds, how = known[1] / known[0], f"the mean of {known[0]:,} so far"
        else:
            with undisturbed(self.opened.objective.model):
                seconds = gradient_seconds(self.opened.objective, partition, batch)
            how = "taken as one gradient of this batch"
        return checked(found, probes, self.opened.chosen.schedules, seconds, how)

    def _into(self, recorder: ProbeRecorder) -> Measuring:
        opened = self.opened
        return Measuring(
            opened.objective, opened.partition, self._optimizers, self._seed, opened.meeting, recorder
        )

    def _measured(
        self, measuring: Measuring, step: int, due: Sequence[Probe], batch: Any, loss: Any
    ) -> list[Measurement]:
        with undisturbed(self.opened.objective.model):
            return measuring.rows(step, due, batch, trained=loss)

    def _heard(self, step: int, found: list[Measurement]) -> list[Measurement]:
        """Says what failed, and lets probes wait that fail again and again: the same ones in all processes."""
        for probe, failure in self.processes.from_first(lambda: [(m.probe, m.failure) for m in found]):
            paused = self.patience.heard(probe, failure)
            if not self.processes.is_first:  # the others say the same
                continue
            if failure:
                self._complaints.failed(step, probe, failure)
            if paused:
                LOGGER.warning(
                    "step %d: %s has failed alike in %d rows, and is tried ever more seldom from here on (the rows between "
                    "say so); recorder.retry(%r) tries it at its next row",
                    step, probe, PATIENCE + 1, probe,
                )  # fmt: skip
        return found
