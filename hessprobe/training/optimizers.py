"""From a recipe's words to an optimizer: the one place that knows the names on the command line."""

from __future__ import annotations

from typing import Any, Protocol

from hessprobe.optimization.baselines import FirstOrderOptimizer
from hessprobe.optimization.gauss_newton import GaussNewtonOptimizer, GaussNewtonSettings
from hessprobe.optimization.report import StepReport
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition
from hessprobe.recipe import OptimizerRecipe

LEARNING_RATES = {"full_gn": 0.02, "adamw": 0.003}


class OuterOptimizer(Protocol):
    """Whatever takes an outer step over minibatches, and can be saved."""

    def step(self, batches: list[Batch], line_search_batches: list[Batch]) -> StepReport: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def build_optimizer(
    recipe: OptimizerRecipe, objective: Objective, partition: Partition, outer_steps: int
) -> OuterOptimizer:
    """Returns the optimizer proper of a recipe, for `outer_steps` steps after the warm-up."""
    rate = LEARNING_RATES[recipe.name] if recipe.learning_rate is None else recipe.learning_rate
    clip = recipe.clip or None
    if recipe.name == "adamw":
        return FirstOrderOptimizer(
            objective,
            partition,
            solver="adamw",
            learning_rate=rate,
            clip=clip,
            weight_decay=recipe.weight_decay,
            schedule=recipe.schedule,
            outer_steps=outer_steps,
        )
    settings = GaussNewtonSettings(
        structure="full",
        solver=recipe.inner_solver,
        learning_rate=rate,
        schedule=recipe.schedule,
        clip=clip,
        line_search_grid=recipe.line_search_grid,
        warm_start=recipe.warm_start,
        outer_steps=outer_steps,
    )
    return GaussNewtonOptimizer(objective, partition, settings)


def build_warmup(recipe: OptimizerRecipe, objective: Objective, partition: Partition) -> FirstOrderOptimizer:
    """Returns the AdamW that every method starts from, a step on each minibatch (Abreu et al. 2025)."""
    return FirstOrderOptimizer(
        objective,
        partition,
        solver="adamw",
        learning_rate=recipe.warmup_learning_rate,
        clip=recipe.clip or None,
        accumulate=False,
    )
