"""Rows measured once and written nowhere: whether each probe can measure, and what a row costs in steps of the loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hessprobe.instruments.snapshot import Probe
from hessprobe.measuring.row_recorder import Measurement
from hessprobe.measuring.schedule import Every, Schedule
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition

SHARE = 0.1  # of the loop's own time that measuring may take without a hint


@dataclass(frozen=True, kw_only=True)
class ProbeCheck:
    """What one probe's row came to.

    Attributes:
        probe: its name.
        failure: why it cannot be measured; "" where it can.
        seconds: of one row, nan where it failed.
        steps: the same in steps of the loop.
        schedule: when rows are due, in words.
        share: of the loop's own time that its rows take; nan where the schedule has no fixed distance.
        cheaper: what would make it cheaper, as arguments of a recorder; none where it is cheap.
    """

    probe: str
    failure: str
    seconds: float
    steps: float
    schedule: str
    share: float
    cheaper: tuple[str, ...]

    def __str__(self) -> str:
        if self.failure:
            return f"cannot be measured: {self.failure}"
        share = "" if math.isnan(self.share) else f", {self.share:.0%} of training"
        line = f"a row costs {self.steps:,.1f} steps ({_said_seconds(self.seconds)}); {self.schedule}{share}"
        return f"{line}. Cheaper: {'; or '.join(self.cheaper)}" if self.cheaper else line


@dataclass(frozen=True, kw_only=True)
class Check:
    """What `Recorder.check` found; its text says it in a line a probe.

    Attributes:
        step_seconds: of one step of the loop.
        step_from: how that is known.
        probes: what each probe's row came to.
    """

    step_seconds: float
    step_from: str
    probes: tuple[ProbeCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether every probe can be measured."""
        return not any(probe.failure for probe in self.probes)

    def __str__(self) -> str:
        width = max((len(probe.probe) for probe in self.probes), default=0)
        lines = [f"a step of this loop takes {_said_seconds(self.step_seconds)} ({self.step_from})"]
        return "\n".join([*lines, *(f"{probe.probe:<{width}}  {probe}" for probe in self.probes)])


def checked(
    measured: Sequence[Measurement],
    probes: Sequence[Probe],
    schedules: Mapping[str, Schedule],
    step_seconds: float,
    step_from: str,
) -> Check:
    """Returns the check of rows that were measured, one a probe."""
    of = {measurement.probe: measurement for measurement in measured}
    found = [
        _probe_check(of[probe.name], probe, schedules[probe.name], step_seconds)
        for probe in probes
        if probe.name in of
    ]
    return Check(step_seconds=step_seconds, step_from=step_from, probes=tuple(found))


def gradient_seconds(objective: Objective, partition: Partition, batch: Any) -> float:
    """Returns how long one gradient of a whole batch takes in this process, after one to warm up; nan if it fails."""
    try:
        given = batch() if callable(batch) else batch
        own = objective.alone
        float(own.gradient(given, partition)[0])  # waits for the device
        start = time.perf_counter()
        float(own.gradient(given, partition)[0])
        return time.perf_counter() - start
    except Exception:  # the rows say what is wrong with it
        return math.nan


def _probe_check(measured: Measurement, probe: Probe, schedule: Schedule, step_seconds: float) -> ProbeCheck:
    seconds = math.nan if measured.row is None else measured.seconds
    steps = seconds / step_seconds if step_seconds > 0 else math.nan
    share = steps / schedule.steps if isinstance(schedule, Every) else math.nan
    dear = share > SHARE or (math.isnan(share) and steps > 1)
    return ProbeCheck(
        probe=probe.name,
        failure=measured.failure,
        seconds=seconds,
        steps=steps,
        schedule=str(schedule),
        share=share,
        cheaper=tuple(_cheaper(measured, probe, schedule, steps)) if dear and measured.row else (),
    )


def _cheaper(measured: Measurement, probe: Probe, schedule: Schedule, steps: float) -> list[str]:
    """Returns arguments of a recorder that would make a row, or all rows, cheaper."""
    found = []
    if isinstance(schedule, Every):
        every = _rounded_up(steps / SHARE)
        found.append(f"every={json.dumps({probe.name: every})} takes {steps / every:.0%}")
    section: Any = getattr(probe, "recipe", None)
    if section is None or not hasattr(section, "sequences"):
        return found
    if getattr(section, "preset", "light") != "light":
        return [*found, json.dumps({probe.name: {"preset": "light"}})]
    assert measured.row is not None
    read = int(float(measured.row["sequences"]))
    if hasattr(section, "curvature_sequences"):
        sizes = [size for size in section.curvature_sequences if size <= read // 4] or [max(2, read // 4)]
        found.append(
            json.dumps({probe.name: {"curvature_sequences": sizes, "held_out_sequences": max(2, read // 4)}})
        )
    elif read >= 8:
        found.append(json.dumps({probe.name: {"sequences": read // 2}}))
    return found


def _rounded_up(number: float) -> int:
    """Returns a whole number of two digits, not below the given one."""
    unit = 10 ** max(0, math.floor(math.log10(max(number, 1))) - 1)
    return math.ceil(number / unit) * unit


def _said_seconds(seconds: float) -> str:
    if math.isnan(seconds):
        return "an unknown time"
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1000 * seconds:,.3g} ms"
