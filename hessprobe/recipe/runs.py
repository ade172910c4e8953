"""The runs a study is made of, each an ordinary recipe without a study of its own."""

from __future__ import annotations

from typing import Any

from hessprobe.errors import UserError
from hessprobe.recipe.checking import checked
from hessprobe.recipe.sections import Recipe
from hessprobe.recipe.settings import with_setting
from hessprobe.recipe.study import WARM_UP, VariantRecipe


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """Returns the recipe at another seed."""
    return recipe.model_copy(update={"seed": seed})


def warm_up_run(recipe: Recipe, seed: int) -> Recipe:
    """Returns the run that every variant starts from: AdamW, a step a minibatch, and nothing measured."""
    assert recipe.study is not None
    steps = recipe.study.warm_up_steps
    settings = {
        "name": f"{recipe.name} {WARM_UP}",
        "seed": seed,
        "probes": (),
        "optimizer.name": "adamw",
        "optimizer.structure": None,
        "optimizer.warmup_steps": steps,
        "training.steps": steps,
    }
    return _run_of(recipe, settings)


def variant_run(
    recipe: Recipe, variant: VariantRecipe, learning_rate: float, seed: int, start_from: str | None
) -> Recipe:
    """Returns one run of a variant: its settings on the study's recipe, stopping at the target loss.

    Raises:
        UserError: settings that make no recipe, with the variant named.
    """
    assert recipe.study is not None
    settings = {
        "optimizer.warmup_steps": 0,
        **variant.settings,
        "name": f"{recipe.name} {variant.name}",
        "seed": seed,
        "optimizer.learning_rate": learning_rate,
        "training.stop_at": recipe.study.target_loss,
        "training.start_from": start_from,
    }
    try:
        return _run_of(recipe, settings)
    except UserError as error:
        raise UserError(f"study variant {variant.name!r}: {error}") from error


def check_study(recipe: Recipe) -> None:
    """Raises a UserError where a variant of the recipe's study makes no recipe."""
    for variant in recipe.study.variants if recipe.study else ():
        variant_run(recipe, variant, variant.learning_rates[0], recipe.seed, None)


def _run_of(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    values = recipe.model_dump(exclude={"study"}, exclude_none=True)
    for key, value in settings.items():
        values = with_setting(values, key.split("."), value)
    return checked(values)
