"""The run: warm up, take outer steps, measure when a probe is due, record, save. Resumes where it was cut off."""

from __future__ import annotations

import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hessprobe.machine.devices import peak_memory, reset_peak_memory
from hessprobe.machine.process_group import own_device
from hessprobe.machine.processes import ALONE, Processes, together
from hessprobe.measuring.loggers import check_loggers
from hessprobe.measuring.row_recorder import ProbeRecorder, build_probes
from hessprobe.measuring.snapshots import Snapshots
from hessprobe.optimization.report import StepReport
from hessprobe.optimization.running import RunningOptimizer, running_optimizer
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.recipe import Recipe
from hessprobe.text.corpus import Corpus
from hessprobe.text.hub_corpus import HubCorpus
from hessprobe.training.builds import build_model, check_same_text, check_shares, open_corpus, start_log
from hessprobe.training.checkpoint import load_checkpoint, load_start, save_checkpoint
from hessprobe.training.ending import Diverged, RunEnd
from hessprobe.training.optimizers import OuterOptimizer, build_optimizer, build_warmup
from hessprobe.training.outputs import Outputs, open_outputs
from hessprobe.training.run_data import RunData
from hessprobe.training.train_row import Totals, layout, train_row


@together(lambda *_, processes=ALONE, **__: processes)
def train(recipe: Recipe, folder: Path, *, resume: bool = False, processes: Processes = ALONE) -> RunEnd:
    """Runs a recipe into folder/log.zarr and folder/checkpoint.

    Args:
        recipe: what to do; one run, not a study.
        folder: the run's folder; new, or with `resume` one that holds this recipe's run.
        processes: who shares the work: each calls this alike, and the first alone reads and writes the folder.

    Raises:
        UserError: a mistake in recipe, data or folder, or a full disk.
        Diverged: the loss is not finite; the log up to that step is kept.
        RunFailed: a stream of data broke off, or a process died.
    """
    check_loggers(recipe.loggers)
    check_shares(recipe, processes)
    if recipe.training.threads:
        torch.set_num_threads(recipe.training.threads)
    device = own_device(recipe.device, processes)
    corpus = open_corpus(recipe)
    check_same_text(corpus, processes)
    model = build_model(recipe, device)
    objective, partition = Objective(model, processes=processes), Partition.of(model, recipe.partition)
    saved = load_checkpoint(folder, device, processes) if resume else None
    start, given = None, recipe.training.start_from
    if given is not None and not saved:
        start = processes.from_first(lambda: load_start(given, partition))
        partition.assign(model, start.parameters)
    elif saved:
        partition.assign(model, saved["parameters"])
    step, totals = (saved["step"], saved["totals"]) if saved else (0, Totals())
    log = partial(
        start_log, recipe, folder, device, corpus, partition, resume=resume, start=start, processes=processes
    )
    with open_outputs(recipe, folder, log, processes, first=step) as outputs:
        if saved:
            outputs.console.say("resuming", f"{folder} at step {step}")
        run = Run(recipe, folder, objective, partition, corpus, device, totals, outputs)
        if saved:
            run.data.place(saved["data"], resumed=True)
        elif start:
            run.data.place(start.data, resumed=False)
        return run.steps(saved)


