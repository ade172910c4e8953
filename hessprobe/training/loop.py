"""The run: warm up, take outer steps, measure when a probe is due, record, save. Resumes where it was cut off."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch

from hessprobe.errors import RunFailed
from hessprobe.optimization.report import StepReport
from hessprobe.probes.probe import Snapshot
from hessprobe.problem.corpus import Corpus
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition
from hessprobe.recipe import Recipe
from hessprobe.store.writer import RunWriter
from hessprobe.training.checkpoint import load_checkpoint, save_checkpoint
from hessprobe.training.console import RunConsole
from hessprobe.training.optimizers import OuterOptimizer, build_optimizer, build_warmup
from hessprobe.training.recorder import ProbeRecorder, build_probes, peak_memory
from hessprobe.training.setup import build_model, open_corpus, pick_device, start_log
from hessprobe.training.train_table import Totals, train_row, train_table


def train(recipe: Recipe, folder: Path, *, resume: bool = False) -> None:
    """Runs a recipe into folder/log.zarr and folder/checkpoint.

    Args:
        recipe: what to do.
        folder: the run's folder; new, or with `resume` one that holds this recipe's run.

    Raises:
        UserError: a mistake in recipe, data or folder, or a full disk.
        RunFailed: the loss is not finite; the log up to that step is kept.
    """
    if recipe.training.threads:
        torch.set_num_threads(recipe.training.threads)
    device = pick_device(recipe.device)
    corpus = open_corpus(recipe)
    model = build_model(recipe, device)
    objective, partition = Objective(model), Partition.of(model, recipe.partition)
    saved = load_checkpoint(folder, device) if resume else None
    start, totals = (saved["step"], saved["totals"]) if saved else (0, Totals())
    if saved:
        partition.assign(model, saved["parameters"])
    with (
        start_log(recipe, folder, device, corpus, partition, resume=resume) as writer,
        RunConsole(recipe.training.steps, start) as console,
    ):
        if saved:
            console.say("resuming", f"{folder} at step {start}")
        run = Run(recipe, folder, objective, partition, corpus, device, writer, console, totals)
        run.steps(start, saved["optimizer"] if saved else None)


class Run:
    """One run's parts, and the loop over its outer steps."""

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        objective: Objective,
        partition: Partition,
        corpus: Corpus,
        device: torch.device,
        writer: RunWriter,
        console: RunConsole,
        totals: Totals,
    ) -> None:
        self.recipe, self.folder, self.device = recipe, folder, device
        self.objective, self.partition, self.corpus = objective, partition, corpus
        self.writer, self.console, self.totals = writer, console, totals
        steps = recipe.training.steps
        writer.add_table(train_table(recipe.optimizer.line_search_grid), range(steps))
        self.recorder = ProbeRecorder(writer, build_probes(recipe), partition, steps)
        sequences, context = recipe.data.held_out_sequences, corpus.context
        per_batch = max(1, min(recipe.optimizer.sequences * 64 // context + 1, sequences))
        count = math.ceil(sequences / per_batch)
        self.held_out = [self._placed(batch) for batch in corpus.held_out_batches(per_batch, count)]

    def steps(self, start: int, optimizer_state: dict[str, Any] | None) -> None:
        """Takes the outer steps from `start` on."""
        recipe, training = self.recipe.optimizer, self.recipe.training
        warmup = min(recipe.warmup_steps, training.steps)
        optimizer: OuterOptimizer | None = None
        rejected = 0
        for step in range(start, training.steps):
            if optimizer is None or step == warmup:
                optimizer = self._optimizer(step < warmup, training.steps - warmup)
                if optimizer_state:  # empty at the end of the warm-up
                    optimizer.load_state_dict(optimizer_state)
                optimizer_state = None
            before = self.partition.vector(self.objective.model)
            began = time.perf_counter()
            searched = recipe.line_search_minibatches or recipe.minibatches
            report = optimizer.step(
                self._minibatches("train", step, recipe.minibatches),
                self._minibatches("line_search", step, searched),
            )
            self.totals.add(report, time.perf_counter() - began)
            rejected = rejected + 1 if report.outcome.startswith("rejected") else 0
            if rejected == 3:
                self.console.say(
                    "hint", "3 steps rejected in a row: a lower --set optimizer.learning_rate may help"
                )
            self._measure(step, before)
            last = step == training.steps - 1
            evaluate = last or step % training.evaluate_every == 0
            held_out = self.held_out_loss() if evaluate else math.nan
            self._record(step, report, held_out, "warm-up" if step < warmup else recipe.name)
            if report.outcome.startswith("diverged") or (evaluate and not math.isfinite(held_out)):
                raise RunFailed(
                    f"step {step}: the loss is not finite, so the run stops here; its log is kept in {self.folder}. "
                    "A lower --set optimizer.learning_rate or more --set optimizer.warmup_steps helps"
                )
            # The step that ends the warm-up is saved without its optimizer: the next one starts afresh.
            if last or (step + 1) % training.checkpoint_every == 0:
                state = optimizer.state_dict() if step + 1 != warmup else {}
                theta = self.partition.vector(self.objective.model)
                save_checkpoint(
                    self.folder, step=step + 1, parameters=theta, optimizer=state, totals=self.totals
                )

    def held_out_loss(self) -> float:
        """Returns the loss on the held-out sequences, nats per token."""
        with torch.no_grad():
            return float(self.objective.loss(self.held_out))

    def _optimizer(self, warming_up: bool, outer_steps: int) -> OuterOptimizer:
        recipe = self.recipe.optimizer
        if warming_up:
            return build_warmup(recipe, self.objective, self.partition)
        return build_optimizer(recipe, self.objective, self.partition, outer_steps)

    def _minibatches(self, stream: str, step: int, count: int) -> list[Batch]:
        recipe = self.recipe.optimizer
        first = step * count
        return [
            self._placed(
                self.corpus.batch(
                    seed=self.recipe.seed, step=first + i, sequences=recipe.sequences, stream=stream
                )
            )
            for i in range(count)
        ]

    def _placed(self, batch: tuple[torch.Tensor, torch.Tensor]) -> Batch:
        return batch[0].to(self.device), batch[1].to(self.device)

    def _measure(self, step: int, before: torch.Tensor) -> None:
        """Measures at the parameters before the step, where the update just made was decided."""
        began = time.perf_counter()
        for probe in self.recorder.due(step):
            batch = self.corpus.batch(
                seed=self.recipe.seed, step=step, sequences=probe.sequences, stream=f"probe/{probe.name}"
            )
            snapshot = Snapshot(
                step=step,
                objective=self.objective,
                partition=self.partition,
                parameters=before,
                batches=[self._placed(batch)],
                update=self.partition.vector(self.objective.model) - before,
                seed=self.recipe.seed,
            )
            self.console.measured(self.recorder.record(probe, snapshot))
        self.totals.probe_seconds += time.perf_counter() - began

    def _record(self, step: int, report: StepReport, held_out_loss: float, name: str) -> None:
        row = train_row(
            report,
            self.totals,
            held_out_loss=held_out_loss,
            peak_memory=peak_memory(self.device),
            line_search_grid=self.recipe.optimizer.line_search_grid,
        )
        self.writer.write("train", step, row)
        self.console.step(step, report, held_out_loss, name)
