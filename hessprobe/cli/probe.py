"""`hessprobe probe`: checkpoints are measured without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hessprobe.cli.pages import say_written
from hessprobe.cli.run_folders import free_folder
from hessprobe.cli.train import Device, Loggers, recipe_settings


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
    device: Device = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data and probes.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A value of the probes' sections, data or partition."
        ),
    ] = None,
    log: Loggers = None,
) -> None:
    """Measure checkpoints without training: a run's, transformers', or yours (--model). A series becomes the step axis."""
    settings = recipe_settings(probe, device, seed, setting, log)

    from hessprobe.checkpoints.measure_series import measure_series, open_series

    series = open_series(models, settings, data=data, sequences=sequences, context=context, model=model)
    folder = out or free_folder(series.recipe.name)
    measure_series(series, folder)
    say_written(folder)
