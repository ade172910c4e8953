"""Values that a preset fills in, and checks that several sections share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

Preset = Literal["light", "standard", "deep"]


AboveZero = Annotated[float, Field(gt=0)]


def filled(given: Any, presets: dict[str, dict[str, Any]]) -> Any:
    """Returns a section's values with those of its preset where none was given; an unknown preset is left to the check."""
    if not isinstance(given, dict):
        return given
    preset = presets.get(str(given.get("preset")), {})
    return {**preset, **{key: value for key, value in given.items() if value is not None}}


def check_rising(name: str, given: Sequence[float]) -> None:
    """Raises a ValueError where values do not rise, each standing there once."""
    if list(given) != sorted(set(given)):
        raise ValueError(f"{name}: wanted rising values, each once, got {list(given)}")
