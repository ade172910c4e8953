"""From values to a checked recipe; what is wrong with them in words: wanted, got, way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from hessprobe.errors import UserError, unknown_name
from hessprobe.recipe.optimizer import OPTIMIZERS
from hessprobe.recipe.sections import PROBES, Recipe


def checked(values: Mapping[str, Any]) -> Recipe:
    """Returns the recipe of TOML values.

    Raises:
        UserError: an unknown key (the valid ones are listed) or a value out of range; a line for each.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_in_words(problem) for problem in error.errors())) from error


def _in_words(problem: Any) -> str:
    path = [str(part) for part in problem["loc"]]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        known = list(_section(path[:-1]).model_fields)
        where = f" in [{'.'.join(path[:-1])}]" if path[:-1] else ""
        return str(unknown_name(f"recipe key{where}", path[-1], known))
    if path[0] == "probes" and problem["type"] == "literal_error":
        return str(unknown_name("probe", str(problem["input"]), PROBES))
    if key == "optimizer.name" and problem["type"] == "literal_error":
        return str(unknown_name("optimizer", str(problem["input"]), OPTIMIZERS))
    message = problem["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if problem["type"] == "value_error" and isinstance(
        problem["input"], Mapping
    ):  # of a section, not of a key
        return f"recipe section [{key}]: {message}"
    if problem["type"] == "missing":
        return f"recipe key {key} is missing"
    return f"recipe key {key} = {problem['input']!r}: {message}"


def _section(path: list[str]) -> type[BaseModel]:
    """Returns the section at a path; a place in a list (`variants.0`) is looked through."""
    section: type[BaseModel] = Recipe
    for part in path:
        if not part.isdigit():
            section = _model_in(section.model_fields[part].annotation) or section
    return section


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the section inside an annotation such as `StudyRecipe | None` or `tuple[VariantRecipe, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(argument) for argument in get_args(annotation))
    return next((model for model in found if model), None)
