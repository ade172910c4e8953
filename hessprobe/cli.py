"""The command line: train, probe, report, show, compare, validate. Imports stand inside: a slip is answered at once."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from hessprobe.errors import RunFailed, UserError

if TYPE_CHECKING:
    from hessprobe.machine.processes import Processes
    from hessprobe.recipe import Recipe

app = typer.Typer(
    name="hessprobe",
    help="What curvature does a transformer's training throw away? Train, measure, keep, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_INTERRUPTED = 130
_ONE_PROCESS = ("probe", "report", "show", "compare", "validate")
_MISTAKEN_CALL: Any = typer.BadParameter.__base__  # click's UsageError, wherever this typer keeps it

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, such as runs/nano.")]


def _say_version(wanted: bool) -> None:
    if wanted:
        import hessprobe

        print(f"hessprobe {hessprobe.__version__}")
        raise typer.Exit


@app.callback()
def hessprobe_itself(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command()
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
            help="full_gn, layerwise_gn, prox_linear, adamw, muon, soap, shampoo, sophia or kfac.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Outer steps.")] = None,
    every: Annotated[int | None, typer.Option(help="Outer steps between a probe's rows.")] = None,
    coupling_error: Annotated[
        float | None, typer.Option(help="Add sketches until the coupling's mean error is below this.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; default runs/RECIPE.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, data and probes.")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Run at so many seeds, from --seed on, into OUT/seed-0, OUT/seed-1 ...")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any value of the recipe.")
    ] = None,
    log: Annotated[
        list[str] | None,
        typer.Option("--log", help="Send a few scalars to tensorboard or wandb too; may be repeated."),
    ] = None,
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

    settings = _settings(probe, optimizer, steps, every, coupling_error, device, seed, setting, log)
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
        _say_written(folder)


@app.command("probe")
def probe_models(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="A run's folder or checkpoint file; a folder of transformers, or a name on the Hub; with --model files of "
            "weights, a folder of them or a pattern. Several checkpoints of one model are one series.",
        ),
    ],
    probe: Annotated[
        list[str] | None,
        typer.Option("--probe", help="Measure this; may be repeated. Default: the run's own."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A text file or folder, hub:OWNER/NAME/CONFIG, or MODULE:FUNCTION that gives batches (with --model); "
            "default the run's own data."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Makes the model (nn.Module or hp.Objective) whose weights the files hold: Lightning's .ckpt, state_dicts.",
        ),
    ] = None,
    sequences: Annotated[int | None, typer.Option(help="Sequences that a row reads.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens in a sequence.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write; default runs/NAME-probe.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data and probes.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A value of the probes' sections, data or partition."
        ),
    ] = None,
    log: Annotated[
        list[str] | None,
        typer.Option("--log", help="Send a few scalars to tensorboard or wandb too; may be repeated."),
    ] = None,
) -> None:
    """Measure checkpoints without training: a run's, transformers', or yours (--model). A series becomes the step axis."""
    settings = _settings(probe, None, None, None, None, device, seed, setting, log)

    from hessprobe.checkpoints.measure_series import measure_series, open_series

    series = open_series(models, settings, data=data, sequences=sequences, context=context, model=model)
    folder = out or _free_folder(Path("runs") / series.recipe.name)
    measure_series(series, folder)
    _say_written(folder)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="A run's folder; several stand side by side.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; default RUN/report.html, for several beside the first.")
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write all figures, PDF and PNG, into this folder."),
    ] = None,
) -> None:
    """Write one self-contained page from logs; works while a run is still going on."""
    if len(runs) == 1:
        print(f"report   {_write_page(runs[0], out)}")
    else:
        print(f"report   {_write_runs_page(runs, out)}")
    if figures is not None:
        _write_figures(runs, figures)


@app.command()
def show(run: RunFolder) -> None:
    """Print a run's tables in the terminal."""
    from rich.console import Console

    from hessprobe.report.terminal import show as print_tables

    print_tables(run, Console())


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Runs' folders, or folders that contain runs."),
    ],
    target: Annotated[
        float | None,
        typer.Option(help="Held-out loss, nats per token; default the lowest that every run reached."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write one self-contained page.")] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write figures, PDF and PNG, into this folder.")
    ] = None,
) -> None:
    """Say how many steps, tokens, seconds and gradients each method needs to reach a loss."""
    from rich.console import Console

    from hessprobe.comparison.compared import compare as compared
    from hessprobe.comparison.terminal import show_comparison

    comparison = compared(runs, target)
    show_comparison(comparison, Console())
    try:
        if figures is not None:
            from hessprobe.comparison.figures import save_figures

            for path in save_figures(comparison, figures):
                print(f"figure   {path}")
        if out is not None:
            from hessprobe.comparison.page import write_comparison

            print(f"report   {write_comparison(comparison, out)}")
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or out or figures} ({error.strerror or error}); give another --out or "
            "--figures, or free some space"
        ) from error


