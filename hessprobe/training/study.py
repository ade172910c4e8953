"""Many runs from one recipe: the same at several seeds, or a study's variants swept from one start to one loss.

Every run is an ordinary one in a folder of its own, so it is compared, shown and reported like any other. What is
known of a run that has ended comes from its checkpoint: there is no state besides the runs.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from hessprobe.errors import RunFailed, UserError
from hessprobe.machine.processes import ALONE, Processes
from hessprobe.measuring.console import say, stderr
from hessprobe.recipe import Recipe, VariantRecipe, build_recipe, differences
from hessprobe.recipe.runs import variant_run, warm_up_run, with_seed
from hessprobe.recipe.study import WARM_UP
from hessprobe.store.writer import RunWriter
from hessprobe.training.builds import RECIPE_FILE, check_shares
from hessprobe.training.checkpoint import load_checkpoint
from hessprobe.training.ending import Diverged, RunEnd
from hessprobe.training.loop import train


@dataclass(frozen=True, kw_only=True)
class VariantEnd:
    """What became of one variant: its best learning rate, and by seed how the run at that rate ended.

    `ends` holds None for a run that diverged, and is empty where every learning rate did.
    """

    name: str
    learning_rate: float
    ends: dict[int, RunEnd | None]

    def __str__(self) -> str:
        if not self.ends:
            return "diverged at every learning rate"
        return f"learning rate {self.learning_rate:g}: {', '.join(str(e or 'diverged') for e in self.ends.values())}"


def run_seeds(
    recipe: Recipe, out: Path, seeds: int, *, resume: bool = False, processes: Processes = ALONE
) -> list[Path]:
    """Runs a recipe at `seeds` seeds from its own on, into out/seed-S; returns the runs' folders.

    Args:
        processes: see `train`.

    Raises:
        UserError: see `train`.
        RunFailed: a run diverged; the others were made all the same.
    """
    wanted = {out / f"seed-{seed}": with_seed(recipe, seed) for seed in _seeds(recipe, seeds)}
    series = _Series(out, recipe, len(wanted), resume, processes)
    ends = {folder: series.run(folder, run, f"seed {run.seed}") for folder, run in wanted.items()}
    if failed := [str(folder) for folder, end in ends.items() if end is None]:
        raise RunFailed(
            f"{len(failed)} of {len(ends)} runs diverged: {', '.join(failed)}; their logs are kept"
        )
    return list(wanted)


def run_study(
    recipe: Recipe, out: Path, *, resume: bool = False, processes: Processes = ALONE
) -> list[VariantEnd]:
    """Makes every run of a recipe's study below `out`; returns how each variant did.

    out/warm-up/seed-S: what all start from. out/VARIANT/learning_rate-X/seed-S: the sweep at the first seed, and the
    other seeds at the rate that needed the fewest steps to the target. A rate that never got there comes after
    all that did; among equals the lower held-out loss counts.

    Args:
        resume: leaves runs that have ended as they are, and goes on with the one that was cut off.
        processes: see `train`.

    Raises:
        UserError: see `train`; or a run there has another recipe.
        RunFailed: a warm-up diverged.
    """
    study = recipe.study
    assert study is not None
    first, *others = seeds = _seeds(recipe, study.seeds)
    sweeps = sum(len(variant.learning_rates) for variant in study.variants)
    warm_ups = len(seeds) if study.warm_up_steps else 0
    series = _Series(out, recipe, warm_ups + sweeps + len(study.variants) * len(others), resume, processes)
    starts: dict[int, str | None] = dict.fromkeys(seeds)
    for seed in seeds if warm_ups else ():
        folder = out / WARM_UP / f"seed-{seed}"
        if series.run(folder, warm_up_run(recipe, seed), f"{WARM_UP} seed {seed}") is None:
            raise RunFailed(f"the warm-up in {folder} diverged; lower --set optimizer.warmup_learning_rate")
        starts[seed] = str(folder)

    def run(variant: VariantRecipe, rate: float, seed: int) -> RunEnd | None:
        folder = out / variant.name / f"learning_rate-{rate:g}" / f"seed-{seed}"
        wanted = variant_run(recipe, variant, rate, seed, starts[seed])
        return series.run(folder, wanted, f"{variant.name} learning_rate {rate:g} seed {seed}")

    found = []
    for variant in study.variants:
        sweep = {rate: run(variant, rate, first) for rate in variant.learning_rates}
        best = min(sweep, key=lambda rate: _rank(sweep[rate]))
        ends = (
            {first: sweep[best], **{seed: run(variant, best, seed) for seed in others}} if sweep[best] else {}
        )
        series.skip(0 if ends else len(others))
        found.append(VariantEnd(name=variant.name, learning_rate=best, ends=ends))
        series.say(variant.name, f"{found[-1]}{_edge(sweep, best)}")
    return found


class _Series:
    """One run after the other, each in its folder, and the word which of how many it is.

    Of several processes the first looks into the folders, and speaks.
    """

    def __init__(self, out: Path, recipe: Recipe, total: int, resume: bool, processes: Processes) -> None:
        self.total, self.done, self.resume, self.processes = total, 0, resume, processes
        self.console = stderr(quiet=not processes.is_first)
        check_shares(recipe, processes)
        processes.from_first(lambda: self._claim(out, recipe, resume))

    def _claim(self, out: Path, recipe: Recipe, resume: bool) -> None:
        """Writes the recipe into the folder of all runs."""
        if (out / "log.zarr").exists() or (not resume and (out / RECIPE_FILE).exists()):
            raise UserError(f"{out} holds runs already: go on with them by --resume, or give another --out")
        beside = out / f".{RECIPE_FILE}"
        try:
            out.mkdir(parents=True, exist_ok=True)
            beside.write_text(recipe.to_toml(), encoding="utf-8")
            os.replace(beside, out / RECIPE_FILE)
        except OSError as error:
            raise UserError(
                f"cannot write runs to {out} ({error.strerror}): nothing was run. Give another folder with --out"
            ) from error

    def say(self, label: str, text: str) -> None:
        say(self.console, label, text)

    def skip(self, runs: int) -> None:
        self.done += runs

    def run(self, folder: Path, recipe: Recipe, what: str) -> RunEnd | None:
        """Makes one run, or goes on with it; returns None where it diverged."""
        self.done += 1
        self.say("run", f"{self.done} of {self.total}  {what}")
        begun, end = self.processes.from_first(lambda: _found(folder, recipe))
        if end:
            self.say("  ended", f"before: {end}")
            return end
        try:
            end = train(recipe, folder, resume=begun, processes=self.processes)
        except Diverged as error:
            self.say("  failed", str(error))
            return None
        self.say("  ended", str(end))
        return end


def _found(folder: Path, wanted: Recipe) -> tuple[bool, RunEnd | None]:
    """Returns whether a run was begun in a folder, and how it ended; None where it is still to be gone on with.

    Raises:
        UserError: it is a run of another recipe.
    """
    if not (folder / "log.zarr").exists():
        return False, None
    with RunWriter.reopen(folder) as writer:
        stored = build_recipe(json.loads(writer.attributes["recipe"]))
    # The same start may be written otherwise from another working directory; its weights are checked by hash.
    changed = [line for line in differences(stored, wanted) if not line.startswith("training.start_from")]
    if changed:
        raise UserError(
            f"--resume: {folder} was made with another recipe; it differs in {'; '.join(changed)}. "
            "Resume with the recipe it was made with, or start anew with another --out"
        )
    saved = load_checkpoint(folder, torch.device("cpu"))
    if not saved or not saved["ended"]:
        return True, None
    end = RunEnd(steps=saved["step"], held_out_loss=saved["held_out_loss"], target=wanted.training.stop_at)
    return True, end


def _seeds(recipe: Recipe, count: int) -> list[int]:
    return list(range(recipe.seed, recipe.seed + count))


def _rank(end: RunEnd | None) -> tuple[float, float]:
    """Orders runs: fewest steps to the target, then the lower held-out loss; one that diverged is the last."""
    if end is None or not math.isfinite(end.held_out_loss):
        return math.inf, math.inf
    return (end.steps if end.reached else math.inf), end.held_out_loss


def _edge(sweep: dict[float, RunEnd | None], best: float) -> str:
    """Returns a warning where a sweep's best learning rate is its lowest or highest: a better one may lie beyond."""
    if len(sweep) < 2 or best not in (min(sweep), max(sweep)):
        return ""
    return f" (the {'lowest' if best == min(sweep) else 'highest'} swept: a better one may lie beyond)"
