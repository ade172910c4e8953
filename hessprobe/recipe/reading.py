"""Where recipes come from: shipped ones by name, TOML files, and settings on top."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from hessprobe.errors import UserError, unknown_name
from hessprobe.recipe.checking import checked
from hessprobe.recipe.runs import check_study
from hessprobe.recipe.sections import Recipe
from hessprobe.recipe.settings import differences, parse_setting, with_setting

__all__ = ["build_recipe", "differences", "parse_setting", "read_recipe", "shipped_recipes"]


def shipped_recipes() -> tuple[str, ...]:
    """Returns the names of the recipes that come with hessprobe."""
    folder = resources.files("hessprobe") / "recipes"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")))


def read_recipe(source: str | Path) -> dict[str, Any]:
    """Returns the values of a recipe by shipped name or file path, unchecked.

    Raises:
        UserError: no such recipe or file, or a file that is not TOML.
    """
    names = shipped_recipes()
    if str(source) in names:
        return tomllib.loads((resources.files("hessprobe") / "recipes" / f"{source}.toml").read_text())
    path = Path(source)
    if not path.is_file():
        if path.suffix == ".toml" or "/" in str(source):
            raise UserError(f"no recipe file at {path}; shipped recipes: {', '.join(names)}")
        raise unknown_name("recipe", str(source), [*names, "a path to a .toml file"])
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a TOML recipe: {error}") from error


def build_recipe(values: Mapping[str, Any], settings: Sequence[str] = ()) -> Recipe:
    """Returns the checked recipe of TOML values with `a.b=c` settings on top; every variant of a study too.

    Raises:
        UserError: an unknown key (the valid ones are listed), a value out of range, a combination that is not.
    """
    merged = dict(values)
    for setting in settings:
        path, value = parse_setting(setting)
        try:
            merged = with_setting(merged, path, value)
        except UserError as error:
            raise UserError(f"--set {error}") from error
    recipe = checked(merged)
    check_study(recipe)
    return recipe
