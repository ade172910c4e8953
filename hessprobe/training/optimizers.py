"""From a recipe's words to an optimizer: the one place that knows the names on the command line."""

from __future__ import annotations

from typing import Any, Protocol

from hessprobe.optimization.baselines import FirstOrderOptimizer
from hessprobe.optimization.gauss_newton import GaussNewton
from hessprobe.optimization.inner_problem import GaussNewtonSettings
from hessprobe.optimization.report import StepReport
from hessprobe.problem.objective import Batch, Objective
from hessprobe.problem.partition import Partition
from hessprobe.recipe import GAUSS_NEWTON, OptimizerRecipe
from hessprobe.schema.optimizers import ENTRIES

# What a recipe that names none gets: Gauss-Newton by the inner solver, where that is not conjugate gradients.
INNER_LEARNING_RATES = {n: rate for n, e in ENTRIES.items() if (rate := e.inner_learning_rate) is not None}
LEARNING_RATES = {
    **dict.fromkeys(GAUSS_NEWTON, INNER_LEARNING_RATES["muon"]),
    **{name: entry.learning_rate for name, entry in ENTRIES.items()},
}


class OuterOptimizer(Protocol):
    """Whatever takes an outer step over minibatches, and can be saved."""

    def step(self, batches: list[Batch], line_search_batches: list[Batch]) -> StepReport: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def learning_rate(recipe: OptimizerRecipe) -> float:
    """Returns the learning rate a recipe means: its own, or the default of its optimizer or inner solver."""
    if recipe.learning_rate is not None:
        return recipe.learning_rate
    if recipe.is_gauss_newton:
        return INNER_LEARNING_RATES.get(recipe.inner_solver, LEARNING_RATES[recipe.name])
    return LEARNING_RATES[recipe.name]


def gauss_newton_settings(recipe: OptimizerRecipe, outer_steps: int) -> GaussNewtonSettings:
    """Returns the settings of a recipe's Gauss-Newton, for `outer_steps` steps."""
    given = {
        "damping": recipe.damping,
        "cg_iterations": recipe.cg_iterations,
        "cg_tolerance": recipe.cg_tolerance,
    }
    return GaussNewtonSettings(
        structure="layerwise" if recipe.layerwise else "full",
        model="prox-linear" if recipe.name == "prox_linear" else "quadratic",
        solver=recipe.inner_solver,
        learning_rate=learning_rate(recipe),
        schedule=recipe.schedule,
        clip=recipe.clip or None,
        inner_steps=recipe.inner_steps,
        line_search_grid=recipe.step_sizes,
        warm_start=recipe.warm_start,
        outer_steps=outer_steps,
        **{key: value for key, value in given.items() if value is not None},
    )


def build_optimizer(
    recipe: OptimizerRecipe, objective: Objective, partition: Partition, outer_steps: int, seed: int = 0
) -> OuterOptimizer:
    """Returns the optimizer proper of a recipe, for `outer_steps` steps after the warm-up.

    Args:
        seed: of the sampled labels that Sophia and K-FAC estimate curvature from.
    """
    if recipe.is_gauss_newton:
        settings = gauss_newton_settings(recipe, outer_steps)
        return GaussNewton(objective.model, objective, partition=partition, settings=settings)
    return FirstOrderOptimizer(
        objective,
        partition,
        solver=recipe.name,
        learning_rate=learning_rate(recipe),
        clip=recipe.clip or None,
        weight_decay=recipe.weight_decay,
        schedule=recipe.schedule,
        learning_rate_warmup=recipe.learning_rate_warmup,
        outer_steps=outer_steps,
        refresh=recipe.refresh if ENTRIES[recipe.name].refresh else None,
        damping=recipe.damping if recipe.name == "kfac" else None,
        seed=seed,
    )


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
