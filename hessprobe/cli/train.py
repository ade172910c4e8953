"""`hessprobe train`: what the call asks for, checked before torch is loaded, then one run or many."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hessprobe.cli.pages import say_written
from hessprobe.cli.run_folders import free_folder, latest_run, stored_recipe
from hessprobe.errors import UserError
from hessprobe.schema.optimizers import ENTRIES

*_BASELINES, _LAST = ENTRIES
if TYPE_CHECKING:
    from hessprobe.machine.processes import Processes
    from hessprobe.recipe import Recipe

Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1.")]
Loggers = Annotated[
    list[str] | None,
    typer.Option("--log", help="Send a few scalars to tensorboard or wandb too; may be repeated."),
]


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A shipped recipe or a .toml file.")
    ] = "nano",
    probe: Annotated[
        list[str] | None, typer.Option("--probe", help="Measure this during training; may be repeated.")
    ] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help=f"full_gn, layerwise_gn, prox_linear, {', '.join(_BASELINES)} or {_LAST}.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Outer steps.")] = None,
    every: Annotated[int | None, typer.Option(help="Outer steps between a probe's rows.")] = None,
    coupling_error: Annotated[
        float | None, typer.Option(help="Add sketches until the coupling's mean error is below this.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; default runs/RECIPE.")] = None,
    device: Device = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, data and probes.")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Run at so many seeds, from --seed on, into OUT/seed-0, OUT/seed-1 ...")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any value of the recipe.")
    ] = None,
    log: Loggers = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run or study in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print sizes, memory and costs; no data, no network.")
    ] = False,
) -> None:
    """Train with curvature probes; writes a log, a checkpoint and a report. A recipe with a study makes many runs.

    On several GPUs or processes: torchrun --nproc-per-node N -m hessprobe train ...
    """
    from hessprobe.machine.torchrun import is_first, launched
    from hessprobe.recipe import build_recipe, read_recipe

    settings = recipe_settings(probe, device, seed, setting, log, optimizer, steps, every, coupling_error)
    if seeds is not None and seeds < 1:
        raise UserError(f"--seeds {seeds}: at least 1 seed")
    if resume and recipe == "nano" and out is not None and not (out / "log.zarr").exists():
        if (out / "recipe.toml").is_file():  # a study keeps its own
            recipe = str(out / "recipe.toml")

    if dry_run:
        checked = build_recipe(read_recipe(recipe), settings)
        if is_first():
            from hessprobe.training.planning.plan import plan

            print(plan(checked, seeds))
        return

    launch = launched()
    # A slip is answered before torch is loaded; of several processes the first decides for all.
    decided = None if launch else _decided(recipe, settings, out, seeds, resume)

    from hessprobe.machine.process_group import process_group

    with process_group(launch) as processes:
        wanted, folder, many = decided or processes.from_first(
            lambda: _decided(recipe, settings, out, seeds, resume)
        )
        if many:
            _train_many(wanted, folder, seeds, resume, processes)
        else:
            from hessprobe.training.loop import train as run

            run(wanted, folder, resume=resume, processes=processes)
    if processes.is_first and not many:
        say_written(folder)


def _decided(
    given: str, settings: list[str], out: Path | None, seeds: int | None, resume: bool
) -> tuple[Recipe, Path, bool]:
    """Returns what `train` is to run, in which folder, and whether that makes many runs; says what measuring costs."""
    from hessprobe.recipe import build_recipe, differences, read_recipe

    values = read_recipe(given)
    if seeds is not None or "study" in values:
        wanted = build_recipe(values, settings)
        folder = out or (Path("runs") / wanted.name if resume else free_folder(wanted.name))
        if not resume and wanted.study is None:
            _say_measuring(wanted)
        return wanted, folder, True
    if resume:
        folder = out or latest_run(given)
        stored = stored_recipe(folder)
        base = stored.model_dump(exclude_none=True) if given == "nano" else values
        wanted = build_recipe(base, settings)
        changed = [line for line in differences(stored, wanted) if not line.startswith("loggers:")]
        if changed:
            raise UserError(
                f"--resume: {folder} was started with another recipe; it differs in {'; '.join(changed)}. "
                "Resume it without these, or start a new run with another --out"
            )
        return wanted, folder, False
    wanted = build_recipe(values, settings)
    folder = out or free_folder(wanted.name)
    if (folder / "log.zarr").exists():
        raise UserError(
            f"{folder} holds a run already: go on with it by --resume, or give another name with --out"
        )
    _say_measuring(wanted)
    return wanted, folder, False


def _train_many(recipe: Recipe, folder: Path, seeds: int | None, resume: bool, processes: Processes) -> None:
    """Makes a study's runs, or one recipe's at several seeds, and names the folder and the next command."""
    from hessprobe.training.study import run_seeds, run_study

    lines = []
    if recipe.study is None:
        run_seeds(recipe, folder, seeds or 1, resume=resume, processes=processes)
    else:
        if seeds is not None:
            recipe = recipe.model_copy(update={"study": recipe.study.model_copy(update={"seeds": seeds})})
        ends = run_study(recipe, folder, resume=resume, processes=processes)
        lines = [f"{end.name:<20} {end}" for end in ends]
    if processes.is_first:
        print(*lines, f"runs     {folder}", f"next     hessprobe compare {folder}", sep="\n")


def _say_measuring(recipe: Recipe) -> None:
    """Says on stderr what the recipe's probes will cost beside its training."""
    if not recipe.probes:
        print("no --probe given: only the training itself is recorded", file=sys.stderr)
        return
    from hessprobe.measuring.console import say, stderr
    from hessprobe.training.planning.measuring_plan import measuring_lines, plan_measuring

    for label, text in measuring_lines(plan_measuring(recipe), recipe.training.probe_share):
        say(stderr(), label, text)


def recipe_settings(
    probes: list[str] | None,
    device: str | None,
    seed: int | None,
    settings: list[str] | None,
    loggers: list[str] | None,
    optimizer: str | None = None,
    steps: int | None = None,
    every: int | None = None,
    coupling_error: float | None = None,
) -> list[str]:
    """Turns flags into the recipe settings they stand for; --set comes last, so it wins."""
    from hessprobe.recipe import PROBES

    found = []
    for key, words in (("probes", probes), ("loggers", loggers)):
        if names := [name for given in words or [] for name in given.split(",")]:
            found.append(f"{key}={names!r}")
    if steps is not None and steps < 1:
        raise UserError(f"--steps {steps}: a run needs at least 1 step")
    if every is not None and every < 1:
        raise UserError(f"--every {every}: at least 1 step between rows")
    flags = {
        "optimizer.name": optimizer,
        "training.steps": steps,
        "cross_layer.coupling_error": coupling_error,
        "device": device,
        "seed": seed,
    }
    found += [f"{key}={value}" for key, value in flags.items() if value is not None]
    if every is not None:  # of every probe: which ones run may stand in the recipe's file
        found += [f"{name}.every={every}" for name in PROBES]
    return found + (settings or [])
