"""The recipe of a study: several ways to train, each with its learning rates, from one start to one loss."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator

from hessprobe.schema.section import Positive, Section

WARM_UP = "warm-up"  # the folder of the runs that all variants start from
# What a study itself decides for each of its runs.
_DECIDED = ("name", "seed", "study", "optimizer.learning_rate", "training.stop_at", "training.start_from")


class VariantRecipe(Section):
    """One way to train: the study's recipe with `settings` (dotted key = value) on top, at each learning rate."""

    name: str
    learning_rates: tuple[float, ...] = Field(min_length=1)
    settings: dict[str, Any] = {}

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, given: str) -> str:
        if given == WARM_UP or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", given):
            raise ValueError(f"it names a folder: letters, digits, '.', '_' and '-', and not {WARM_UP!r}")
        return given

    @field_validator("learning_rates")
    @classmethod
    def _rates_are_positive(cls, given: tuple[float, ...]) -> tuple[float, ...]:
        if min(given) <= 0 or len(set(given)) != len(given):
            raise ValueError("wanted learning rates above 0, each once")
        return given

    @field_validator("settings")
    @classmethod
    def _settings_are_free(cls, given: dict[str, Any]) -> dict[str, Any]:
        if taken := [key for key in given if key in _DECIDED]:
            raise ValueError(f"the study itself decides {', '.join(taken)}")
        return given


class StudyRecipe(Section):
    """Per seed a warm-up that every variant starts from; per variant a sweep, and the other seeds at its best rate.

    target_loss: held-out loss (nats per token) at which every run stops.
    seeds: how many, from the recipe's `seed` on; the sweep is at the first.
    warm_up_steps: outer steps of AdamW, as optimizer.warmup_steps; 0 starts every variant from initial weights.
    """

    target_loss: float = Field(gt=0)
    seeds: Positive = 3
    warm_up_steps: int = Field(default=1, ge=0)
    variants: tuple[VariantRecipe, ...] = Field(min_length=1)

    @field_validator("variants")
    @classmethod
    def _names_differ(cls, given: tuple[VariantRecipe, ...]) -> tuple[VariantRecipe, ...]:
        names = [variant.name for variant in given]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"variants need names of their own; twice: {', '.join(twice)}")
        return given