@app.command("validate")
def validate_machine(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
    minutes: Annotated[
        float, typer.Option(help="For everything; what no longer fits is left out and said.")
    ] = 10,
    small: Annotated[
        bool, typer.Option("--small", help="Shrunken copies of the large models: minutes on two CPU cores.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The folder to write; default runs/validate.")] = None,
) -> None:
    """Is hessprobe right and fast on this machine? Checks and measurements into validate.json and one page."""
    from hessprobe.validation.command import validate

    folder = out or _free_folder(Path("runs") / "validate")
    found = validate(device=device, minutes=minutes, small=small, folder=folder)
    print(f"\nfigures  {folder / 'validate.json'}\npage     {folder / 'validate.html'}")
    if found.failures:
        names = "; ".join(f"{figure.stage}: {figure.name}" for figure in found.failures[:3])
        raise RunFailed(
            f"{len(found.failures)} of {found.checks} checks, such as {names}; {folder / 'validate.html'} has them all"
        )
    print(f"all {found.checks} checks passed")


def _decided(
    given: str, settings: list[str], out: Path | None, seeds: int | None, resume: bool
) -> tuple[Recipe, Path, bool]:
    """Returns what `train` is to run, in which folder, and whether that makes many runs; says what measuring costs."""
    from hessprobe.recipe import build_recipe, differences, read_recipe

    values = read_recipe(given)
    if seeds is not None or "study" in values:
        wanted = build_recipe(values, settings)
        folder = out or (Path("runs") / wanted.name if resume else _free_folder(Path("runs") / wanted.name))
        if not resume and wanted.study is None:
            _say_measuring(wanted)
        return wanted, folder, True
    if resume:
        folder = out or _latest_run(given)
        stored = _stored_recipe(folder)
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
    folder = out or _free_folder(Path("runs") / wanted.name)
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


def _settings(
    probe: list[str] | None,
    optimizer: str | None,
    steps: int | None,
    every: int | None,
    coupling_error: float | None,
    device: str | None,
    seed: int | None,
    setting: list[str] | None,
    log: list[str] | None = None,
) -> list[str]:
    """Turns flags into the recipe settings they stand for; --set comes last, so it wins."""
    from hessprobe.recipe import PROBES

    names = [name for given in probe or [] for name in given.split(",")]
    found = [f"probes={list(names)!r}"] if names else []
    if loggers := [name for given in log or [] for name in given.split(",")]:
        found.append(f"loggers={loggers!r}")
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
    return found + (setting or [])


def _say_written(folder: Path) -> None:
    """Writes a run's page, and says where log and page are and what comes next."""
    page = _write_page(folder)
    print(f"log      {folder / 'log.zarr'}")
    print(f"report   {page}")
    print(f"next     hessprobe show {folder}")


def _write_page(run: Path, out: Path | None = None) -> Path:
    from hessprobe.report.page import write_report

    try:
        return write_report(run, out)
    except OSError as error:
        raise UserError(
            f"cannot write the report of {run} ({error.strerror or error}); its log is kept. Free some space, or write "
            f"it elsewhere: hessprobe report {run} --out FILE"
        ) from error


