"""When to measure and where it goes: probes on their schedules, each row into the log, a failed one with its reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Any, Protocol

import numpy as np
import torch

from hessprobe.instruments.instrument import loaded
from hessprobe.instruments.registry import instrument_named
from hessprobe.instruments.row_variables import CHECK_VARIABLES
from hessprobe.instruments.snapshot import Probe, Row, Snapshot
from hessprobe.machine.devices import peak_memory, reset_peak_memory
from hessprobe.machine.processes import ProcessLost
from hessprobe.measuring.failures import reason_of
from hessprobe.measuring.schedule import Every, Schedule
from hessprobe.problem.partition import Partition
from hessprobe.recipe import Recipe
from hessprobe.schema.table import Table

CHECKED = tuple(variable.name for variable in CHECK_VARIABLES)


class RowWriter(Protocol):
    """Where tables and rows go: a RunWriter, or NothingWritten."""

    def add_table(self, table: Table, steps: Sequence[int] | None) -> None:
        """Lays out a table for those steps."""
        ...

    def write(self, table: str, step: int, row: Mapping[str, Any]) -> None:
        """Records one row."""
        ...

    def fail(self, table: str, step: int, reason: str) -> None:
        """Records that a row could not be measured."""
        ...

    def annotate(self, attributes: Mapping[str, str]) -> None:
        """Adds attributes of the run."""
        ...

    def close(self) -> None:
        """Ends the writing."""
        ...


class NothingWritten:
    """The log of a process that is not the first of several: it takes what a RunWriter takes, and keeps none of it."""

    def add_table(self, table: Table, steps: Sequence[int] | None) -> None: ...

    def write(self, table: str, step: int, row: Mapping[str, Any]) -> None: ...

    def fail(self, table: str, step: int, reason: str) -> None: ...

    def annotate(self, attributes: Mapping[str, str]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one probe did at one step; `row` is None where it failed, and `failure` says why."""

    probe: str
    step: int
    seconds: float
    row: Row | None
    failure: str = ""


def build_probes(recipe: Recipe) -> list[Probe]:
    """Returns the instruments that a recipe names, in its order, each once."""
    return [
        loaded(instrument_named(name).probe)(getattr(recipe, name)) for name in dict.fromkeys(recipe.probes)
    ]


class ProbeRecorder:
    """Runs probes at their steps and writes their rows. It never changes what it looks at.

    Args:
        writer: the run's log; each probe's table is laid out in it at once.
        probes: the instruments.
        steps: length of the run: a probe is due at steps 0, every, 2 every, ... below it. None where it is not known.
        schedules: other schedules than that, by probe.
        words: what makes of a failure's reason one whose way out can be typed by who reads it.
    """

    def __init__(
        self,
        writer: RowWriter,
        probes: Sequence[Probe],
        partition: Partition,
        steps: int | None,
        schedules: Mapping[str, Schedule] | None = None,
        words: Callable[[str], str] = str,
    ) -> None:
        self.writer, self.words = writer, words
        self.schedule: dict[str, Container[int]] = {}
        self.probes = list(probes)
        for probe in probes:
            schedule = (schedules or {}).get(probe.name, Every(steps=probe.every))
            rows = schedule.below(steps)
            self.schedule[probe.name] = schedule if rows is None else frozenset(rows)
            table = probe.table(partition)
            table = replace(table, variables=(*table.variables, *CHECK_VARIABLES))
            writer.add_table(table, None if rows is None else list(rows))

    def due(self, step: int) -> list[Probe]:
        """Returns the probes that measure at this step."""
        return [probe for probe in self.probes if step in self.schedule[probe.name]]

    def has_place(self, probe: Probe, step: int) -> bool:
        """Tells whether a probe's table can take a row of this step, due or not."""
        rows = self.schedule[probe.name]
        return not isinstance(rows, frozenset) or step in rows

    def record(
        self, probe: Probe, snapshot: Snapshot, checked: Mapping[str, float] | None = None
    ) -> Measurement:
        """Measures one row and writes it; a probe that raises leaves its row marked with the reason.

        A row whose products are not symmetric beyond rounding fails. Of several processes, where one fails all do, with
        its reason.

        Args:
            checked: the row's variables that are known from its checks (CHECK_VARIABLES); default: NaN.

        Raises:
            UserError: the disk is full.
            ProcessLost: another process has died.
        """
        processes = snapshot.objective.processes
        start = time.perf_counter()
        device = snapshot.parameters.device
        reset_peak_memory(device)
        try:
            with processes.together():
                row: dict[str, Any] = dict(probe.measure(snapshot))
                if not np.isfinite(float(row["loss"])):
                    raise FloatingPointError(f"the loss on the probe's batch is {float(row['loss'])}")
                check_symmetry(float(row.get("symmetry_gap", nan)), snapshot.parameters.dtype)
        except ProcessLost:
            raise
        except Exception as error:  # whatever it is, training must go on
            return self.fail(probe, snapshot.step, error, time.perf_counter() - start)
        seconds = time.perf_counter() - start
        row.update(seconds=seconds, peak_memory=peak_memory(device, processes))
        reset_peak_memory(device)  # what training needs is not what this needed
        row.update({name: (checked or {}).get(name, nan) for name in CHECKED})
        self.writer.write(probe.name, snapshot.step, {name: as_array(value) for name, value in row.items()})
        return Measurement(probe=probe.name, step=snapshot.step, seconds=seconds, row=row)

    def fail(self, probe: Probe, step: int, error: Exception, seconds: float) -> Measurement:
        """Marks one row as not measured, and why.

        Raises:
            UserError: the disk is full.
        """
        reason = self.words(reason_of(error))
        self.writer.fail(probe.name, step, reason)
        return Measurement(probe=probe.name, step=step, seconds=seconds, row=None, failure=reason)


def check_symmetry(gap: float, dtype: torch.dtype) -> None:
    """Raises a FloatingPointError where products are not symmetric beyond rounding; a gap that is NaN was not measured."""
    limit = torch.finfo(dtype).eps ** 0.4
    if gap > limit:
        raise FloatingPointError(
            f"products are not symmetric: |u.Av - v.Au| / (|u| |Av|) is {gap:.2g} and rounding leaves below {limit:.2g}; "
            "they are not those of a curvature matrix. Likely: activations in half precision inside the model's forward; an "
            "autograd.Function whose backward is not the derivative of its forward; randomness or state that changes from "
            "pass to pass"
        )


def as_array(value: Any) -> Any:
    """Returns a tensor as an array of doubles; anything else as it is."""
    return value.detach().double().cpu().numpy() if isinstance(value, torch.Tensor) else value
