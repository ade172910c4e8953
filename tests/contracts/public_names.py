"""The names that logs, scripts and recipes of other people hold on to, a line each.

`python -m tests.contracts.public_names` adds new ones to public_names.txt. It takes none away: a name that is to go is
deleted there by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import torch
import typer.main

import hessprobe as hp
import hessprobe.analysis
from hessprobe.cli.app import app
from hessprobe.measuring.row_recorder import ProbeRecorder, build_probes
from hessprobe.recipe import PROBES, Recipe, build_recipe
from hessprobe.schema.section import Section
from hessprobe.schema.table import FAILURE, RECORDED, STEP, Table
from hessprobe.training.train_row import layout

FILE = Path(__file__).with_name("public_names.txt")
HEADINGS = {
    "import": "Names to import",
    "call": "Commands, their arguments and flags",
    "set": "Keys of a recipe",
    "log": "Tables of a log, their coordinates and variables",
}
# Variables that exist only where the recipe asks for them are declared by one of these.
RECIPES: tuple[dict[str, Any], ...] = (
    {},
    {"cross_layer": {"method": "products"}},
    {"gn_hessian": {"density_blocks": ["0"]}, "preconditioner": {"condition_steps": 2}},
)


class Declared:
    """A log that is only declared: it keeps the tables it is given."""

    def __init__(self) -> None:
        self.tables: list[Table] = []

    def add_table(self, table: Table, steps: Sequence[int] | None) -> None:
        self.tables.append(table)


def imported() -> Iterator[str]:
    """Yields every name that is public in the package."""
    for module, known_as in (
        (hp, "hessprobe"),
        (hessprobe.analysis, "hessprobe.analysis"),
        (hp.optim, "hessprobe.optim"),
    ):
        yield from (f"{known_as}.{name}" for name in module.__all__)


def called() -> Iterator[str]:
    """Yields every command with its arguments and flags, as a shell is given them."""
    command = typer.main.get_command(app)
    found = {"hessprobe": command} | {
        f"hessprobe {name}": c for name, c in getattr(command, "commands", {}).items()
    }
    for words, each in found.items():
        yield words
        for parameter in each.params:
            argument = parameter.param_type_name == "argument"
            shown = [parameter.metavar] if argument else [*parameter.opts, *parameter.secondary_opts]
            yield from (f"{words} {name}" for name in shown)


def keys(section: type[Section] = Recipe, before: str = "") -> Iterator[str]:
    """Yields every key of a recipe, dotted as `--set` takes it."""
    for name, field in section.model_fields.items():
        yield before + name
        kind = field.annotation
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        for inner in kinds:
            if isinstance(inner, type) and issubclass(inner, Section):
                yield from keys(inner, f"{before}{name}.")


def logged() -> Iterator[str]:
    """Yields every coordinate and variable of every table, a variable with its dimensions."""
    partition = hp.Partition.of(
        torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)), by="module"
    )
    for given in RECIPES:
        recipe, log = build_recipe({**given, "probes": list(PROBES)}), Declared()
        ProbeRecorder(log, build_probes(recipe), partition, 1)  # type: ignore[arg-type]
        for table in (layout(recipe.optimizer), *log.tables):
            yield from (f"{table.name}.{name}" for name in (STEP, RECORDED, FAILURE, *table.coordinates))
            yield from (f"{table.name}.{v.name} ({', '.join(v.dims)})" for v in table.variables)


def public_names() -> dict[str, list[str]]:
    """Returns the public names by kind, sorted."""
    found = {"import": imported(), "call": called(), "set": keys(), "log": logged()}
    return {kind: sorted(set(names)) for kind, names in found.items()}


def listed() -> dict[str, list[str]]:
    """Returns the names of public_names.txt by kind."""
    found: dict[str, list[str]] = {kind: [] for kind in HEADINGS}
    kinds, kind = {heading: kind for kind, heading in HEADINGS.items()}, ""
    for line in FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else ():
        if line.startswith("# "):
            kind = kinds[line.removeprefix("# ")]
        elif line:
            found[kind].append(line)
    return found


def main() -> None:
    """Writes the names that are listed and those that are there."""
    known, found = listed(), public_names()
    parts = [f"# {HEADINGS[k]}\n\n" + "\n".join(sorted({*known[k], *found[k]})) + "\n" for k in HEADINGS]
    FILE.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