def _write_runs_page(runs: list[Path], out: Path | None) -> Path:
    from hessprobe.report.several_runs import write_runs_report

    try:
        return write_runs_report(runs, out)
    except OSError as error:
        raise UserError(
            f"cannot write the report of {len(runs)} runs ({error.strerror or error}); write it elsewhere: --out FILE"
        ) from error


def _write_figures(runs: list[Path], folder: Path) -> None:
    from hessprobe.reading.load_run import load_run
    from hessprobe.report.differences import labels
    from hessprobe.report.figure_set import save_figures

    for run, label in zip(runs, labels(runs), strict=True):
        try:
            found = save_figures(load_run(run), folder, prefix="" if len(runs) == 1 else f"{label}-")
        except OSError as error:
            raise UserError(
                f"cannot write figures into {folder} ({error.strerror or error}); give another --figures DIR"
            ) from error
        for path in found.written:
            print(f"figure   {path}")
        for name, reason in found.left_out.items():
            print(f"no figure {name}: {reason}", file=sys.stderr)


def _free_folder(wanted: Path) -> Path:
    """Returns the folder, or the first of NAME-2, NAME-3, ... that holds no run, nor runs."""
    number, folder = 1, wanted
    while (folder / "log.zarr").exists() or (folder / "recipe.toml").exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def _latest_run(recipe: str) -> Path:
    """Returns the newest run of a recipe under runs/."""
    name = Path(recipe).stem
    found = [f for f in Path("runs").glob(f"{name}*") if (f / "log.zarr").exists()]
    if not found:
        raise UserError(f"--resume: no run of {name} under runs/; name its folder with --out")
    return max(found, key=lambda f: (f / "log.zarr").stat().st_mtime)


def _stored_recipe(folder: Path) -> Recipe:
    """Returns the recipe that a run was started with, from its log, which is whole from its first instant."""
    import json

    from hessprobe.recipe import build_recipe
    from hessprobe.store.log import find_log

    if not (folder / "log.zarr").is_dir():
        raise UserError(f"--resume: {folder} holds no run; leave out --resume to start one")
    _, attributes = find_log(folder)
    if "checkpoints" in attributes:
        raise UserError(
            f"--resume: {folder} holds checkpoints measured by hessprobe probe, and no training to go on with"
        )
    return build_recipe(json.loads(attributes["recipe"]))


def main() -> None:
    """Runs the command line: exit 2 for a mistake in the call, 1 for a run that failed.

    Of several processes the first says it, since what one meets all do; but that one is lost, whoever is left says. After
    a mistake the first alone ends with 2: another one that did, torchrun would stop the first before it has said it.
    """
    from hessprobe.machine.torchrun import launched, leave

    try:
        _run_command_line()
    except SystemExit as end:
        if launched():
            leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except BaseException:
        if launched():  # a mistake of ours ends as one, too, and not in a signal
            traceback.print_exc()
            leave(1)
        raise


def _run_command_line() -> NoReturn:
    from hessprobe.machine.torchrun import is_first, launched

    try:
        if sys.argv[1:2] and sys.argv[1] in _ONE_PROCESS and launched():
            raise UserError(f"hessprobe {sys.argv[1]} runs in one process: call it without torchrun")
        # Not standalone: typer would load its formatter, a quarter of a second, to say that a word is misspelt.
        code = app(standalone_mode=False)
    except _MISTAKEN_CALL as mistake:
        if is_first():
            mistake.show()
        sys.exit(mistake.exit_code if is_first() else 0)
    except UserError as error:
        if is_first():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if is_first() else 0)
    except RunFailed as error:
        from hessprobe.machine.processes import ProcessLost  # torch, which what has failed had loaded

        if is_first() or isinstance(error, ProcessLost):
            print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    if code == _INTERRUPTED and is_first():  # typer, too, turns Ctrl-C into this
        measuring = sys.argv[1:2] == ["probe"]
        kept = (
            "the rows measured so far are kept"
            if measuring
            else "the log and the last checkpoint are kept: go on with --resume"
        )
        print(f"stopped; {kept}", file=sys.stderr)
    sys.exit(code)
