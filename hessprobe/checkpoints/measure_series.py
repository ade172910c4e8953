"""Checkpoints measured without training: `hessprobe probe`. Each is a row, at its own step, of the tables that a run has.

No update is known of a checkpoint, so what is about one is NaN. A row that fails is marked; the others go on.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch import nn

from hessprobe.checkpoints.own import OwnCheckpoints, own_checkpoint
from hessprobe.checkpoints.pretrained import PretrainedCheckpoints, spread
from hessprobe.checkpoints.series import MEASURED_WITH, CheckpointSeries, Reader, steps_of
from hessprobe.checkpoints.state_dicts import StateDicts
from hessprobe.errors import RunFailed, UserError
from hessprobe.instruments.snapshot import Probe
from hessprobe.machine.devices import pick_device
from hessprobe.measuring.console import RunConsole
from hessprobe.measuring.loggers import ScalarLog, check_loggers
from hessprobe.measuring.provenance import machine_attributes
from hessprobe.measuring.row_recorder import Measurement, ProbeRecorder, build_probes
from hessprobe.measuring.schedule import At
from hessprobe.measuring.snapshots import Snapshots
from hessprobe.measuring.undisturbed import undisturbed
from hessprobe.problem.batches import pieces_of
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.problem.row_checks import RowChecks
from hessprobe.recipe import PROBES, Recipe
from hessprobe.store.writer import RunWriter
from hessprobe.training.builds import RECIPE_FILE

# Logits of one micro-batch, in entries (256 MiB in float32): a large vocabulary would else fill the memory.
LOGITS = 2**26


def open_series(
    models: Sequence[str],
    settings: Sequence[str] = (),
    *,
    data: str | None = None,
    sequences: int | None = None,
    context: int | None = None,
    model: str | None = None,
) -> CheckpointSeries:
    """Returns checkpoints of one model, to be measured; no weights are read yet.

    Args:
        models: runs' folders or checkpoint files; or folders of transformers (one that holds checkpoint-N folders stands
            for all of these) and names on the Hub, NAME@REVISION among them.
        settings: `a.b=c` for the instruments' sections, data, partition, seed, device.
        data: another source than the run's own; see DataRecipe.source. For a classifier lines of JSON.
        sequences: how many a row reads (the preconditioner probe reads as many again, held out).
        context: tokens in a sequence.
        model: "module:function" that makes the model whose weights the files hold: Lightning's .ckpt, plain state_dicts.

    Raises:
        UserError: no such model, models that differ, a kind that is not known, a missing library, a mistaken setting.
    """
    if model is not None:
        return StateDicts(models, settings, model=model, data=data, sequences=sequences, context=context)
    files = {given: own_checkpoint(given) for given in models}
    own = [file for file in files.values() if file is not None]
    how: dict[str, Any] = {"data": data, "sequences": sequences, "context": context}
    if len(own) == len(files):
        return OwnCheckpoints(own, list(files), settings, **how)
    if own:
        other = next(given for given, file in files.items() if file is None)
        raise UserError(
            f"{own[0]} is a run of hessprobe and {other} is not: a series is of one model; measure them one by one"
        )
    return PretrainedCheckpoints([part for given in files for part in spread(given)], settings, **how)


def measure_series(series: CheckpointSeries, folder: Path) -> None:
    """Measures every checkpoint into folder/log.zarr, laid out as a run's, and writes folder/recipe.toml.

    Raises:
        UserError: weights or data that cannot be read, a folder that holds a run or cannot be written, a full disk.
        RunFailed: no row could be measured; the log says why.
    """
    recipe, folder = series.recipe, folder.absolute()
    if (folder / "log.zarr").exists():
        raise UserError(f"{folder} holds a run already: give another folder with --out")
    check_loggers(recipe.loggers)
    if recipe.training.threads:
        torch.set_num_threads(recipe.training.threads)
    device = pick_device(recipe.device)
    reader = series.reader()
    model = series.model().to(device)
    steps, counted = steps_of(series.known)
    console = RunConsole(max(steps) + 1)
    partition = _partition(model, recipe.partition, console)
    probes = build_probes(recipe)
    for probe in probes:
        probe.table(partition)  # a mistake in its section is told before there is a folder
    if counted:
        console.say("steps", counted)
    for note in getattr(series, "notes", ()):
        console.say("note", note)
    described, origins = _described(series, steps), {str(steps[0]): series.origin(0)}
    attributes = {
        **machine_attributes(folder, device, partition),
        "recipe": json.dumps(described),
        "seed": recipe.seed,
        "data": json.dumps(dict(reader.fingerprint)),
        "checkpoints": json.dumps(origins),
    }
    with (
        RunWriter.create(folder, attributes) as writer,
        ScalarLog.open(recipe.loggers, folder, attributes, console.say) as scalars,
    ):
        _write_recipe(series, folder)
        due = dict.fromkeys((probe.name for probe in probes), At(steps=frozenset(steps)))
        measuring = _Measuring(
            series,
            ProbeRecorder(writer, probes, partition, None, due),
            series.objective(model),
            partition,
            reader,
        )
        found = []
        for number, step in enumerate(steps):
            for measurement in measuring.rows(number, step):
                _say(console, measurement, series.names[number])
                scalars.measured(measurement)
                found.append(measurement)
            if number and number in measuring.placed:
                origins[str(step)] = series.origin(number)
                writer.annotate({"checkpoints": json.dumps(origins)})
    if all(measurement.row is None for measurement in found):
        raise RunFailed(
            f"no row could be measured; {folder / 'log.zarr'} says why. The first: {found[0].failure}"
        )


class _Measuring:
    """Measures the checkpoints of a series by every probe, one checkpoint after the other."""

    def __init__(
        self,
        series: CheckpointSeries,
        recorder: ProbeRecorder,
        objective: Objective,
        partition: Partition,
        reader: Reader,
    ) -> None:
        self.series, self.recorder, self.objective, self.reader = series, recorder, objective, reader
        self.snapshots = Snapshots(objective=objective, partition=partition, seed=series.recipe.seed)
        # A model of hessprobe's own repeats itself, its sequences are apart, and its loss is the objective's.
        own = isinstance(series, OwnCheckpoints)
        self.checks = None if own else RowChecks(objective, partition, undisturbed)
        self.placed = {0}  # the first's weights are the model's already

    def rows(self, number: int, step: int) -> Iterator[Measurement]:
        """Measures one checkpoint, whose rows are at that step."""
        began = time.perf_counter()
        try:
            if number not in self.placed:
                self.series.place(number, self.objective.model)
                self.placed.add(number)
        except Exception as error:  # whatever it is, the other checkpoints must be measured
            seconds = time.perf_counter() - began
            yield from (self.recorder.fail(probe, step, error, seconds) for probe in self.recorder.probes)
            return
        for probe in self.recorder.probes:
            began = time.perf_counter()
            try:
                batches = self._batches(probe, number)
                # The batch is the row's own, so that its loss is known; and there is no loop that trains on it.
                bits = {"activation_bits": self.checks.check(batches).activation_bits} if self.checks else {}
                snapshot = self.snapshots.take(step, batches)
            except Exception as error:
                yield self.recorder.fail(probe, step, error, time.perf_counter() - began)
                continue
            yield self.recorder.record(probe, snapshot, bits)

    def _batches(self, probe: Probe, number: int) -> MicroBatches:
        """Returns the probe's batch as micro-batches that a large vocabulary leaves room for."""
        batch = self.reader.batch(
            seed=self.series.recipe.seed,
            step=self.series.reads[number],
            sequences=probe.sequences,
            stream=f"probe/{probe.name}",
        )
        parts = batch
        if not isinstance(batch, list):
            targets = batch["labels"] if isinstance(batch, dict) else batch[1]
            pieces = math.ceil(targets.numel() * self.series.vocabulary / LOGITS)
            parts = pieces_of(batch, pieces) if pieces > 1 else [batch]
        device = next(self.objective.model.parameters()).device
        return self.objective.held(parts).placed(device)