class Run:
    """One run's parts, and the loop over its outer steps."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        objective: Objective,
        partition: Partition,
        corpus: Corpus | HubCorpus,
        device: torch.device,
        totals: Totals,
        outputs: Outputs,
    ) -> None:
        self.recipe, self.folder, self.device, self.totals = recipe, folder, device, totals
        self.objective, self.partition = objective, partition
        self.snapshots = Snapshots(objective=objective, partition=partition, seed=recipe.seed)
        self.writer, self.console, self.scalars = outputs.writer, outputs.console, outputs.scalars
        self.processes = objective.processes
        self.data = RunData(recipe, corpus, device)
        steps = recipe.training.steps
        self.writer.add_table(layout(recipe.optimizer), range(steps))
        self.recorder = ProbeRecorder(self.writer, build_probes(recipe), partition, steps)

    def steps(self, saved: dict[str, Any] | None) -> RunEnd:
        """Takes the outer steps that are left; `saved` is the checkpoint of a resumed run."""
        recipe, training = self.recipe.optimizer, self.recipe.training
        warmup = min(recipe.warmup_steps, training.steps)
        step, held_out, ended, optimizer_state = 0, math.nan, False, None
        if saved:
            step, held_out, ended = saved["step"], saved["held_out_loss"], saved["ended"]
            optimizer_state = saved["optimizer"]
        optimizer: OuterOptimizer | None = None
        rejected = 0
        while not ended:
            if optimizer is None or step == warmup:
                optimizer = self._optimizer(step < warmup, training.steps - warmup)
                if optimizer_state:  # empty at the end of the warm-up
                    optimizer.load_state_dict(optimizer_state)
                optimizer_state = None
            before = self.snapshots.theta()
            running = self._running(step, optimizer)
            report = self._take(step, optimizer, searching=step >= warmup)
            rejected = rejected + 1 if report.outcome.startswith("rejected") else 0
            if rejected == 3:
                self.console.say(
                    "hint", "3 steps rejected in a row: a lower --set optimizer.learning_rate may help"
                )
            self._measure(step, before, running)
            last = step == training.steps - 1
            found = self.held_out_loss() if last or step % training.evaluate_every == 0 else None
            self._record(
                step,
                report,
                math.nan if found is None else found,
                "warm-up" if step < warmup else recipe.name,
            )
            if report.outcome.startswith("diverged") or (found is not None and not math.isfinite(found)):
                raise Diverged(
                    f"step {step}: the loss is not finite, so the run stops here; its log is kept in {self.folder}. "
                    "A lower --set optimizer.learning_rate or more --set optimizer.warmup_steps helps"
                )
            step += 1
            held_out = held_out if found is None else found
            ended = last or (found is not None and self._end(step, found).reached)
            # The step that ends the warm-up is saved without its optimizer: the next one starts afresh.
            if ended or step % training.checkpoint_every == 0:
                self._save(step, optimizer.state_dict() if step != warmup else {}, held_out, ended)
        end = self._end(step, held_out)
        if end.target is not None:
            self.console.say("target", f"{end.target}: {end}")
        return end

    def _end(self, step: int, held_out_loss: float) -> RunEnd:
        return RunEnd(steps=step, held_out_loss=held_out_loss, target=self.recipe.training.stop_at)

    def _take(self, step: int, optimizer: OuterOptimizer, *, searching: bool) -> StepReport:
        """Takes one outer step; a stretch of the line search's data is read only where there is one."""
        recipe = self.recipe.optimizer
        began = time.perf_counter()
        report = optimizer.step(
            self.data.minibatches("train", step, recipe.minibatches),
            self.data.minibatches("line_search", step, recipe.searched if searching else 0),
        )
        self._same_everywhere()
        self.totals.add(report, time.perf_counter() - began)
        return report

    def _same_everywhere(self) -> None:
        """Gives every process the first one's parameters where theirs are others.

        All have computed them alike, from the same sums; but what GPUs add up in no fixed order rounds as it likes.
        """
        if self.processes.count == 1:
            return
        theta = self.partition.vector(self.objective.model)
        bits = theta.view(torch.uint8).sum(dtype=torch.int64)
        most, least = self.processes.most(torch.stack([bits, -bits])).tolist()
        if most != -least:
            (theta,) = self.processes.total(theta if self.processes.is_first else torch.zeros_like(theta))
            self.partition.assign(self.objective.model, theta)

    def held_out_loss(self) -> float:
        """Returns the loss on the held-out sequences, nats per token."""
        with torch.no_grad():
            return float(self.objective.loss(self.data.held_out))

    def _save(self, step: int, optimizer: dict[str, Any], held_out_loss: float, ended: bool) -> None:
        save = partial(
            save_checkpoint,
            self.folder,
            step=step,
            parameters=self.partition.vector(self.objective.model),
            optimizer=optimizer,
            totals=self.totals,
            shapes={slot.name: slot.shape for slot in self.partition.slots},
            data=self.data.position(step),
            held_out_loss=held_out_loss,
            ended=ended,
        )
        self.processes.from_first(save)

    def _optimizer(self, warming_up: bool, outer_steps: int) -> OuterOptimizer:
        recipe = self.recipe.optimizer
        if warming_up:
            return build_warmup(recipe, self.objective, self.partition)
        return build_optimizer(recipe, self.objective, self.partition, outer_steps, self.recipe.seed)

    def _running(self, step: int, optimizer: OuterOptimizer) -> RunningOptimizer | None:
        """Returns the optimizer as it is before its step, copied only where a probe due at this step looks at it."""
        wanted = any(probe.needs_optimizer for probe in self.recorder.due(step))
        return running_optimizer(optimizer) if wanted else None

    def _measure(self, step: int, before: torch.Tensor, running: RunningOptimizer | None) -> None:
        """Measures at the parameters before the step, where the update just made was decided."""
        began = time.perf_counter()
        for probe in self.recorder.due(step):
            batches = self.data.of_probe(probe, step)
            snapshot = self.snapshots.take(step, batches, before=before, optimizer=running)
            measurement = self.recorder.record(probe, snapshot)
            self.console.measured(measurement)
            self.scalars.measured(measurement)
        self.totals.probe_seconds += time.perf_counter() - began

    def _record(self, step: int, report: StepReport, held_out_loss: float, name: str) -> None:
        row = train_row(
            report,
            self.totals,
            self.recipe.optimizer,
            held_out_loss=held_out_loss,
            peak_memory=peak_memory(self.device, self.processes),
        )
        reset_peak_memory(self.device)  # the next step's is its own
        self.writer.write("train", step, row)
        self.scalars.trained(step, row)
        self.console.step(step, report, held_out_loss, name)
