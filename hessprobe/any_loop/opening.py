"""From what a user passes to a log that rows can be recorded into: agreed on by all processes, or refused in all."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hessprobe.any_loop.chosen_probes import ChosenProbes, choose
from hessprobe.any_loop.labels import ATTRIBUTE, Labels
from hessprobe.any_loop.meeting import Meeting
from hessprobe.any_loop.run_folder import open_folder
from hessprobe.any_loop.sharded_parameters import check_whole
from hessprobe.any_loop.words import for_recorder
from hessprobe.errors import UserError
from hessprobe.machine.processes import Processes
from hessprobe.measuring.provenance import machine_attributes
from hessprobe.measuring.row_recorder import NothingWritten, ProbeRecorder, RowWriter
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition


@dataclass(frozen=True, kw_only=True)
class RecorderArguments:
    """What a recorder is asked for, as of `Recorder`."""

    probes: Any
    every: Any
    partition: str | Callable[[str], str] | Partition
    steps: int | None
    sequences: int | None
    first_step: int
    resume: bool
    beside: bool
    seed: int
    processes: Processes | None


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A log laid out, and what its rows are measured with.

    Attributes:
        folder: the run's, as it came to be; in other processes than the first, as it was asked for.
        objective: with the meeting's processes.
        recorder: writes the rows; of other processes than the first, nothing.
        labels: of the log so far.
    """

    folder: Path
    meeting: Meeting
    objective: Objective
    partition: Partition
    chosen: ChosenProbes
    recorder: ProbeRecorder
    labels: Labels


def opened(folder: Path, given: Objective, asked: RecorderArguments) -> Opened:
    """Returns the log of a run, new or gone on with.

    Raises:
        UserError: see `Recorder`; in all processes where one of them met it.
    """
    processes = asked.processes
    if processes is None and given.processes.count > 1:
        processes = given.processes
    meeting = Meeting(processes, next(given.model.parameters(), torch.empty(0)).device)
    processes, recorder = meeting.processes, None
    objective = copy.copy(given)
    objective.processes = processes
    try:
        with processes.together():
            chosen = choose(asked.probes, asked.every, sequences=asked.sequences, seed=asked.seed)
            check_whole(given.model, chosen.probes)
            by = asked.partition
            partition = by if isinstance(by, Partition) else Partition.of(given.model, by)
            meeting.check_alike(_settings(asked, chosen, partition))
            for probe in chosen.probes:
                probe.table(partition)  # a mistake in its options is told before there is a folder
            recorder = _laid_out(folder, objective, asked, chosen, partition)
        labels = processes.from_first(lambda: _labels_kept(recorder))
    except BaseException as error:
        if recorder is not None:  # another process has failed
            recorder.writer.close()
        meeting.leave()
        if isinstance(error, UserError) and (said := for_recorder(str(error))) != str(error):
            raise UserError(said) from error
        raise
    return Opened(
        folder=getattr(recorder.writer, "folder", folder),
        meeting=meeting,
        objective=objective,
        partition=partition,
        chosen=chosen,
        recorder=recorder,
        labels=labels,
    )


def _laid_out(
    folder: Path, objective: Objective, asked: RecorderArguments, chosen: ChosenProbes, partition: Partition
) -> ProbeRecorder:
    """Returns what writes rows: in the first process, into the run's folder."""
    processes = objective.processes

    def lay_out(writer: RowWriter) -> ProbeRecorder:
        return ProbeRecorder(
            writer, chosen.probes, partition, asked.steps, chosen.schedules, words=for_recorder
        )

    def attributes(folder: Path) -> dict[str, Any]:
        device = next(objective.model.parameters()).device
        machine = machine_attributes(folder, device, partition, processes)
        return {**machine, "seed": asked.seed, "recipe": json.dumps(chosen.recipe)}

    if not processes.is_first:
        return lay_out(NothingWritten())
    return open_folder(folder, attributes, lay_out, resume=asked.resume, beside=asked.beside)


def _labels_kept(recorder: ProbeRecorder) -> Labels:
    writer: Any = recorder.writer
    recorded = [step for probe in recorder.probes for step in writer.recorded_steps(probe.name)]
    return Labels(json.loads(writer.attributes.get(ATTRIBUTE, "{}")), max(recorded, default=-1))


def _settings(asked: RecorderArguments, chosen: ChosenProbes, partition: Partition) -> dict[str, object]:
    """Returns what a recorder was given, and what follows from it, that must be alike in all processes."""
    names = ("steps", "first_step", "resume", "beside")
    return {
        **{name: getattr(asked, name) for name in names},
        "probes and their options": chosen.recipe,
        "schedules": {name: str(schedule) for name, schedule in chosen.schedules.items()},
        "blocks": partition.sizes,
    }