def _partition(model: nn.Module, by: str, console: RunConsole) -> Partition:
    with warnings.catch_warnings(action="ignore"):  # its notes are said in the command's own way
        partition = Partition.of(model, by)
    for note in partition.notes:
        console.say("note", note)
    return partition


def _described(series: CheckpointSeries, steps: Sequence[int]) -> dict[str, Any]:
    """Returns the log's recipe: how it was measured, which model, and which checkpoint each step is."""
    checkpoints = dict(zip(map(str, steps), series.names, strict=True))
    return {**_measured_with(series.recipe), "model": series.described(), "checkpoints": checkpoints}


def _measured_with(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe's values that the measurement took: the sections of its own probes alone."""
    kept = set(MEASURED_WITH) - {"training"} - set(PROBES) | set(recipe.probes)
    dumped = recipe.model_dump(mode="json", include=kept, exclude_none=True)
    for name in recipe.probes:
        del dumped[name]["every"]  # the checkpoints say when
    return dumped


def _write_recipe(series: CheckpointSeries, folder: Path) -> None:
    command = f"# Measured without training: hessprobe probe {' '.join(series.names)}\n"
    try:
        text = command + tomli_w.dumps(_measured_with(series.recipe))
        (folder / RECIPE_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write {folder / RECIPE_FILE} ({error.strerror}); free some space there"
        ) from error


def _say(console: RunConsole, measurement: Measurement, name: str) -> None:
    if measurement.row is None:
        console.say(
            f"step {measurement.step:>{console.width}}",
            f"{measurement.probe}: failed on {name}: {measurement.failure}",
        )
    else:
        console.measured(measurement)
