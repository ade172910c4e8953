"""One value of a recipe at a time: `a.b=c` read and put in place, and two recipes told apart."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hessprobe.errors import UserError
from hessprobe.recipe.sections import Recipe


def parse_setting(setting: str) -> tuple[list[str], Any]:
    """Returns the key path and value of `a.b=c`; the value is TOML, or else a plain string.

    Raises:
        UserError: no `=`.
    """
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set {setting}: wanted key=value, such as --set optimizer.learning_rate=0.01")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return key.strip().split("."), value


def with_setting(values: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Returns the values of a recipe with one replaced; the given ones stay as they are.

    Raises:
        UserError: a part of the path is a value, not a section.
    """
    changed = _copied(values)
    place = changed
    for part in path[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise UserError(f"{'.'.join(path)} = {value!r}: {part!r} is a value, not a section of the recipe")
    place[path[-1]] = value
    # Of two ways to say one thing, what is set last wins over what a file says.
    match list(path):
        case ["optimizer", "minibatches"]:
            place.pop("batch", None)
        case ["optimizer", "batch" | "sequences"] if "batch" in place:
            place.pop("minibatches", None)
    return changed


def differences(stored: Recipe, wanted: Recipe) -> list[str]:
    """Returns one line per value in which two recipes differ: `optimizer.learning_rate: 0.02 -> 0.05`."""
    before, after = dict(_leaves(stored.model_dump())), dict(_leaves(wanted.model_dump()))
    keys = [*before, *(key for key in after if key not in before)]
    return [f"{k}: {before.get(k)} -> {after.get(k)}" for k in keys if before.get(k) != after.get(k)]


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
